"""A background batch exporter over a bounded buffer: spans to the monitor, or to an OpenTelemetry collector."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Generic, TypeVar

from octollm import __version__
from octollm.capability import ServiceTokenSigner
from octollm.clock import Clock
from octollm.context import RequestContext, current_context, set_context, start_trace
from octollm.contracts.problems import to_problem
from octollm.errors import OctoError
from octollm.resilience import Deadline
from octollm.rpc.client import CallTarget, OutgoingCall, ServiceClient
from octollm.rpc.health import DependencyStatus
from octollm.telemetry import ExportBuffer, Logger, Metrics, Span
from octollm.telemetry.otlp import encode_spans

T = TypeVar("T")
SendBatch = Callable[[list[T]], Awaitable[None]]
"""Hands a batch over. Raises an ``OctoError``; a batch that it says may be sent again is kept."""

EXPORT_SECONDS = 0.5
"""How long the first of a batch waits for others."""
MAX_BATCH = 512
SEND_SECONDS = 5.0
LONGEST_PAUSE = 30.0
"""Between two tries while nobody takes anything."""
FLUSH_SECONDS = 0.5
"""How long the last batch may take when the service ends."""


class BatchExporter(Generic[T]):
    """Sends what is put into a buffer. It never holds up the work that is told of.

    While nobody takes it, the buffer keeps the newest, ``/ready`` says so, and the log says so once.
    """

    def __init__(
        self, buffer: ExportBuffer[T], send: SendBatch[T], *, name: str, log: Logger, metrics: Metrics
    ) -> None:
        """``name`` is who takes it, in words for the log and ``/ready``."""
        self._buffer = buffer
        self._send = send
        self._name = name
        self._log = log
        self._metrics = metrics
        self._dropped_counted = 0
        self.failure = ""
        """Why nothing can be exported just now; empty when it can."""

    @contextlib.asynccontextmanager
    async def run(self) -> AsyncGenerator[None]:
        """Export for as long as the context is open; on leaving, what still waits is sent, or given up in time."""
        exporting = asyncio.create_task(self._export_forever(), name=f"export to {self._name}")
        exporting.add_done_callback(self._on_task_done)
        try:
            yield
        finally:
            exporting.cancel()
            await asyncio.wait({exporting})
            await self.flush()

    async def flush(self) -> None:
        """Send what waits, or give it up in time; for the end of a service, and of what it does beyond serving."""
        with contextlib.suppress(TimeoutError):
            # In a task, so that the request context of whoever closes the service stays as it is.
            async with asyncio.timeout(FLUSH_SECONDS):
                await asyncio.create_task(self._export_rest())
        self._count_dropped()
        if len(self._buffer):
            self._log.warning("spans.lost", to=self._name, count=len(self._buffer))

    async def check_readiness(self) -> DependencyStatus:
        """Say for ``/ready`` whether what waits is taken; without that the work goes on all the same."""
        return DependencyStatus(ok=not self.failure, detail=self.failure, required=False)

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.failure = f"The export to {self._name} has ended; the log says why."
            self._log.error("spans.crashed", to=self._name, error=error)

    async def _export_forever(self) -> None:
        _disable_tracing()
        pause = EXPORT_SECONDS
        while True:
            await self._buffer.has_items.wait()
            await asyncio.sleep(pause)
            pause = EXPORT_SECONDS if await self._export() else min(2 * pause, LONGEST_PAUSE)

    async def _export_rest(self) -> None:
        _disable_tracing()
        await self._export()

    async def _export(self) -> bool:
        """Send all that waits; say whether it was taken."""
        while batch := self._buffer.take(MAX_BATCH):
            try:
                await self._send(batch)
            except OctoError as error:
                self._on_error(batch, error)
                return False
            except BaseException:
                self._buffer.requeue(batch)
                raise
            self._metrics.spans.labels(self._name, "exported").inc(len(batch))
            if self.failure:
                self.failure = ""
                self._log.info("spans.exported_again", to=self._name)
        self._count_dropped()
        return True

    def _on_error(self, batch: list[T], error: OctoError) -> None:
        if to_problem(error).retryable or error.code == "deadline_exceeded":
            self._buffer.requeue(batch)
        else:
            # The same batch again would be refused again.
            self._buffer.dropped += len(batch)
        self._count_dropped()
        if not self.failure:
            self._log.warning("spans.not_exported", to=self._name, error=error)
        self.failure = f"Spans are not taken by {self._name}: {error.detail}"

    def _count_dropped(self) -> None:
        fresh, self._dropped_counted = self._buffer.dropped - self._dropped_counted, self._buffer.dropped
        if fresh:
            self._metrics.spans.labels(self._name, "dropped").inc(fresh)


def create_monitor_sender(client: ServiceClient, signer: ServiceTokenSigner, clock: Clock) -> SendBatch[Span]:
    """Return what hands spans to the monitor, in the name of the service itself."""
    # The monitor takes a span once, so a batch may be sent again.
    target = CallTarget("monitor", "traces.receive", "POST", "/v1/traces", "read_only")

    async def send(spans: list[Span]) -> None:
        body = encode_spans(spans, __version__)
        call = OutgoingCall(target, signer.sign_token("monitor"), Deadline.after(clock, SEND_SECONDS), body)
        await client.send(call)

    return send


def _disable_tracing() -> None:
    """Set a request context whose calls leave no spans: the export of spans would never come to an end."""
    set_context(RequestContext(current_context().service, trace=start_trace()))
