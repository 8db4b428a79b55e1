"""Typed results: the schema that is sent, and the value or the faults of an output."""

from __future__ import annotations

import dataclasses
import re

import msgspec
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octollm.client import InvalidRequest, OutputInvalid
from octollm.client.typed_output import decode_output, describe_output
from octollm.contracts.api import TaskView
from octollm.contracts.output_schema import extract_json, find_output_schema, format_output_criterion


class Item(msgspec.Struct, frozen=True):
    name: str
    count: int


class Report(msgspec.Struct, frozen=True):
    items: list[Item]


@dataclasses.dataclass
class DataclassItem:
    name: str
    count: int


class PydanticItem(pydantic.BaseModel):
    name: str
    count: int


def completed(output: str) -> TaskView:
    return TaskView("task-1", "completed", "goal", 100, 9, "then", "now", output=output)


@pytest.mark.parametrize("kind", [Item, DataclassItem, PydanticItem])
def test_a_value_has_the_type_that_was_asked_for(kind):
    value = decode_output(completed('{"name": "squid", "count": 8}'), kind)
    assert isinstance(value, kind)
    assert (value.name, value.count) == ("squid", 8)


def test_without_a_type_the_value_is_the_text():
    assert describe_output(str) == ()
    assert decode_output(completed(' {"a": 1} '), str) == ' {"a": 1} '


@pytest.mark.parametrize("kind", [Item, DataclassItem, PydanticItem])
def test_the_schema_is_sent_in_a_criterion_that_the_judge_reads(kind):
    schema = find_output_schema(["Be short.", *describe_output(kind)])
    assert schema is not None
    assert "count" in msgspec.json.encode(schema).decode()


@pytest.mark.parametrize(
    ("kind", "output", "pointer", "words"),
    [
        (Item, '{"name": "a", "count": "many"}', "/count", "Expected `int`"),
        (Report, '{"items": [{"name": "a", "count": 1}, {"name": 3, "count": 1}]}', "/items/1/name", "Expected `str`"),
        (DataclassItem, '{"name": "a"}', "", "missing required field `count`"),
        (PydanticItem, '{"name": "a", "count": "many"}', "/count", "valid integer"),
        (PydanticItem, '{"count": 1}', "/name", "required"),
        (Item, "The squid has eight arms.", "", "not JSON"),
        (PydanticItem, "The squid has eight arms.", "", "Invalid JSON"),
        (Item, "", "", "not JSON"),
        (Item, '{"name": "a", "count": 1} as you wished', "", "not JSON"),
    ],
)
def test_an_output_that_does_not_fit_is_an_error_with_a_pointer(kind, output, pointer, words):
    task = completed(output)
    with pytest.raises(OutputInvalid, match=re.escape(kind.__name__)) as caught:
        decode_output(task, kind)
    error = caught.value
    assert error.code == "output_invalid"
    assert error.task is task
    assert error.field_errors[0].pointer == pointer
    assert words in error.field_errors[0].detail


def test_a_type_without_a_schema_is_refused_before_anything_is_sent():
    class Opaque:
        pass

    wide = msgspec.defstruct("Wide", [(f"a_member_with_a_long_name_{number}", int) for number in range(300)])
    for kind in (Opaque, wide):
        with pytest.raises(InvalidRequest) as caught:
            describe_output(kind)
        assert caught.value.code == "output_type_invalid"


@given(name=st.text(max_size=30), count=st.integers(-(2**53), 2**53), fence=st.sampled_from(["", "json"]))
def test_a_fence_and_white_space_around_the_document_do_not_matter(name, count, fence):
    item = Item(name, count)
    text = msgspec.json.encode(item).decode()
    for output in (text, f"\n {text}\t", f"```{fence}\n{text}\n```"):
        assert extract_json(output) == text
        assert decode_output(completed(output), Item) == item


@given(
    st.dictionaries(st.text(max_size=9), st.text(max_size=9), max_size=4), st.lists(st.text(max_size=20), max_size=3)
)
def test_the_schema_survives_its_way_in_a_criterion(schema, others):
    assert find_output_schema([*others, format_output_criterion(schema)]) == schema
    assert find_output_schema(others) is None
