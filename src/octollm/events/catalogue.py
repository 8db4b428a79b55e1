"""Checking an event against the catalogue before it is stored or published."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from octollm.contracts.events import EVENT_CATALOGUE, EventType
from octollm.errors import FieldError, OctoError

MAX_EVENT_BYTES = 256 * 1024
"""Bytes of an event's ``data`` as JSON."""


def validate_event(event_type: str, data: Mapping[str, object]) -> EventType:
    """Return the declaration of ``event_type``.

    Raises ``invalid_body`` when it is not declared, a required member of ``data`` is missing, or ``data`` is too large
    or no JSON.
    """
    kind = EVENT_CATALOGUE.get(event_type)
    if kind is None:
        raise OctoError(f"The event {event_type!r} is not declared in the catalogue.", code="invalid_body")
    missing = [name for name in kind.required if name not in data]
    if missing:
        raise OctoError(
            f"The event {event_type!r} lacks {', '.join(missing)}.",
            code="invalid_body",
            field_errors=[FieldError(f"/data/{name}", "is missing") for name in missing],
        )
    try:
        size = len(msgspec.json.encode(data))
    except (TypeError, ValueError, msgspec.MsgspecError) as error:
        raise OctoError(f"The data of the event {event_type!r} is no JSON.", code="invalid_body") from error
    if size > MAX_EVENT_BYTES:
        raise OctoError(
            f"The data of the event {event_type!r} has {size} bytes; {MAX_EVENT_BYTES} are allowed.",
            code="invalid_body",
        )
    return kind
