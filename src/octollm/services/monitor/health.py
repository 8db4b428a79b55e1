"""Health of every built-in service: periodic probes of ``/health`` and the events that services publish, kept as a bounded history."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from octollm.clock import format_rfc3339
from octollm.contracts.events import Event
from octollm.errors import OctoError
from octollm.events import EventBus
from octollm.rpc.health import DependencyStatus
from octollm.rpc.service import ServiceBase

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


POLL_SECONDS = 5.0
PROBE_SECONDS = 2.0
"""How long an instance may take to answer ``/health``."""
RESUBSCRIBE_SECONDS = 1.0
ALL_EVENTS = "events:*"


class HealthMonitor:
    """The two background tasks of the monitor. Neither ends by itself; one that does is told in ``/ready``."""

    def __init__(self, base: ServiceBase, bus: EventBus, services: Iterable[str], history: HealthHistory) -> None:
        self._base = base
        self._bus = bus
        self._services = tuple(services)
        self._history = history
        self._subscription_error = "The first subscription is not there yet."
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> HealthMonitor:
        self._tasks = [
            asyncio.create_task(self._poll(), name="monitor poll"),
            asyncio.create_task(self._follow_events(), name="monitor events"),
        ]
        for task in self._tasks:
            task.add_done_callback(self._log_crash)
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)

    async def events_checkup(self) -> DependencyStatus:
        """Say whether events are heard; without them health is still polled."""
        return DependencyStatus(ok=not self._subscription_error, detail=self._subscription_error, required=False)

    async def polling_checkup(self) -> DependencyStatus:
        """Say whether the services are looked at."""
        ended = self._tasks[0].done() if self._tasks else True
        return DependencyStatus(ok=not ended, detail="Polling has ended; the log says why." if ended else "")

    def _log_crash(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._base.log.error("monitor.crashed", task=task.get_name(), error=error)

    async def _poll(self) -> None:
        while True:
            async with asyncio.TaskGroup() as looks:
                for service in self._services:
                    looks.create_task(self._probe_service(service))
            await asyncio.sleep(POLL_SECONDS)

    async def _probe_service(self, service: str) -> None:
        urls: tuple[str, ...] = ()
        with contextlib.suppress(OctoError):  # no address is known: that is what is told
            urls = self._base.discovery.instances(service)[:MAX_INSTANCES]
        answers = await asyncio.gather(*(self._probe_instance(url) for url in urls))
        self._history.record_probe(service, combine_probes(answers), self._base.clock.now())

    async def _probe_instance(self, url: str) -> tuple[bool, float, str]:
        started = self._base.clock.monotonic()
        try:
            answer = await self._base.http.send("GET", f"{url}/health", {}, None, seconds=PROBE_SECONDS)
        except OctoError as error:
            return False, 0.0, error.detail
        seconds = self._base.clock.monotonic() - started
        return answer.status == 200, seconds, "" if answer.status == 200 else f"/health answers {answer.status}."

    async def _follow_events(self) -> None:
        while True:
            try:
                async with self._bus.subscribe(ALL_EVENTS) as events:
                    self._subscription_error = ""
                    async for event in events:
                        self._subscription_error = ""
                        self._history.record_event(event)
                        self._base.metrics.events.labels(event.event_type).inc()
            except OctoError as error:
                self._subscription_error = error.detail
                self._base.log.warning("monitor.deaf", error=error)
            await asyncio.sleep(RESUBSCRIBE_SECONDS)
