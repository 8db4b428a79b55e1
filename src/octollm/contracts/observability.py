"""Messages about the services' state: health, readiness, traces, and the hash-chained audit log."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from octollm.errors import OctoError


class DependencyStatus(msgspec.Struct, frozen=True, omit_defaults=True):
    """The state of a dependency. The service stays ready without one that is not ``required``."""

    ok: bool
    detail: str = ""
    required: bool = True
    latency_ms: float | None = None
    """The duration of the check, in milliseconds."""


class Readiness(msgspec.Struct, frozen=True):
    """``GET /ready``: 200 when the service can take calls, else 503."""

    status: str
    service: str
    dependencies: dict[str, DependencyStatus]


class Health(msgspec.Struct, frozen=True):
    """``GET /health``: the process is alive."""

    service: str
    version: str
    status: str = "ok"


HealthState = Literal["up", "degraded", "down", "unknown"]


class Sample(msgspec.Struct, frozen=True):
    """One probe of a service: RFC 3339 time, state, and latency in milliseconds."""

    at: str
    state: HealthState
    latency_ms: float = 0.0


class OpenBreaker(msgspec.Struct, frozen=True):
    """A circuit breaker that ``caller`` has opened against an instance (a URL), and since when."""

    caller: str
    instance: str
    since: str


class ServiceState(msgspec.Struct, frozen=True):
    """The latest state of a service, and ``since`` when; ``detail`` says why it is not up.

    The rate of requests, the ratio of errors (status 500 and above) and the percentiles are those of the last minute,
    over all instances; ``None`` without requests. ``breakers`` are those that are open against it.
    """

    service: str
    state: HealthState
    since: str | None
    checked_at: str | None
    latency_ms: float
    detail: str
    instances: int
    history: tuple[Sample, ...]
    last_event: str = ""
    last_event_at: str = ""
    requests_per_second: float | None = None
    error_ratio: float | None = None
    p50_ms: float | None = None
    p95_ms: float | None = None
    p99_ms: float | None = None
    breakers: tuple[OpenBreaker, ...] = ()


class ServiceStates(msgspec.Struct, frozen=True):
    """``GET /services``: every built-in service. ``events`` counts events received since the monitor started."""

    services: tuple[ServiceState, ...]
    events: int = 0


AttributeValue = str | bool | int | float | list[str]


class SpanView(msgspec.Struct, frozen=True):
    """A span. ``kind`` is ``server`` (a call served), ``client`` (a call made) or ``internal``.

    ``start`` is in seconds since the epoch. ``code`` is the error code of a failure, else empty. ``parent_id`` is
    empty for the root of a trace.
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
    """The spans of one task, in order of their start. ``complete`` is false when the response leaves some out.

    Spans arrive within a second of their end. A task that was submitted in an unsampled trace has none.
    """

    task_id: str
    spans: tuple[SpanView, ...]
    complete: bool = True


class AuditRow(msgspec.Struct, frozen=True):
    """A row of the audit log.

    ``seq`` counts a tenant's rows from 1 without gaps; ``at`` is in epoch seconds. ``hash`` covers the row and the
    previous hash (:func:`octollm.capability.audit_chain.row_hash`). The last row of each sealed batch has a
    ``checkpoint``: the root's signature over the head of the chain.
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
    """The head of a tenant's chain. An empty chain has ``seq`` 0 and no checkpoint."""

    tenant: str
    seq: int = 0
    hash: str = ""
    checkpoint: str = ""


class AuditPage(msgspec.Struct, frozen=True):
    """Rows after a position, oldest first, and the head of the chain at that time.

    The rows up to ``cut`` are in the archive: the log begins after it.
    """

    rows: tuple[AuditRow, ...]
    head: AuditHead
    cut: AuditHead | None = None


class AuditCut(msgspec.Struct, frozen=True):
    """The first line of an export whose log begins after a cut."""

    cut: AuditHead


class AuditTrailer(msgspec.Struct, frozen=True):
    """The last line of an export."""

    head: AuditHead


def decode_audit_line(line: bytes, place: str) -> AuditRow | AuditCut | AuditTrailer:
    """Return a line of an export. Raises ``file_invalid`` with ``place`` for anything else."""
    kind = AuditTrailer if line.startswith(b'{"head"') else AuditCut if line.startswith(b'{"cut"') else AuditRow
    try:
        return msgspec.json.decode(line, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise OctoError(f"{place} is no audit row: {error}", code="file_invalid") from error
