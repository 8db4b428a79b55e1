"""Health of every built-in service: probes of ``/health`` and events of the services, as a bounded history."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from octollm.clock import format_rfc3339
from octollm.concurrency import BackgroundLoop
from octollm.contracts.events import Event
from octollm.contracts.observability import HealthState, Sample, ServiceState, ServiceStates
from octollm.errors import OctoError
from octollm.events import EventBus
from octollm.rpc.health import DependencyStatus
from octollm.rpc.service import ServiceBase

MAX_SAMPLES = 120
"""Probes of a service that are kept: those of ten minutes."""
MAX_INSTANCES = 64
"""Instances of one service that are probed."""
POLL_SECONDS = 5.0
PROBE_SECONDS = 2.0
"""Timeout of one probe."""
RESUBSCRIBE_SECONDS = 1.0
ALL_EVENTS = "events:*"


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """The combined result of probing a service's instances; ``latency`` (seconds) is that of the slowest response."""

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
    """The state and a bounded history of every service."""

    def __init__(self, services: Iterable[str]) -> None:
        self._records = {name: _ServiceRecord() for name in services}
        self.events = 0

    def record_probe(self, service: str, result: ProbeResult, now: float) -> None:
        """Record a probe of ``service`` at ``now`` (epoch seconds)."""
        record = self._records[service]
        if result.state != record.state:
            record.state, record.since = result.state, now
        record.last_probe, record.checked_at = result, now
        record.samples.append(Sample(format_rfc3339(now), result.state, round(result.latency * 1000, 1)))

    def record_event(self, event: Event) -> None:
        """Count an event, and keep the latest one about each service."""
        self.events += 1
        name = event.data.get("service", event.data.get("arm"))
        record = self._records.get(name) if isinstance(name, str) else None
        if record is None or event.event_type.partition(".")[0] not in ("system", "arm"):
            return
        record.event, record.event_at = event.event_type, event.timestamp

    def get_states(self) -> ServiceStates:
        """Return the latest state of every service."""
        return ServiceStates(tuple(_build_state(name, record) for name, record in self._records.items()), self.events)


def combine_probes(probes: Iterable[tuple[bool, float, str]]) -> ProbeResult:
    """Combine the probes of a service's instances, each (healthy, seconds, reason if not)."""
    results = list(probes)
    latencies = [seconds for healthy, seconds, _ in results if healthy]
    faults = [reason for healthy, _, reason in results if not healthy]
    detail = "; ".join(dict.fromkeys(faults))[:300]
    if not results:
        return ProbeResult("unknown", detail="Its address is unknown here.")
    state: HealthState = "up" if not faults else "degraded" if latencies else "down"
    return ProbeResult(state, max(latencies, default=0.0), detail, len(results))


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


class HealthMonitor:
    """The two background loops of the monitor: probes and events. A crashed loop shows in ``/ready``."""

    def __init__(self, base: ServiceBase, bus: EventBus, services: Iterable[str], history: HealthHistory) -> None:
        self._base = base
        self._bus = bus
        self._services = tuple(services)
        self._history = history
        self._polling = BackgroundLoop("monitor polling", self._poll, interval=POLL_SECONDS, log=base.log)
        self._events = BackgroundLoop(
            "monitor events", self._follow_events, interval=RESUBSCRIBE_SECONDS, restart=True, log=base.log
        )
        self._events.failure = "The first subscription is not established yet."
        self.check_events = self._events.check_health

    async def __aenter__(self) -> HealthMonitor:
        self._polling.start()
        self._events.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._events.aclose()
        await self._polling.aclose()

    async def check_polling(self) -> DependencyStatus:
        """Return whether the services are probed, which this service exists for."""
        return DependencyStatus(ok=not self._polling.failure, detail=self._polling.failure)

    async def _poll(self) -> None:
        async with asyncio.TaskGroup() as probes:
            for service in self._services:
                probes.create_task(self._probe_service(service))

    async def _probe_service(self, service: str) -> None:
        urls: tuple[str, ...] = ()
        with contextlib.suppress(OctoError):  # Without an address there is no probe, and the state is unknown.
            urls = self._base.discovery.instances(service)[:MAX_INSTANCES]
        probes = await asyncio.gather(*(self._probe_instance(url) for url in urls))
        self._history.record_probe(service, combine_probes(probes), self._base.clock.now())

    async def _probe_instance(self, url: str) -> tuple[bool, float, str]:
        started = self._base.clock.monotonic()
        try:
            response = await self._base.http.send("GET", f"{url}/health", {}, None, seconds=PROBE_SECONDS)
        except OctoError as error:
            return False, 0.0, error.detail
        seconds = self._base.clock.monotonic() - started
        reason = "" if response.status == 200 else f"/health returns {response.status}."
        return response.status == 200, seconds, reason

    async def _follow_events(self) -> None:
        async with self._bus.subscribe(ALL_EVENTS) as events:
            self._events.report_success()
            async for event in events:
                self._history.record_event(event)
                self._base.metrics.events.labels(event.event_type).inc()
