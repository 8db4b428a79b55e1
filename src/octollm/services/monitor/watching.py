"""Looking at every service once in a while, and listening to events, in the background."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable

from octollm.errors import OctoError
from octollm.events import EventBus
from octollm.rpc.health import Dependency
from octollm.rpc.service import Base
from octollm.services.monitor.history import MAX_INSTANCES, History, judge

POLL_SECONDS = 5.0
ANSWER_SECONDS = 2.0
"""How long an instance may take to answer ``/health``."""
RETRY_SECONDS = 1.0
ALL_EVENTS = "events:*"


class Watching:
    """The two background tasks of the monitor. Neither ends by itself; one that does is told in ``/ready``."""

    def __init__(self, base: Base, bus: EventBus, services: Iterable[str], history: History) -> None:
        self._base = base
        self._bus = bus
        self._services = tuple(services)
        self._history = history
        self._deaf = "The first subscription is not there yet."
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Watching:
        self._tasks = [
            asyncio.create_task(self._poll(), name="monitor poll"),
            asyncio.create_task(self._listen(), name="monitor events"),
        ]
        for task in self._tasks:
            task.add_done_callback(self._ended)
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)

    async def events_checkup(self) -> Dependency:
        """Say whether events are heard; without them health is still polled."""
        return Dependency(ok=not self._deaf, detail=self._deaf, required=False)

    async def polling_checkup(self) -> Dependency:
        """Say whether the services are looked at."""
        ended = self._tasks[0].done() if self._tasks else True
        return Dependency(ok=not ended, detail="Polling has ended; the log says why." if ended else "")

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._base.log.error("monitor.crashed", task=task.get_name(), error=error)

    async def _poll(self) -> None:
        while True:
            async with asyncio.TaskGroup() as looks:
                for service in self._services:
                    looks.create_task(self._look(service))
            await asyncio.sleep(POLL_SECONDS)

    async def _look(self, service: str) -> None:
        urls: tuple[str, ...] = ()
        with contextlib.suppress(OctoError):  # no address is known: that is what is told
            urls = self._base.discovery.instances(service)[:MAX_INSTANCES]
        answers = await asyncio.gather(*(self._ask(url) for url in urls))
        self._history.looked(service, judge(answers), self._base.clock.now())

    async def _ask(self, url: str) -> tuple[bool, float, str]:
        started = self._base.clock.monotonic()
        try:
            answer = await self._base.http.send("GET", f"{url}/health", {}, None, seconds=ANSWER_SECONDS)
        except OctoError as error:
            return False, 0.0, error.detail
        seconds = self._base.clock.monotonic() - started
        return answer.status == 200, seconds, "" if answer.status == 200 else f"/health answers {answer.status}."

    async def _listen(self) -> None:
        while True:
            try:
                async with self._bus.subscribe(ALL_EVENTS) as events:
                    self._deaf = ""
                    async for event in events:
                        self._deaf = ""
                        self._history.heard(event)
                        self._base.metrics.events.labels(event.event_type).inc()
            except OctoError as error:
                self._deaf = error.detail
                self._base.log.warning("monitor.deaf", error=error)
            await asyncio.sleep(RETRY_SECONDS)
