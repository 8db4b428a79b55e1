"""A task's trace as its owner reads it: the spans of every service that took part."""

from __future__ import annotations

import msgspec

AttributeValue = str | bool | int | float | list[str]


class SpanView(msgspec.Struct, frozen=True):
    """One piece of work. ``kind`` is ``server`` (a call served), ``client`` (a call made) or ``internal``.

    ``start`` is in seconds since the epoch, ``duration_ms`` in milliseconds. ``solve_code_goal`` is why it failed; empty when it
    ended well. ``parent_id`` is empty for what nothing called.
    """

    trace_id: str
    span_id: str
    parent_id: str
    service: str
    name: str
    kind: str
    start: float
    duration_ms: float
    code: str = ""
    message: str = ""
    attributes: dict[str, AttributeValue] = {}


class TraceView(msgspec.Struct, frozen=True):
    """The spans of one task by their start. ``complete`` is false when there were too many to tell all.

    Spans arrive within a second of their end. A task that was submitted in a trace that is not sampled has none.
    """

    task_id: str
    spans: tuple[SpanView, ...]
    complete: bool = True
