"""Event bus: live subscriptions with gap detection, and publishing of events that are not durable.

Redis Pub/Sub delivers at most once. Each durable event names its predecessor in the channel, so a subscriber detects
a gap by itself and can read the missing events from the log.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Literal, overload

import msgspec

from octollm.clock import Clock, IdGenerator, format_rfc3339
from octollm.contracts.events import EVENT_CATALOGUE, Event, channel_of, validate_event
from octollm.contracts.subscriptions import SubscriptionSpec
from octollm.errors import OctoError
from octollm.events.pubsub import PubSubListener
from octollm.storage.keys import RedisKeys
from octollm.storage.redis_protocol import PubSubMessage, RedisClient

if TYPE_CHECKING:
    from octollm.events.durable import DurableSubscription, DurableSubscriptions

QUEUE_CAPACITY = 1000
"""Events queued for a subscriber that is busy; later ones become one gap."""
READY_SECONDS = 5.0
"""Seconds that a new subscription waits for the confirmation of Redis."""


@dataclass(frozen=True, slots=True)
class Gap:
    """Events after the position ``after`` (0: the beginning) may be missing; read them from the log.

    ``missed``: the next event of ``channel`` names a predecessor that did not arrive. ``reconnected``: the connection
    broke. ``overflow``: the subscriber was too slow for its queue. An empty ``channel`` stands for every channel.
    """

    reason: Literal["missed", "reconnected", "overflow"]
    after: int
    channel: str = ""


class GapDetector:
    """Classifies each event as new or duplicate and detects missing predecessors. No I/O."""

    def __init__(self) -> None:
        self.latest = 0
        """The highest ``seq`` seen."""
        self._channels: dict[str, int] = {}

    def observe(self, event: Event) -> tuple[bool, Gap | None]:
        """Return whether ``event`` is new, and the gap before it, if any.

        An event that is not durable is always new. The first event of a channel cannot reveal a gap.
        """
        if event.seq == 0:
            return True, None
        # Per channel, because a subscriber has only some of them: `prev` links the events of one channel, while `seq`
        # counts those of all, so gaps in `seq` are normal.
        channel = channel_of(event.event_type)
        previous = self._channels.get(channel)
        # After a crash the publisher sends its last events again, with the same `seq`.
        if previous is not None and event.seq <= previous:
            return False, None
        self._channels[channel] = event.seq
        self.latest = max(self.latest, event.seq)
        if previous is not None and event.prev > previous:
            return True, Gap("missed", previous, channel)
        return True, None


class Subscription:
    """Async iterator over published events, from the moment ``async with`` is entered.

    Events published while the connection is broken or the queue is full are lost; ``on_gap`` is called in their place,
    in order. A slow subscriber does not slow the others.
    """

    def __init__(
        self,
        redis: RedisClient,
        patterns: tuple[str, ...],
        *,
        on_gap: Callable[[Gap], None] | None,
        capacity: int,
    ) -> None:
        self._on_gap = on_gap
        self._capacity = capacity
        self._items: deque[Event | Gap] = deque()
        self._overflow_gap: Gap | None = None
        self._last_queued = 0  # the highest ``seq`` in the queue so far
        self._wakeup = asyncio.Event()
        self._ready = asyncio.Event()
        self._gap_detector = GapDetector()
        self._listener = PubSubListener(
            "event subscription",
            redis,
            self._on_message,
            patterns=patterns,
            on_connected=self._on_connected,
            on_crash=self._on_crash,
        )
        self.gaps = 0
        """Gaps reported so far."""
        self.malformed = 0
        """Messages received that are not declared events."""

    @property
    def degraded(self) -> str | None:
        """Return why no events arrive now; ``None`` while they do."""
        return self._listener.degraded

    async def __aenter__(self) -> Subscription:
        """Subscribe and wait for the confirmation of Redis. Raises ``unavailable`` after five seconds."""
        await self._listener.__aenter__()
        try:
            async with asyncio.timeout(READY_SECONDS):
                await self._ready.wait()
            self._listener.raise_if_crashed()
        # Also on cancellation: `__aexit__` is not called, and the listener would keep its connection.
        except BaseException as error:
            await self._listener.aclose()
            if isinstance(error, TimeoutError):
                raise OctoError(self.degraded or "Redis does not answer.", code="unavailable") from error
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the subscription and close its connection."""
        await self._listener.__aexit__(kind, error, trace)

    def _on_crash(self) -> None:
        self._ready.set()
        self._wakeup.set()

    def __aiter__(self) -> Subscription:
        """Return itself."""
        return self

    async def __anext__(self) -> Event:
        """Return the next event; wait without a limit."""
        while True:
            item = await self._take()
            if isinstance(item, Event):
                return item
            self.gaps += 1
            if self._on_gap is not None:
                self._on_gap(item)

    async def _take(self) -> Event | Gap:
        while not self._items:
            # The gap follows what was queued before it, so that the subscriber gets both in order.
            if self._overflow_gap is not None:
                gap, self._overflow_gap = self._overflow_gap, None
                return gap
            self._listener.raise_if_crashed()
            self._wakeup.clear()
            await self._wakeup.wait()
        return self._items.popleft()

    def _put(self, item: Event | Gap) -> None:
        if self._overflow_gap is None and len(self._items) >= self._capacity:
            self._overflow_gap = Gap("overflow", self._last_queued)
        # The queue is bounded, so that a slow subscriber costs neither unbounded memory nor the others' time. Once it
        # overflows, everything is dropped until it is empty: a single gap then covers all of it, and the subscriber
        # reads the missing events from the log in one go rather than around scattered holes.
        if self._overflow_gap is None:
            self._items.append(item)
            if isinstance(item, Event):
                self._last_queued = max(self._last_queued, item.seq)
        self._wakeup.set()

    def _on_connected(self) -> None:
        # Not the first connection: what was published since the last one broke did not arrive.
        if self._ready.is_set():
            self._put(Gap("reconnected", self._gap_detector.latest))
        self._ready.set()

    def _on_message(self, message: PubSubMessage) -> None:
        if message.subscribed:
            return
        try:
            event = msgspec.json.decode(message.data, type=Event)
        except msgspec.MsgspecError:
            self.malformed += 1
            return
        if event.event_type not in EVENT_CATALOGUE:
            self.malformed += 1
            return
        is_new, gap = self._gap_detector.observe(event)
        if gap is not None:
            self._put(gap)
        if is_new:
            self._put(event)


