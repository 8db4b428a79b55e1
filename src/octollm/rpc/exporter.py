"""A background batch exporter over a bounded buffer.

It sends spans to the monitor or to an OpenTelemetry collector, and never delays the work that the spans describe.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Generic, TypeVar

from octollm import __version__
from octollm.capability import ServiceTokenSigner
from octollm.clock import Clock
from octollm.concurrency import BackgroundLoop
from octollm.context import RequestContext, current_context, set_context, start_trace
from octollm.contracts.problems import to_problem
from octollm.contracts.service_operations import RECEIVE_SPANS
from octollm.errors import OctoError
from octollm.resilience import Backoff, Deadline
from octollm.rpc.client import CallTarget, OutgoingCall, ServiceClient
from octollm.telemetry import ExportBuffer, Logger, Metrics, Span
from octollm.telemetry.otlp import encode_spans

T = TypeVar("T")
SendBatch = Callable[[list[T]], Awaitable[None]]
"""Sends a batch. Raises an ``OctoError``; the batch is kept if that is retryable."""

EXPORT_SECONDS = 0.5
"""How long the first item of a batch waits for others."""
MAX_BATCH = 512
SEND_SECONDS = 5.0
LONGEST_PAUSE = 30.0
"""Longest pause between two attempts while the receiver is away."""
FLUSH_SECONDS = 0.5
"""How long the last batch may take when the service stops."""


class BatchExporter(Generic[T]):
    """Sends the items of a buffer in batches.

    While the receiver is away, the buffer keeps the newest items, ``/ready`` reports it, and one line is logged.
    """

    def __init__(
        self, buffer: ExportBuffer[T], send: SendBatch[T], *, name: str, log: Logger, metrics: Metrics
    ) -> None:
        """``name`` is the receiver, for the log and ``/ready``."""
        self._buffer = buffer
        self._send = send
        self._name = name
        self._log = log
        self._metrics = metrics
        self._dropped_counted = 0
        self._loop = BackgroundLoop(
            f"export to {name}", self._export_batch, backoff=Backoff(EXPORT_SECONDS, LONGEST_PAUSE), log=log
        )
        self.check_readiness = self._loop.check_health

    @property
    def failure(self) -> str:
        """Return why the last export failed; empty after one that succeeded."""
        return self._loop.failure

    @contextlib.asynccontextmanager
    async def run(self) -> AsyncGenerator[None]:
        """Export while the context is open; leaving it flushes the buffer."""
        try:
            async with self._loop:
                yield
        finally:
            await self.flush()

    async def flush(self) -> None:
        """Send the buffered items, or log how many are lost after half a second."""
        with contextlib.suppress(TimeoutError, OctoError):
            # In a task of its own: _disable_tracing must not change the context of the caller.
            async with asyncio.timeout(FLUSH_SECONDS):
                await asyncio.create_task(self._export_rest())
        self._count_dropped()
        if len(self._buffer):
            self._log.warning("spans.lost", to=self._name, count=len(self._buffer))

    async def _export_batch(self) -> None:
        _disable_tracing()
        await self._buffer.has_items.wait()
        await asyncio.sleep(EXPORT_SECONDS)  # the first item of a batch waits for others
        await self._export()

    async def _export_rest(self) -> None:
        _disable_tracing()
        await self._export()

    async def _export(self) -> None:
        """Send every buffered batch. Raises ``OctoError`` when one is not accepted."""
        while batch := self._buffer.take(MAX_BATCH):
            try:
                await self._send(batch)
            except OctoError as error:
                self._handle_rejected(batch, error)
                raise OctoError(f"{self._name} does not accept spans: {error.detail}", code=error.code) from error
            except BaseException:
                # Cancelled while it was sent: the flush sends it again, and the monitor stores a repeated span once.
                self._buffer.requeue(batch)
                raise
            self._metrics.spans.labels(self._name, "exported").inc(len(batch))
        self._count_dropped()

    def _handle_rejected(self, batch: list[T], error: OctoError) -> None:
        if to_problem(error).retryable or error.code == "deadline_exceeded":
            self._buffer.requeue(batch)
        else:
            # Sent again, the same batch would be refused again.
            self._buffer.dropped += len(batch)
        self._count_dropped()

    def _count_dropped(self) -> None:
        uncounted, self._dropped_counted = self._buffer.dropped - self._dropped_counted, self._buffer.dropped
        if uncounted:
            self._metrics.spans.labels(self._name, "dropped").inc(uncounted)


def create_monitor_sender(client: ServiceClient, signer: ServiceTokenSigner, clock: Clock) -> SendBatch[Span]:
    """Return a sender of spans to the monitor, authenticated as the service itself."""
    target = CallTarget.of(RECEIVE_SPANS)

    async def send(spans: list[Span]) -> None:
        body = encode_spans(spans, __version__)
        call = OutgoingCall(target, signer.sign_token("monitor"), Deadline.after(clock, SEND_SECONDS), body)
        await client.send(call)

    return send


def _disable_tracing() -> None:
    """Set an unsampled trace: exporting the spans of the export itself would never end."""
    set_context(RequestContext(current_context().service, trace=start_trace()))
