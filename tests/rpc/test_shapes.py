"""Types of bodies and answers: Pydantic models beside what msgspec knows, and inside it."""

from __future__ import annotations

from datetime import date
from typing import Any

import msgspec
import pytest
from pydantic import BaseModel, ConfigDict, Field

from octollm.errors import OctoError
from octollm.rpc.codec import convert, decode, encode, is_pydantic, json_schemas


class Visit(BaseModel):
    model_config = ConfigDict(strict=True)
    day: date
    guests: int = Field(ge=1, alias="guestCount")


class Stay(msgspec.Struct):
    visits: list[Visit]
    note: object = None


STAY = b'{"visits": [{"day": "2026-11-25", "guestCount": 2}], "note": [1, {"a": null}]}'


def test_a_model_inside_a_struct_is_read_and_written():
    stay = decode(STAY, Stay)
    assert stay.visits[0].day == date(2026, 11, 25)
    assert stay.note == [1, {"a": None}]
    assert msgspec.json.decode(encode(stay)) == msgspec.json.decode(STAY)
    assert convert(msgspec.json.decode(STAY), Stay) == stay


def test_each_fault_of_a_model_has_its_place():
    with pytest.raises(OctoError) as caught:
        decode(b'{"visits": [{"day": "2026-11-25", "guestCount": 2}, {"day": "soon", "guestCount": 0}]}', Stay)
    assert caught.value.code == "invalid_body"
    assert {fault.pointer for fault in caught.value.field_errors} == {"/visits/1/day", "/visits/1/guestCount"}


def test_what_has_no_form_in_json_is_refused():
    with pytest.raises(TypeError):
        encode({"a": lambda: None})
    for kind in (is_pydantic, type("Odd", (), {})):
        with pytest.raises((TypeError, NotImplementedError)):
            json_schemas([kind])


def test_models_and_what_they_refer_to_are_components():
    class Trip(BaseModel):
        visits: list[Visit]

    [schema], components = json_schemas([Trip])
    assert schema["properties"]["visits"]["items"] == {"$ref": "#/components/schemas/Visit"}
    assert components["Visit"]["required"] == ["day", "guestCount"]


@pytest.mark.parametrize("kind", [int, dict[str, Any], Stay, Stay([]), "text", None])
def test_what_is_no_pydantic_model_is_not_taken_for_one(kind):
    assert not is_pydantic(kind)
