"""What services report about themselves: health and readiness, traces, and the hash-chained audit log."""

from __future__ import annotations

from typing import Any

import msgspec


class DependencyStatus(msgspec.Struct, frozen=True, omit_defaults=True):
    """The state of something that a service needs. A degraded one does not make the service unready."""

    ok: bool
    detail: str = ""
    required: bool = True
    latency_ms: float | None = None
    """How long the answer took, in milliseconds."""


class Readiness(msgspec.Struct, frozen=True):
    """``GET /ready``: 200 when the service may be sent calls, else 503."""

    status: str
    service: str
    dependencies: dict[str, DependencyStatus]


class Health(msgspec.Struct, frozen=True):
    """``GET /health``: the process answers."""

    service: str
    version: str
    status: str = "ok"


AttributeValue = str | bool | int | float | list[str]


class SpanView(msgspec.Struct, frozen=True):
    """One piece of work. ``kind`` is ``server`` (a call served), ``client`` (a call made) or ``internal``.

    ``start`` is in seconds since the epoch, ``duration_ms`` in milliseconds. ``code`` is why it failed; empty when it
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


class AuditRow(msgspec.Struct, frozen=True):
    """One thing that somebody may be asked about.

    ``seq`` counts a tenant's rows from 1 without a gap; ``at`` is in epoch seconds. ``hash`` covers the row and the
    hash before it (:func:`octollm.capability.audit_chain.row_hash`); ``checkpoint`` is the root's signature over
    where the chain stood then, on the last row of those that were sealed together.
    """

    seq: int
    tenant: str
    at: float
    action: str
    sub: str
    cred: str
    service: str
    target: str
    detail: dict[str, Any] | None
    request_id: str
    correlation_id: str
    hash: str
    checkpoint: str | None = None


class AuditHead(msgspec.Struct, frozen=True):
    """Where a tenant's chain stands. An empty chain has ``seq`` 0 and no checkpoint."""

    tenant: str
    seq: int = 0
    hash: str = ""
    checkpoint: str = ""


class AuditPage(msgspec.Struct, frozen=True):
    """Rows after a position, oldest first, and where the chain stood when they were read."""

    rows: tuple[AuditRow, ...]
    head: AuditHead
