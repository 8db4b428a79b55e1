"""Health of every built-in service: probes, request figures and events of the services, as a bounded history."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from octollm.clock import format_rfc3339
from octollm.concurrency import BackgroundLoop
from octollm.contracts.events import Event
from octollm.contracts.observability import HealthState, OpenBreaker, Sample, ServiceState, ServiceStates
from octollm.errors import OctoError
from octollm.events import EventBus
from octollm.rpc.health import DependencyStatus
from octollm.rpc.service import ServiceBase
from octollm.services.monitor.request_figures import RequestHistory, RequestTotals, parse_metrics

MAX_SAMPLES = 120
"""Probes of a service that are kept: those of ten minutes."""
MAX_INSTANCES = 64
"""Instances of one service that are probed."""
MAX_BREAKERS = 64
"""Open circuit breakers of one service that are shown."""
POLL_SECONDS = 5.0
SCRAPE_EVERY = 3
"""The metrics of a service are read at every so many probes."""
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
    requests: RequestHistory = field(default_factory=RequestHistory)
    breakers: dict[tuple[str, str], str] = field(default_factory=dict[tuple[str, str], str])
    """Since when each is open, by the service that opened it and the instance."""
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

    def record_totals(self, service: str, totals: Mapping[str, RequestTotals], now: float) -> None:
        """Record what the instances of ``service``, by their address, have served until ``now`` (epoch seconds)."""
        self._records[service].requests.record(totals, now)

    def record_event(self, event: Event) -> None:
        """Count an event, and keep the latest one about each service and the circuit breakers that are open."""
        self.events += 1
        self._record_breaker(event)
        name = event.data.get("service", event.data.get("arm"))
        record = self._records.get(name) if isinstance(name, str) else None
        if record is None or event.event_type.partition(".")[0] not in ("system", "arm"):
            return
        record.event, record.event_at = event.event_type, event.timestamp

    def _record_breaker(self, event: Event) -> None:
        if event.event_type == "system.started":
            # What the former process of a service had opened ended with it.
            for record in self._records.values():
                for key in [key for key in record.breakers if key[0] == event.data.get("service")]:
                    del record.breakers[key]
        service, instance = event.data.get("service"), event.data.get("instance")
        record = self._records.get(service) if isinstance(service, str) else None
        if record is None or not isinstance(instance, str):
            return
        if event.event_type == "breaker.closed":
            record.breakers.pop((event.source, instance), None)
        elif event.event_type == "breaker.opened" and len(record.breakers) < MAX_BREAKERS:
            record.breakers.setdefault((event.source, instance), event.timestamp)

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
    figures = record.requests.compute()
    p50, p95, p99 = (
        (None, None, None)
        if figures.percentiles is None
        else (round(seconds * 1000, 2) for seconds in figures.percentiles)
    )
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
        requests_per_second=None if figures.rate is None else round(figures.rate, 2),
        error_ratio=None if figures.error_ratio is None else round(figures.error_ratio, 4),
        p50_ms=p50,
        p95_ms=p95,
        p99_ms=p99,
        breakers=tuple(OpenBreaker(*key, since) for key, since in record.breakers.items()),
    )


class HealthMonitor:
    """The two background loops of the monitor: probes and events. A crashed loop shows in ``/ready``."""

    def __init__(self, base: ServiceBase, bus: EventBus, services: Iterable[str], history: HealthHistory) -> None:
        self._base = base
        self._bus = bus
        self._services = tuple(services)
        self._history = history
        self._rounds = 0
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
                if self._rounds % SCRAPE_EVERY == 0:
                    probes.create_task(self._read_metrics(service))
        self._rounds += 1

    def _find_instances(self, service: str) -> tuple[str, ...]:
        try:
            return tuple(self._base.discovery.instances(service)[:MAX_INSTANCES])
        except OctoError:
            return ()

    async def _read_metrics(self, service: str) -> None:
        urls = self._find_instances(service)
        totals = await asyncio.gather(*(self._read_totals(url) for url in urls))
        read = {url: total for url, total in zip(urls, totals, strict=True) if total is not None}
        self._history.record_totals(service, read, self._base.clock.now())

    async def _read_totals(self, url: str) -> RequestTotals | None:
        try:
            response = await self._base.http.send("GET", f"{url}/metrics", {}, None, seconds=PROBE_SECONDS)
        except OctoError:
            return None
        return parse_metrics(response.body.decode("utf-8", "replace")) if response.status == 200 else None

    async def _probe_service(self, service: str) -> None:
        # Without an address there is no probe, and the state is unknown.
        urls = self._find_instances(service)
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
