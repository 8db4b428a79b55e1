"""Durable subscriptions over HTTP: definitions, deliveries by long poll or SSE, acknowledgements, dead letters."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator
from dataclasses import dataclass, field

from sqlalchemy.engine import RowMapping
from starlette.responses import StreamingResponse

from octollm.clock import Clock
from octollm.concurrency import BackgroundLoop, LoopLogger, wait_for_event
from octollm.config import Settings
from octollm.contracts import event_operations
from octollm.contracts.api import Acknowledgement
from octollm.contracts.observability import DependencyStatus
from octollm.contracts.subscriptions import (
    SUBSCRIPTION_NAME,
    AckRequest,
    DeadLetterList,
    DeadLetterQuery,
    Delivery,
    DeliveryBatch,
    DeliveryQuery,
    Lag,
    ReplayRequest,
    ReplayResult,
    SubscriptionList,
    SubscriptionRequest,
    SubscriptionSpec,
    SubscriptionView,
)
from octollm.errors import FieldError, OctoError
from octollm.events import AckHints, DurableSubscriptions, EventLog, LogTail
from octollm.framing import KEEPALIVE_COMMENT, encode_sse
from octollm.limiter import ConcurrencyLimiter, ConcurrencyPolicy
from octollm.rpc.call import IncomingCall, Operation, implement
from octollm.rpc.health import ReadinessCheck
from octollm.rpc.service import ServiceBase
from octollm.services.orchestrator.event_sink import EventSink, open_event_sink
from octollm.storage import Database, RedisClient, RedisKeys
from octollm.telemetry import Metrics

MAX_WAITING = 1000
"""Polls and streams that are open at one replica."""
POLL_SECONDS = 1.0
"""A waiting poll looks again after this time, in case no batch was announced."""
PING_SECONDS = 15.0
WATCH_SECONDS = 5.0
"""Interval at which lag is measured for metrics and ``/ready``."""
LAG_WARNING_SECONDS = 300.0
"""A subscription that is behind by more shows in ``/ready``."""


class SubscriptionMonitor:
    """Measures the lag of every subscription for ``/metrics`` and ``/ready``."""

    def __init__(self, durable: DurableSubscriptions, metrics: Metrics, logger: LoopLogger) -> None:
        self._durable = durable
        self._metrics = metrics
        self._lags: list[tuple[str, str, Lag]] = []
        self.loop = BackgroundLoop("subscription lag", self._measure, interval=WATCH_SECONDS, log=logger)

    async def _measure(self) -> None:
        self._lags = await self._durable.subscriptions.list_lags()
        metrics = self._metrics
        gauges = (
            metrics.subscription_lag_positions,
            metrics.subscription_lag_seconds,
            metrics.subscription_dead_letters,
        )
        for gauge in gauges:
            gauge.clear()  # of those that were deleted
        for tenant, name, lag in self._lags:
            for gauge, value in zip(gauges, (lag.positions, lag.seconds, lag.dead), strict=True):
                gauge.labels(tenant, name).set(value)

    async def check_health(self) -> DependencyStatus:
        """Return which subscriptions are far behind or hold subjects. It is never required."""
        if self.loop.failure:
            return await self.loop.check_health()
        behind = [
            f"{name} of {tenant}: {lag.positions} positions, {lag.seconds:.0f} s"
            + (f", {lag.held} subjects held" if lag.held else "")
            for tenant, name, lag in self._lags
            if lag.seconds > LAG_WARNING_SECONDS or lag.held
        ]
        detail = f"{len(behind)} subscriptions are behind: {'; '.join(behind[:5])}" if behind else ""
        return DependencyStatus(ok=not behind, detail=detail, required=False)


def create_poll_limiter() -> ConcurrencyLimiter:
    """Return the limiter of open polls. It has no queue: a consumer tries again by itself."""
    return ConcurrencyLimiter("The orchestrator", ConcurrencyPolicy(MAX_WAITING, max_queued=0, max_wait=0.0))


@dataclass(slots=True)
class SubscriptionsApi:
    """The operations on durable subscriptions and dead letters. Another tenant's do not exist."""

    durable: DurableSubscriptions
    clock: Clock
    draining: asyncio.Event
    monitor: SubscriptionMonitor
    acks: AckHints
    sink: EventSink | None = None
    _limiter: ConcurrencyLimiter = field(default_factory=create_poll_limiter)

    async def list(self, call: IncomingCall, _body: object) -> SubscriptionList:
        """Return the tenant's subscriptions, and the lag of the event sink."""
        views = await self.durable.subscriptions.list_views(call.tenant)
        return SubscriptionList(tuple(views), None if self.sink is None else await self.sink.view())

    async def read(self, call: IncomingCall, _body: object) -> SubscriptionView:
        """Return one subscription."""
        return await self._view(call.tenant, call.path["name"])

    async def _view(self, tenant: str, name: str) -> SubscriptionView:
        (view,) = await self.durable.subscriptions.list_views(tenant, name)
        return view

    async def put(self, call: IncomingCall, body: SubscriptionRequest) -> SubscriptionView:
        """Create or change a subscription of the tenant's events."""
        name = call.path["name"]
        if not re.fullmatch(SUBSCRIPTION_NAME, name):
            raise OctoError(
                "A subscription's name is 1 to 64 characters of a-z, 0-9, dot, underscore and hyphen.",
                code="invalid_parameter",
                field_errors=[FieldError("/name", "is no name of a subscription")],
            )
        members = {member: getattr(body, member) for member in SubscriptionSpec.__struct_fields__}
        spec = SubscriptionSpec(**members)
        await self.durable.subscriptions.put(call.tenant, name, spec, event_tenant=call.tenant, start=body.start)
        return await self._view(call.tenant, name)

    async def delete(self, call: IncomingCall, _body: object) -> Acknowledgement:
        """Delete a subscription."""
        await self.durable.subscriptions.delete(call.tenant, call.path["name"])
        return Acknowledgement()

    async def replay(self, call: IncomingCall, body: ReplayRequest) -> ReplayResult:
        """Set a subscription back, or forward."""
        after = await self.durable.subscriptions.replay(
            call.tenant, call.path["name"], after=body.after, time=body.time
        )
        return ReplayResult(after)

    async def acknowledge(self, call: IncomingCall, body: AckRequest) -> Acknowledgement:
        """Record the outcome of deliveries."""
        row = await self.durable.subscriptions.find(call.tenant, call.path["name"])
        await self.durable.pull.acknowledge(row, body.consumer, body.acked, body.failed)
        self.acks.announce(str(row["id"]))
        return Acknowledgement()

    async def deliver(self, call: IncomingCall, _body: object) -> object:
        """Return deliveries when there are some, or stream them for ``Accept: text/event-stream``."""
        query: DeliveryQuery = call.query
        row = await self.durable.subscriptions.find(call.tenant, call.path["name"])
        if "text/event-stream" in call.request.headers.get("accept", ""):
            # The first poll is made before the status is sent, so that its refusal is a problem document.
            first = await self.durable.pull.poll(str(row["id"]), query.consumer, query.limit)
            return StreamingResponse(
                self._stream(row, query, first),
                media_type="text/event-stream",
                headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
            )
        return DeliveryBatch(tuple(await self._wait_for_deliveries(row, query)))

    async def _wait_for_deliveries(self, row: RowMapping, query: DeliveryQuery) -> tuple[Delivery, ...]:
        end = self.clock.monotonic() + query.wait
        with self._waiting(str(row["id"])) as wakeup:
            while True:
                wakeup.clear()
                found = await self.durable.pull.poll(str(row["id"]), query.consumer, query.limit)
                remaining = end - self.clock.monotonic()
                if found or remaining <= 0 or self.draining.is_set():
                    return tuple(found)
                await wait_for_event(wakeup, min(POLL_SECONDS, remaining), clear=False)

    async def _stream(self, row: RowMapping, query: DeliveryQuery, found: list[Delivery]) -> AsyncIterator[bytes]:
        """Yield each delivery once. At most ``limit`` are on their way; the next follow as they are acknowledged."""
        sent: set[str] = set()
        last_sent = self.clock.monotonic()
        with self._waiting(str(row["id"])) as wakeup:
            yield b": following\n\n"
            while not self.draining.is_set():
                for delivery in found:
                    if delivery.ack_id not in sent:
                        yield encode_sse(delivery, event="delivery")
                        last_sent = self.clock.monotonic()
                # What is not open any more was acknowledged, or failed; a further attempt has an id of its own.
                sent = {delivery.ack_id for delivery in found}
                await wait_for_event(wakeup, POLL_SECONDS)
                if self.clock.monotonic() - last_sent >= PING_SECONDS:
                    last_sent = self.clock.monotonic()
                    yield KEEPALIVE_COMMENT
                try:
                    found = await self.durable.pull.poll(str(row["id"]), query.consumer, query.limit)
                except OctoError:
                    return  # The consumer reconnects, and gets the error as a response.

    @contextlib.contextmanager
    def _waiting(self, subscription_id: str) -> Generator[asyncio.Event]:
        """Yield an event that is set when the log or an acknowledgement may have made deliveries possible."""
        if not self._limiter.try_acquire():
            raise OctoError("Too many consumers wait here.", code="overloaded", retry_after=5)
        wakeup = asyncio.Event()
        remove_listener: Callable[[], None] = self.durable.tail.on_batch(wakeup.set)
        try:
            with self.acks.waiting(subscription_id, wakeup):
                yield wakeup
        finally:
            remove_listener()
            self._limiter.release()

    async def list_dead_letters(self, call: IncomingCall, _body: object) -> DeadLetterList:
        """Return a page of dead letters."""
        query: DeadLetterQuery = call.query
        found = await self.durable.subscriptions.list_dead_letters(
            call.tenant, subscription=query.subscription, after=query.after, limit=query.limit
        )
        return DeadLetterList(tuple(found), found[-1].id if found else query.after)

    async def retry_dead_letter(self, call: IncomingCall, _body: object) -> Acknowledgement:
        """Deliver a dead letter again."""
        await self.durable.subscriptions.retry_dead_letter(call.tenant, _letter_id(call))
        return Acknowledgement()

    async def drop_dead_letter(self, call: IncomingCall, _body: object) -> Acknowledgement:
        """Drop a dead letter."""
        await self.durable.subscriptions.drop_dead_letter(call.tenant, _letter_id(call))
        return Acknowledgement()

    def readiness_checks(self) -> dict[str, ReadinessCheck]:
        """Return what ``/ready`` says about the readers of the log."""
        checks: dict[str, ReadinessCheck] = {"subscriptions": self.monitor.check_health}
        return checks if self.sink is None else {**checks, "event_sink": self.sink.check_health}

    def operations(self) -> list[Operation]:
        """Return their declarations."""
        return [
            implement(event_operations.LIST_SUBSCRIPTIONS, self.list),
            implement(event_operations.READ_SUBSCRIPTION, self.read),
            implement(event_operations.PUT_SUBSCRIPTION, self.put),
            implement(event_operations.DELETE_SUBSCRIPTION, self.delete),
            implement(event_operations.READ_DELIVERIES, self.deliver),
            implement(event_operations.ACKNOWLEDGE_DELIVERIES, self.acknowledge),
            implement(event_operations.REPLAY_SUBSCRIPTION, self.replay),
            implement(event_operations.LIST_DEAD_LETTERS, self.list_dead_letters),
            implement(event_operations.RETRY_DEAD_LETTER, self.retry_dead_letter),
            implement(event_operations.DROP_DEAD_LETTER, self.drop_dead_letter),
        ]


def _letter_id(call: IncomingCall) -> int:
    text = call.path["letter_id"]
    if not re.fullmatch(r"[0-9]{1,15}", text):
        raise OctoError("There is no such dead letter.", code="dead_letter_not_found")
    return int(text)


@contextlib.asynccontextmanager
async def open_subscriptions(
    base: ServiceBase,
    settings: Settings,
    db: Database,
    log: EventLog,
    tail: LogTail,
    draining: asyncio.Event,
    channels: tuple[RedisClient, RedisKeys],
) -> AsyncGenerator[SubscriptionsApi]:
    """Measure lag, and feed the event sink, while the context is open; yield the operations."""
    durable = DurableSubscriptions.build(db, log, tail, base.clock, base.ids, base.log)
    monitor = SubscriptionMonitor(durable, base.metrics, base.log)
    async with (
        monitor.loop,
        AckHints(*channels, base.ids.hex()) as acks,
        open_event_sink(base, settings, db, log, tail) as sink,
    ):
        yield SubscriptionsApi(durable, base.clock, draining, monitor, acks, sink)
