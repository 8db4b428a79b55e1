"""Exporting in the background what waits in a bounded buffer: spans, to the monitor or to a collector outside."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Generic, TypeVar

from octollm import __version__
from octollm.capability import SelfSigner
from octollm.clock import Clock
from octollm.context import Scene, current_scene, new_trace, set_scene
from octollm.contracts.problems import problem_of
from octollm.errors import OctoError
from octollm.resilience import Deadline
from octollm.rpc.caller import Caller, Outgoing, Target
from octollm.rpc.health import Dependency
from octollm.telemetry import Buffer, Log, Metrics, Span
from octollm.telemetry.otlp import encode_spans

T = TypeVar("T")
Send = Callable[[list[T]], Awaitable[None]]
"""Hands a batch over. Raises an ``OctoError``; a batch that it says may be sent again is kept."""

EXPORT_SECONDS = 0.5
"""How long the first of a batch waits for others."""
MAX_BATCH = 512
SEND_SECONDS = 5.0
LONGEST_PAUSE = 30.0
"""Between two tries while nobody takes anything."""
FLUSH_SECONDS = 0.5
"""How long the last batch may take when the service ends."""


class Exporter(Generic[T]):
    """Sends what is put into a buffer. It never holds up the work that is told of.

    While nobody takes it, the buffer keeps the newest, ``/ready`` says so, and the log says so once.
    """

    def __init__(self, buffer: Buffer[T], send: Send[T], *, name: str, log: Log, metrics: Metrics) -> None:
        """``name`` is who takes it, in words for the log and ``/ready``."""
        self._buffer = buffer
        self._send = send
        self._name = name
        self._log = log
        self._metrics = metrics
        self._told = 0
        self.failure = ""
        """Why nothing can be exported just now; empty when it can."""

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        """Export for as long as the context is open; on leaving, what still waits is sent, or given up in time."""
        exporting = asyncio.create_task(self._run(), name=f"export to {self._name}")
        exporting.add_done_callback(self._ended)
        try:
            yield
        finally:
            exporting.cancel()
            await asyncio.wait({exporting})
            await self.flush()

    async def flush(self) -> None:
        """Send what waits, or give it up in time; for the end of a service, and of what it does beyond serving."""
        with contextlib.suppress(TimeoutError):
            # In a task, so that the scene of whoever closes the service stays as it is.
            async with asyncio.timeout(FLUSH_SECONDS):
                await asyncio.create_task(self._last())
        self._count_dropped()
        if len(self._buffer):
            self._log.warning("spans.lost", to=self._name, count=len(self._buffer))

    async def checkup(self) -> Dependency:
        """Say for ``/ready`` whether what waits is taken; without that the work goes on all the same."""
        return Dependency(ok=not self.failure, detail=self.failure, required=False)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.failure = f"The export to {self._name} has ended; the log says why."
            self._log.error("spans.crashed", to=self._name, error=error)

    async def _run(self) -> None:
        _leave_no_trace()
        pause = EXPORT_SECONDS
        while True:
            await self._buffer.news.wait()
            await asyncio.sleep(pause)
            pause = EXPORT_SECONDS if await self._export() else min(2 * pause, LONGEST_PAUSE)

    async def _last(self) -> None:
        _leave_no_trace()
        await self._export()

    async def _export(self) -> bool:
        """Send all that waits; say whether it was taken."""
        while batch := self._buffer.take(MAX_BATCH):
            try:
                await self._send(batch)
            except OctoError as error:
                self._refused(batch, error)
                return False
            except BaseException:
                self._buffer.give_back(batch)
                raise
            self._metrics.spans.labels(self._name, "exported").inc(len(batch))
            if self.failure:
                self.failure = ""
                self._log.info("spans.exported_again", to=self._name)
        self._count_dropped()
        return True

    def _refused(self, batch: list[T], error: OctoError) -> None:
        if problem_of(error).retryable or error.code == "deadline_exceeded":
            self._buffer.give_back(batch)
        else:
            # The same batch again would be refused again.
            self._buffer.dropped += len(batch)
        self._count_dropped()
        if not self.failure:
            self._log.warning("spans.not_exported", to=self._name, error=error)
        self.failure = f"Spans are not taken by {self._name}: {error.detail}"

    def _count_dropped(self) -> None:
        fresh, self._told = self._buffer.dropped - self._told, self._buffer.dropped
        if fresh:
            self._metrics.spans.labels(self._name, "dropped").inc(fresh)


def to_monitor(caller: Caller, signer: SelfSigner, clock: Clock) -> Send[Span]:
    """Return what hands spans to the monitor, in the name of the service itself."""
    # The monitor takes a span once, so a batch may be sent again.
    target = Target("monitor", "traces.receive", "POST", "/v1/traces", "read_only")

    async def send(spans: list[Span]) -> None:
        body = encode_spans(spans, __version__)
        call = Outgoing(target, signer.svc_token("monitor"), Deadline.after(clock, SEND_SECONDS), body)
        await caller.send(call)

    return send


def _leave_no_trace() -> None:
    """Set a scene whose calls leave no spans: the export of spans would never come to an end."""
    set_scene(Scene(current_scene().service, trace=new_trace()))
