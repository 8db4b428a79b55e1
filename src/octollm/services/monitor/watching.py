"""Looking at every service once in a while, and listening to events, in the background."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable

from octollm.errors import OctoError
from octollm.events import EventBus
from octollm.rpc.health import DependencyStatus
from octollm.rpc.service import ServiceBase
from octollm.services.monitor.history import MAX_INSTANCES, HealthHistory, combine_probes

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