class EventBus:
    """Publishes events that are not durable and subscribes to all events. Passed in, never global."""

    def __init__(
        self,
        redis: RedisClient,
        keys: RedisKeys,
        clock: Clock,
        ids: IdGenerator,
        durable: DurableSubscriptions | None = None,
    ) -> None:
        """Create a bus; ``durable`` opens durable subscriptions, and only the service that has the log has it."""
        self._redis = redis
        self._keys = keys
        self._clock = clock
        self._ids = ids
        self._durable = durable

    @overload
    def subscribe(
        self, *patterns: str, on_gap: Callable[[Gap], None] | None = None, capacity: int = QUEUE_CAPACITY
    ) -> Subscription: ...

    @overload
    def subscribe(
        self, *patterns: str, durable: str, tenant: str = "system", event_tenant: str | None = None
    ) -> DurableSubscription: ...

    def subscribe(
        self,
        *patterns: str,
        on_gap: Callable[[Gap], None] | None = None,
        capacity: int = QUEUE_CAPACITY,
        durable: str | None = None,
        tenant: str = "system",
        event_tenant: str | None = None,
    ) -> Subscription | DurableSubscription:
        """Return a subscription to channels by glob pattern, e.g. ``events:task:*``. Use it with ``async with``.

        Without ``durable`` it has what is published while it listens. ``durable`` is the name of a durable subscription
        of ``tenant``, which continues where it stopped; it has the events of every tenant, or of ``event_tenant``.
        Raises ``not_configured`` where this process has no log.
        """
        if durable is not None:
            if self._durable is None:
                raise OctoError("Only the orchestrator has the log; subscribe over HTTP.", code="not_configured")
            return self._durable.open(durable, SubscriptionSpec(patterns), tenant=tenant, event_tenant=event_tenant)
        names = tuple(self._keys.channel(pattern) for pattern in patterns)
        return Subscription(self._redis, names, on_gap=on_gap, capacity=capacity)

    async def publish(
        self,
        event_type: str,
        *,
        subject: str,
        tenant: str,
        source: str,
        data: dict[str, object],
        correlation_id: str = "",
        traceparent: str = "",
    ) -> Event:
        """Publish an event that is not durable to the current subscribers, and return it.

        Raises ``invalid_body`` for an event that is not declared or that is durable and belongs in the log;
        ``unavailable`` when Redis does not answer: then no subscriber received it.
        """
        if validate_event(event_type, data).durable:
            raise OctoError(f"The event {event_type!r} is durable; append it to the log.", code="invalid_body")
        event = Event(
            event_type=event_type,
            timestamp=format_rfc3339(self._clock.now()),
            source=source,
            data=data,
            id=self._ids.hex(),
            tenant=tenant,
            subject=subject,
            correlation_id=correlation_id,
            traceparent=traceparent,
        )
        await self.publish_event(event)
        return event

    async def publish_event(self, event: Event) -> None:
        """Publish an event that another service created and that was validated. Raises ``unavailable``."""
        await self._redis.publish([(self._keys.channel(channel_of(event.event_type)), msgspec.json.encode(event))])
