"""The catalogue of events, and the documents and formats that are derived from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
from cloudevents.core.bindings.http import HTTPMessage, from_binary, from_structured
from cloudevents.core.formats.json import JSONFormat
from hypothesis import given
from hypothesis import strategies as st

from octollm.contracts.event_formats import build_asyncapi, encode_cloudevent, example_event
from octollm.contracts.events import EVENT_CATALOGUE, Event, EventType

KINDS = list(EVENT_CATALOGUE.values())
OFFICIAL = json.loads((Path(__file__).parent / "asyncapi-3.0.0.schema.json").read_text())


def by_name(kind: EventType) -> str:
    return kind.name


def official_errors(document: dict[str, Any]) -> list[str]:
    return [error.message for error in jsonschema.Draft7Validator(OFFICIAL).iter_errors(document)]


@pytest.mark.parametrize("kind", KINDS, ids=by_name)
def test_the_example_of_a_type_fits_its_struct_and_loses_no_member(kind: EventType) -> None:
    data = msgspec.convert(dict(kind.example), kind.data)
    assert set(kind.example) <= set(msgspec.to_builtins(data))
    assert set(kind.required) <= set(kind.example)


def test_the_document_is_valid_asyncapi() -> None:
    assert official_errors(build_asyncapi("0.1.0")) == []


@pytest.mark.parametrize("path", [("info",), ("channels", "task.completed", "address"), ("operations",)])
def test_the_official_schema_refuses_a_document_that_is_wrong(path: tuple[str, ...]) -> None:
    document = build_asyncapi("0.1.0")
    *parents, last = path
    place = document
    for name in parents:
        place = place[name]
    place[last] = 7
    assert official_errors(document)


def test_every_type_has_a_channel_an_operation_and_a_message() -> None:
    document = build_asyncapi("0.1.0")
    assert set(document["channels"]) == set(document["components"]["messages"]) == set(EVENT_CATALOGUE)
    assert document["channels"]["task.completed"]["address"] == "events:task:completed"
    assert {operation["channel"]["$ref"] for operation in document["operations"].values()} == {
        f"#/channels/{name}" for name in EVENT_CATALOGUE
    }


@pytest.mark.parametrize("kind", KINDS, ids=by_name)
def test_the_payload_of_a_message_is_a_schema_that_its_example_fits(kind: EventType) -> None:
    document = build_asyncapi("0.1.0")
    message = document["components"]["messages"][kind.name]
    schema = {**message["payload"], "components": document["components"]}
    [example] = message["examples"]
    validate = jsonschema.Draft202012Validator(schema).is_valid
    assert validate(example["payload"])
    # Members of a newer version are allowed; a missing one and another type are not.
    assert validate({**example["payload"], "data": {**example["payload"]["data"], "from_the_future": [1]}})
    for name in kind.required:
        assert not validate({**example["payload"], "data": {**example["payload"]["data"], name: {"no": "value"}}})
        assert not validate(
            {**example["payload"], "data": {k: v for k, v in example["payload"]["data"].items() if k != name}}
        )
    assert not validate({**example["payload"], "event_type": "task.invented"})


@pytest.mark.parametrize("kind", KINDS, ids=by_name)
def test_an_event_as_cloudevent_is_read_by_the_sdk(kind: EventType) -> None:
    event = example_event(kind)
    structured, binary = encode_cloudevent(event), encode_cloudevent(event, "binary")
    for read in (
        from_structured(HTTPMessage(structured.headers, structured.body), JSONFormat()),
        from_binary(HTTPMessage(binary.headers, binary.body), JSONFormat()),
    ):
        check_cloudevent(read, event)


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=40)


@given(TEXT, TEXT)
def test_no_value_breaks_out_of_its_header(subject: str, tenant: str) -> None:
    event = msgspec.structs.replace(
        example_event(EVENT_CATALOGUE["task.completed"]), subject=subject, tenant=tenant, data={"task_id": subject}
    )
    message = encode_cloudevent(event, "binary")
    for value in message.headers.values():
        assert value.isascii()
        assert value.isprintable()
    check_cloudevent(from_binary(HTTPMessage(message.headers, message.body), JSONFormat()), event)


def check_cloudevent(read: Any, event: Event) -> None:
    assert read.get_id() == event.id
    assert read.get_type() == f"octollm.{event.event_type}"
    assert read.get_source() == f"urn:octollm:service:{event.source}"
    assert read.get_subject() == event.subject
    assert read.get_datacontenttype() == "application/json"
    assert read.get_time().isoformat() == event.timestamp.replace(".000Z", "+00:00")
    assert read.get_extension("tenant") == event.tenant
    assert read.get_extension("sequence") == (str(event.seq) if event.seq else None)
    data = read.get_data()
    assert (data if isinstance(data, dict) else json.loads(data)) == event.data
