"""Sends a service's own events to the orchestrator, which stores or publishes them. Best effort, in order.

An event waits here, in memory, until the orchestrator has accepted it: one that still waits when the process ends is
lost. What must not be lost is stored by the orchestrator itself, in the transaction of its change.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping

import msgspec

from octollm.capability import ServiceTokenSigner
from octollm.clock import Clock, IdGenerator, format_rfc3339
from octollm.concurrency import BackgroundLoop
from octollm.contracts.events import EVENT_CATALOGUE, Event
from octollm.contracts.internal_operations import POST_EVENT
from octollm.contracts.problems import to_problem
from octollm.errors import OctoError
from octollm.resilience import Backoff, Deadline, Ejection, Recovery
from octollm.rpc.client import CallTarget, OutgoingCall, ServiceClient
from octollm.telemetry import ExportBuffer, Logger, Metrics

SYSTEM_TENANT = "system"
"""The owner of events that belong to no tenant."""
MAX_BUFFERED = 256
SEND_SECONDS = 5.0
SEND_BACKOFF = Backoff(0.5, 30.0)
"""Pauses while the orchestrator is away."""
FLUSH_SECONDS = 0.5
"""How long the last events may take when the service stops."""

DeliverEvent = Callable[[Event], Awaitable[None]]
"""Hands over one event. Raises an ``OctoError``; the event is kept if that is retryable."""


class EventSender:
    """The events of one service. ``instance`` tells its processes apart."""

    def __init__(self, service: str, clock: Clock, ids: IdGenerator, *, log: Logger, metrics: Metrics) -> None:
        self.deliver: DeliverEvent | None = None
        """How events leave. ``None`` in a service without an orchestrator: its events go nowhere. The orchestrator
        stores its own instead of sending them."""
        self.instance = ids.hex()
        self._service = service
        self._clock = clock
        self._ids = ids
        self._log = log
        self._metrics = metrics
        self._buffer = ExportBuffer[Event](MAX_BUFFERED)
        self._dropped_counted = 0
        self._loop = BackgroundLoop(
            "event sending", self._send_waiting, backoff=SEND_BACKOFF, log=log, log_after=SEND_SECONDS
        )

    def emit(
        self, event_type: str, data: Mapping[str, object], *, tenant: str = SYSTEM_TENANT, subject: str = ""
    ) -> None:
        """Queue an event; the oldest is dropped when :data:`MAX_BUFFERED` wait.

        ``subject`` is the service by default. Raises ``ValueError`` for an event that the catalogue does not let this
        service emit.
        """
        kind = EVENT_CATALOGUE.get(event_type)
        if kind is None or not (kind.may_be_posted_by(self._service) or self._service in kind.producers):
            raise ValueError(f"{self._service} is not declared as a producer of the event {event_type!r}.")
        if self.deliver is None:
            return
        event = Event(
            event_type=event_type,
            timestamp=format_rfc3339(self._clock.now()),
            source=self._service,
            data=dict(data),
            id=self._ids.hex(),
            tenant=tenant,
            subject=subject or f"service/{self._service}",
        )
        self._buffer.put(event)

    def emit_lifecycle(self, event_type: str, **further: object) -> None:
        """Queue an event of the family ``system`` about this process."""
        self.emit(event_type, {"service": self._service, "instance": self.instance, **further})

    def record_breaker(self, target: str, change: Ejection | Recovery) -> None:
        """Queue the event of a circuit breaker that opened or closed; one that stays open after a probe has none."""
        breaker = {"service": target, "instance": change.url}
        if isinstance(change, Recovery):
            self.emit("breaker.closed", breaker)
        elif not change.reopened:
            self.emit("breaker.opened", {**breaker, "reason": change.reason, "seconds": change.seconds})

    @contextlib.asynccontextmanager
    async def run(self) -> AsyncGenerator[None]:
        """Send while the context is open; leaving it tries once to send what waits, for half a second."""
        try:
            async with self._loop:
                yield
        finally:
            with contextlib.suppress(TimeoutError, OctoError):
                async with asyncio.timeout(FLUSH_SECONDS):
                    await self._send_all()
            if len(self._buffer):
                self._log.info("events.lost", count=len(self._buffer))
                self._metrics.sent_events.labels(self._service, "dropped").inc(len(self._buffer))

    async def _send_waiting(self) -> None:
        await self._buffer.has_items.wait()
        await self._send_all()

    async def _send_all(self) -> None:
        self._count_dropped()
        while self.deliver is not None and (batch := self._buffer.take(1)):
            try:
                await self.deliver(batch[0])
            except OctoError as error:
                if to_problem(error).retryable or error.code == "deadline_exceeded":
                    self._buffer.requeue(batch)
                    raise
                # Sent again, the same event would be refused again.
                self._log.warning("event.refused", event_type=batch[0].event_type, error=error)
                self._buffer.dropped += 1
                self._count_dropped()
            except BaseException:
                # Cancelled while it was sent: the orchestrator recognises a repeated id of a stored event.
                self._buffer.requeue(batch)
                raise
            else:
                self._metrics.sent_events.labels(self._service, "sent").inc()

    def _count_dropped(self) -> None:
        uncounted, self._dropped_counted = self._buffer.dropped - self._dropped_counted, self._buffer.dropped
        if uncounted:
            self._metrics.sent_events.labels(self._service, "dropped").inc(uncounted)


def create_orchestrator_delivery(client: ServiceClient, signer: ServiceTokenSigner, clock: Clock) -> DeliverEvent:
    """Return a function that posts an event to the orchestrator, authenticated as the service itself."""
    target = CallTarget.of(POST_EVENT)

    async def deliver(event: Event) -> None:
        token = signer.sign_token("orchestrator")
        await client.send(OutgoingCall(target, token, Deadline.after(clock, SEND_SECONDS), msgspec.json.encode(event)))

    return deliver
