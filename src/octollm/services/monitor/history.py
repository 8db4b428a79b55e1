"""What is known of each service, decided from what was seen. No I/O."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from octollm.clock import iso
from octollm.contracts.events import Event

State = Literal["up", "degraded", "down", "unknown"]
MAX_SAMPLES = 120
"""Looks at a service that are kept: ten minutes of them."""
MAX_INSTANCES = 64


class Sample(msgspec.Struct, frozen=True):
    """One look at a service: RFC 3339 time, its state, and how long it took to answer in milliseconds."""

    at: str
    state: State
    latency_ms: float = 0.0


class ServiceState(msgspec.Struct, frozen=True):
    """The latest state of a service. ``since`` is when it began; ``detail`` says why it is not up."""

    service: str
    state: State
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
class Look:
    """What asking the instances of a service came to; ``latency`` in seconds, of the slowest that answered."""

    state: State
    latency: float = 0.0
    detail: str = ""
    instances: int = 0


@dataclass(slots=True)
class _Watched:
    state: State = "unknown"
    since: float | None = None
    look: Look = field(default_factory=lambda: Look("unknown"))
    checked: float | None = None
    samples: deque[Sample] = field(default_factory=lambda: deque[Sample](maxlen=MAX_SAMPLES))
    event: str = ""
    event_at: str = ""


class History:
    """The states of the services by name, bounded."""

    def __init__(self, services: Iterable[str]) -> None:
        self._watched = {name: _Watched() for name in services}
        self.events = 0

    def looked(self, service: str, look: Look, now: float) -> None:
        """Note a look at ``service`` at ``now``, in epoch seconds."""
        watched = self._watched[service]
        if look.state != watched.state:
            watched.state, watched.since = look.state, now
        watched.look, watched.checked = look, now
        watched.samples.append(Sample(iso(now), look.state, round(look.latency * 1000, 1)))

    def heard(self, event: Event) -> None:
        """Note an event; those that a service says of itself are kept with it."""
        self.events += 1
        name = event.data.get("service", event.data.get("arm"))
        watched = self._watched.get(name) if isinstance(name, str) else None
        if watched is None or event.event_type.partition(".")[0] not in ("system", "arm"):
            return
        watched.event, watched.event_at = event.event_type, event.timestamp

    def states(self) -> ServiceStates:
        """Return the latest state of every service."""
        return ServiceStates(tuple(_state(name, watched) for name, watched in self._watched.items()), self.events)


def judge(answers: Iterable[tuple[bool, float, str]]) -> Look:
    """Return what the answers of a service's instances (well, seconds, why not) say of it together."""
    found = list(answers)
    well = [seconds for good, seconds, _ in found if good]
    faults = [why for good, _, why in found if not good]
    detail = "; ".join(dict.fromkeys(faults))[:300]
    if not found:
        return Look("unknown", detail="No address of it is known here.")
    state: State = "up" if not faults else "degraded" if well else "down"
    return Look(state, max(well, default=0.0), detail, len(found))


def _state(name: str, watched: _Watched) -> ServiceState:
    return ServiceState(
        service=name,
        state=watched.state,
        since=None if watched.since is None else iso(watched.since),
        checked_at=None if watched.checked is None else iso(watched.checked),
        latency_ms=round(watched.look.latency * 1000, 1),
        detail=watched.look.detail,
        instances=watched.look.instances,
        history=tuple(watched.samples),
        last_event=watched.event,
        last_event_at=watched.event_at,
    )
