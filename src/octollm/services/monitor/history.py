"""What is known of each service, decided from what was seen. No I/O."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from octollm.clock import format_rfc3339
from octollm.contracts.events import Event

HealthState = Literal["up", "degraded", "down", "unknown"]
MAX_SAMPLES = 120
"""Looks at a service that are kept: ten minutes of them."""
MAX_INSTANCES = 64


class Sample(msgspec.Struct, frozen=True):
    """One look at a service: RFC 3339 time, its state, and how long it took to answer in milliseconds."""

    at: str
    state: HealthState
    latency_ms: float = 0.0


class ServiceState(msgspec.Struct, frozen=True):
    """The latest state of a service. ``since`` is when it began; ``detail`` says why it is not up."""

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


class ServiceStates(msgspec.Struct, frozen=True):
    """``GET /services``: every built-in service. ``events`` counts what was heard since the monitor started."""

    services: tuple[ServiceState, ...]
    events: int = 0


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What asking the instances of a service came to; ``latency`` in seconds, of the slowest that answered."""

    state: HealthState
    latency: float = 0.0
    detail: str = ""
    instances: int = 0


@dataclass(slots=True)
class _ServiceRecord:
    state: HealthState = "unknown"
    since: float | None = None
    last_probe: ProbeResult = field(default_factory=lambda: ProbeResult("unknown"))
    checked_at: float | None = None
    samples: deque[Sample] = field(default_factory=lambda: deque[Sample](maxlen=MAX_SAMPLES))
    event: str = ""
    event_at: str = ""


class HealthHistory:
    """The states of the services by name, bounded."""

    def __init__(self, services: Iterable[str]) -> None:
        self._records = {name: _ServiceRecord() for name in services}
        self.events = 0

    def record_probe(self, service: str, result: ProbeResult, now: float) -> None:
        """Note a look at ``service`` at ``now``, in epoch seconds."""
        watched = self._records[service]
        if result.state != watched.state:
            watched.state, watched.since = result.state, now
        watched.last_probe, watched.checked_at = result, now
        watched.samples.append(Sample(format_rfc3339(now), result.state, round(result.latency * 1000, 1)))

    def record_event(self, event: Event) -> None:
        """Note an event; those that a service says of itself are kept with it."""
        self.events += 1
        name = event.data.get("service", event.data.get("arm"))
        watched = self._records.get(name) if isinstance(name, str) else None
        if watched is None or event.event_type.partition(".")[0] not in ("system", "arm"):
            return
        watched.event, watched.event_at = event.event_type, event.timestamp

    def get_states(self) -> ServiceStates:
        """Return the latest state of every service."""
        return ServiceStates(tuple(_build_state(name, watched) for name, watched in self._records.items()), self.events)


def combine_probes(answers: Iterable[tuple[bool, float, str]]) -> ProbeResult:
    """Return what the answers of a service's instances (well, seconds, why not) say of it together."""
    found = list(answers)
    well = [seconds for good, seconds, _ in found if good]
    faults = [why for good, _, why in found if not good]
    detail = "; ".join(dict.fromkeys(faults))[:300]
    if not found:
        return ProbeResult("unknown", detail="No address of it is known here.")
    state: HealthState = "up" if not faults else "degraded" if well else "down"
    return ProbeResult(state, max(well, default=0.0), detail, len(found))


def _build_state(name: str, record: _ServiceRecord) -> ServiceState:
    return ServiceState(
        service=name,
        state=record.state,
        since=None if record.since is None else format_rfc3339(record.since),
        checked_at=None if record.checked_at is None else format_rfc3339(record.checked_at),
        latency_ms=round(record.last_probe.latency * 1000, 1),
        detail=record.last_probe.detail,
        instances=record.last_probe.instances,
        history=tuple(record.samples),
        last_event=record.event,
        last_event_at=record.event_at,
    )
