"""Events in the formats of other standards: AsyncAPI 3.0 describes the catalogue, CloudEvents 1.0 carries an event.

https://www.asyncapi.com/docs/reference/specification/v3.0.0, and
https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/spec.md with its JSON format and HTTP protocol binding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import quote

import msgspec

from octollm.contracts.events import EVENT_CATALOGUE, Event, EventType, channel_of

ASYNCAPI_VERSION = "3.0.0"
_SCHEMAS = "#/components/schemas/"
_EXAMPLE_TIME = "2025-11-10T10:30:00.000Z"
_DESCRIPTION = (
    "Events of an OctoLLM installation. A durable event is stored in a log before it is published, so a subscriber"
    " that missed it reads it from `GET /events`. Members that are not described here may be added: ignore them."
)


def build_asyncapi(version: str, catalogue: Mapping[str, EventType] = EVENT_CATALOGUE) -> dict[str, Any]:
    """Return the document; ``version`` is that of the program."""
    return {
        "asyncapi": ASYNCAPI_VERSION,
        "info": {"title": "OctoLLM events", "version": version, "description": _DESCRIPTION},
        "defaultContentType": "application/json",
        "servers": {
            "redis": {
                "host": "{host}",
                "protocol": "redis",
                "description": "The Redis server of the installation, for services inside it.",
                "variables": {"host": {"default": "localhost:6379", "description": "OCTOLLM_REDIS_URL"}},
            },
            "gateway": {
                "host": "{host}",
                "protocol": "http",
                "description": "The gateway: `GET /events`, as pages or as server-sent events.",
                "variables": {"host": {"default": "localhost:8000", "description": "OCTOLLM_URL"}},
            },
        },
        "channels": {
            kind.name: {
                "address": channel_of(kind.name),
                "description": kind.meaning,
                "messages": {kind.name: {"$ref": f"#/components/messages/{kind.name}"}},
                "servers": [{"$ref": "#/servers/redis"}],
            }
            for kind in catalogue.values()
        },
        "operations": {
            f"publish.{kind.name}": {
                "action": "send",
                "channel": {"$ref": f"#/channels/{kind.name}"},
                "summary": kind.meaning,
                "messages": [{"$ref": f"#/channels/{kind.name}/messages/{kind.name}"}],
            }
            for kind in catalogue.values()
        },
        "components": {
            "schemas": _schemas(catalogue),
            "messages": {kind.name: _message(kind) for kind in catalogue.values()},
        },
    }


def example_event(kind: EventType) -> Event:
    """Return an example of the envelope around the type's example."""
    return Event(
        event_type=kind.name,
        timestamp=_EXAMPLE_TIME,
        source=next((each for each in kind.producers if each != "*"), "memory"),
        data=dict(kind.example),
        id="0192f3c4a5b67c8d9e0f1a2b3c4d5e70",
        tenant="local",
        subject=f"{kind.family}/example",
        seq=812 if kind.durable else 0,
        prev=790 if kind.durable else 0,
        version=7 if kind.durable else 0,
    )


def _message(kind: EventType) -> dict[str, Any]:
    return {
        "name": kind.name,
        "title": kind.name,
        "summary": kind.meaning,
        "contentType": "application/json",
        "payload": {
            "allOf": [{"$ref": f"{_SCHEMAS}Event"}],
            "type": "object",
            "properties": {
                "event_type": {"const": kind.name},
                "data": {"$ref": f"{_SCHEMAS}{kind.data.__name__}"},
            },
        },
        "examples": [{"name": "example", "payload": msgspec.to_builtins(example_event(kind))}],
        "x-durable": kind.durable,
        "x-schema-version": kind.version,
        "x-producers": list(kind.producers),
    }


def _schemas(catalogue: Mapping[str, EventType]) -> dict[str, Any]:
    types = [Event, *(kind.data for kind in catalogue.values())]
    _references, components = msgspec.json.schema_components(
        types, ref_template=_SCHEMAS + "{name}", schema_hook=_any_schema
    )
    return components


def _any_schema(kind: type) -> dict[str, Any]:
    """Return the schema of ``object``, which stands for any JSON value."""
    if kind is object:
        return {"description": "Any JSON value."}  # msgspec refuses an empty schema
    raise NotImplementedError


CloudEventMode = Literal["structured", "binary"]
STRUCTURED_TYPE = "application/cloudevents+json; charset=utf-8"
DATA_TYPE = "application/json"
TYPE_PREFIX = "octollm."
_UNESCAPED = "".join(map(chr, range(0x21, 0x7F))).replace('"', "").replace("%", "")


@dataclass(frozen=True, slots=True)
class CloudEventMessage:
    """The headers, with names in lower case, and the body of an HTTP request that carries one event."""

    headers: dict[str, str]
    body: bytes


def cloudevent_attributes(event: Event) -> dict[str, str]:
    """Return the context attributes of an event; those that it has no value for are left out.

    ``sequence`` and ``previous`` are ``seq`` and ``prev`` as decimal strings: the type Integer of CloudEvents ends at
    2,147,483,647. ``subjectversion`` is ``version``. ``partitionkey`` is the subject: the order holds within it.
    """
    kind = EVENT_CATALOGUE.get(event.event_type)
    attributes = {
        "specversion": "1.0",
        "id": event.id,
        "source": f"urn:octollm:service:{quote(event.source, safe='')}",
        "type": f"{TYPE_PREFIX}{event.event_type}",
        "time": event.timestamp,
        "datacontenttype": DATA_TYPE,
        "dataschema": f"urn:octollm:event:{event.event_type}:{kind.version}" if kind is not None else "",
        "subject": event.subject,
        "partitionkey": event.subject,
        "tenant": event.tenant,
        "correlationid": event.correlation_id,
        "traceparent": event.traceparent,
    }
    if event.seq:
        attributes |= {
            "sequence": str(event.seq),
            "previous": str(event.prev),
            "subjectversion": str(event.version),
        }
    return {name: value for name, value in attributes.items() if value}


def encode_cloudevent(event: Event, mode: CloudEventMode = "structured") -> CloudEventMessage:
    """Return an event as an HTTP message: structured (all in the body) or binary (attributes as ``ce-`` headers)."""
    attributes = cloudevent_attributes(event)
    if mode == "structured":
        body = msgspec.json.encode({**attributes, "data": event.data})
        return CloudEventMessage({"content-type": STRUCTURED_TYPE}, body)
    headers = {"content-type": attributes.pop("datacontenttype")}
    headers |= {f"ce-{name}": _encode_header(value) for name, value in attributes.items()}
    return CloudEventMessage(headers, msgspec.json.encode(event.data))


def _encode_header(value: str) -> str:
    """Percent-encode what a header cannot carry (HTTP protocol binding, section 3.1.3.2)."""
    # Also a line break, with which a value could add a header of its own.
    return quote(value, safe=_UNESCAPED)
