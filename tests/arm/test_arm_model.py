"""The schemas that answers are held to: what a strict provider takes, and what fits them is read back."""

from dataclasses import dataclass, field

import jsonschema
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from octollm.arm.model import strict_schema
from octollm.rpc.codec import decode, encode


class Leaf(msgspec.Struct):
    word: str
    weight: float = 1.0


class Tree(msgspec.Struct):
    leaves: list[Leaf]
    below: "Tree | None" = None


class Note(BaseModel):
    text: str
    default: int = 3


@dataclass
class Page:
    notes: list[Note] = field(default_factory=list)
    title: str | None = None


def objects(schema):
    if isinstance(schema, list):
        for item in schema:
            yield from objects(item)
    elif isinstance(schema, dict):
        if schema.get("type") == "object":
            yield schema
        for item in schema.values():
            yield from objects(item)


@pytest.mark.parametrize("kind", [Leaf, Tree, Note, Page])
def test_a_strict_provider_takes_it(kind):
    schema = strict_schema(kind)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["type"] == "object"
    for found in objects(schema):
        assert found["additionalProperties"] is False
        assert found["required"] == list(found["properties"])
    assert "components" not in str(schema)


def test_a_member_called_default_stays():
    assert set(strict_schema(Note)["properties"]) == {"text", "default"}


LEAVES = st.builds(Leaf, st.text(), st.floats(allow_nan=False, allow_infinity=False))
TREES = st.recursive(
    st.builds(Tree, st.lists(LEAVES, max_size=3)),
    lambda below: st.builds(Tree, st.lists(LEAVES, max_size=2), below),
    max_leaves=4,
)
PAGES = st.builds(Page, st.lists(st.builds(Note, text=st.text(), default=st.integers(-9, 9))), st.none() | st.text())


@given(TREES | PAGES)
def test_what_is_written_fits_and_is_read_back(value):
    written = encode(value)
    jsonschema.validate(msgspec.json.decode(written), strict_schema(type(value)))
    assert decode(written, type(value)) == value
