"""Live subscriptions to published events, with gap detection, and publishing of events that are not durable."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

import msgspec

from octollm.clock import Clock, IdGenerator, format_rfc3339
from octollm.concurrency import BackgroundTask
from octollm.contracts.events import EVENT_CATALOGUE, Event, channel_of
from octollm.errors import OctoError
from octollm.events.log import validate_event
from octollm.storage.keys import RedisKeys
from octollm.storage.redis_protocol import PubSub, PubSubMessage, RedisClient

QUEUE_CAPACITY = 1000
"""Events kept for a subscriber that is busy."""
READY_SECONDS = 5.0
"""How long a new subscription waits until Redis has confirmed it."""
BACKOFF_FIRST, BACKOFF_MOST = 0.1, 5.0
IDLE_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Gap:
    """Events may have been missed since the position ``after`` (0: since the beginning); read them from the log.

    ``missed``: the next event of ``channel`` names a predecessor that did not come. ``reconnected``: the connection
    broke. ``overflow``: the subscriber was too slow for its queue. ``channel`` is empty where all are meant.
    """

    reason: Literal["missed", "reconnected", "overflow"]
    after: int
    channel: str = ""


class GapDetector:
    """Tells, event by event, what is new, what is a repetition, and where something is missing. No I/O."""

    def __init__(self) -> None:
        self.latest = 0
        """The highest ``seq`` seen."""
        self._channels: dict[str, int] = {}

    def observe(self, event: Event) -> tuple[bool, Gap | None]:
        """Return whether ``event`` is new, and the gap before it, if there is one.

        An event that is not durable is always new. The first event of a channel cannot show a gap.
        """
        if event.seq == 0:
            return True, None
        channel = channel_of(event.event_type)
        known = self._channels.get(channel)
        if known is not None and event.seq <= known:
            return False, None
        self._channels[channel] = event.seq
        self.latest = max(self.latest, event.seq)
        if known is not None and event.prev > known:
            return True, Gap("missed", known, channel)
        return True, None


class Subscription:
    """Events as they are published, from the moment ``async with`` is entered; an async iterator.

    What is published while the connection is broken, or while the queue is full, does not come: ``on_gap`` is called
    in its place, between the events before and after it. :attr:`gaps` counts them, :attr:`degraded` says why nothing
    comes now, :attr:`refused` counts messages that are no events. A slow subscriber slows nobody else.
    """

    def __init__(
        self,
        redis: RedisClient,
        patterns: tuple[str, ...],
        *,
        on_gap: Callable[[Gap], None] | None,
        capacity: int,
    ) -> None:
        self._redis = redis
        self._patterns = patterns
        self._on_gap = on_gap
        self._capacity = capacity
        self._items: deque[Event | Gap] = deque()
        self._overflow_gap: Gap | None = None
        self._last_queued = 0  # the highest position that went into the queue
        self._wakeup = asyncio.Event()
        self._ready = asyncio.Event()
        self._gap_detector = GapDetector()
        self._background = BackgroundTask("subscription")
        self.gaps = 0
        self.malformed = 0
        self.degraded: str | None = None

    async def __aenter__(self) -> Subscription:
        """Start to listen; returns once Redis has confirmed it. Raises ``unavailable`` after five seconds."""
        self._background.start(self._listen(), on_end=self._on_listener_end)
        try:
            async with asyncio.timeout(READY_SECONDS):
                await self._ready.wait()
            self._background.raise_if_failed()
        except BaseException as error:
            await self._background.stop()
            if isinstance(error, TimeoutError):
                raise OctoError(self.degraded or "Redis does not answer.", code="unavailable") from error
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop to listen."""
        await self._background.stop()

    def _on_listener_end(self) -> None:
        self._ready.set()
        self._wakeup.set()

    def __aiter__(self) -> Subscription:
        """Return itself."""
        return self

    async def __anext__(self) -> Event:
        """Return the next event, waiting for as long as it takes."""
        while True:
            item = await self._take()
            if isinstance(item, Event):
                return item
            self.gaps += 1
            if self._on_gap is not None:
                self._on_gap(item)

    async def _take(self) -> Event | Gap:
        while not self._items:
            if self._overflow_gap is not None:
                gap, self._overflow_gap = self._overflow_gap, None
                return gap
            self._background.raise_if_failed()
            self._wakeup.clear()
            await self._wakeup.wait()
        return self._items.popleft()

    def _put(self, item: Event | Gap) -> None:
        if self._overflow_gap is None and len(self._items) >= self._capacity:
            self._overflow_gap = Gap("overflow", self._last_queued)
        # Nothing more is kept until the queue has run empty: one gap then stands for all of it.
        if self._overflow_gap is None:
            self._items.append(item)
            if isinstance(item, Event):
                self._last_queued = max(self._last_queued, item.seq)
        self._wakeup.set()

    async def _listen(self) -> None:
        pause = BACKOFF_FIRST
        while True:
            pubsub = self._redis.pubsub()
            try:
                await self._subscribe(pubsub)
                pause = BACKOFF_FIRST
                while True:
                    message = await pubsub.receive(IDLE_SECONDS)
                    if message is not None and not message.subscribed:
                        self._on_message(message)
            except OctoError as error:
                self.degraded = error.detail
            finally:
                await _close(pubsub)
            await asyncio.sleep(pause)
            pause = min(pause * 2, BACKOFF_MOST)

    async def _subscribe(self, pubsub: PubSub) -> None:
        await pubsub.psubscribe(*self._patterns)
        waiting = set(self._patterns)
        while waiting:
            message = await pubsub.receive(READY_SECONDS)
            if message is None:
                raise OctoError("Redis does not confirm a subscription.", code="unavailable")
            if message.subscribed:
                waiting.discard(message.name)
            else:
                self._on_message(message)
        self.degraded = None
        if self._ready.is_set():
            self._put(Gap("reconnected", self._gap_detector.latest))
        self._ready.set()

    def _on_message(self, message: PubSubMessage) -> None:
        try:
            event = msgspec.json.decode(message.data, type=Event)
        except msgspec.MsgspecError:
            self.malformed += 1
            return
        if event.event_type not in EVENT_CATALOGUE:
            self.malformed += 1
            return
        new, gap = self._gap_detector.observe(event)
        if gap is not None:
            self._put(gap)
        if new:
            self._put(event)


async def _close(pubsub: PubSub) -> None:
    """Close a connection, broken or not."""
    try:
        await pubsub.close()
    except OctoError:
        return  # it was broken, which is why it is closed


class EventBus:
    """Publishes events that are not kept, and subscribes to all. Passed in, never global."""

    def __init__(self, redis: RedisClient, keys: RedisKeys, clock: Clock, ids: IdGenerator) -> None:
        self._redis = redis
        self._keys = keys
        self._clock = clock
        self._ids = ids

    def subscribe(
        self, *patterns: str, on_gap: Callable[[Gap], None] | None = None, capacity: int = QUEUE_CAPACITY
    ) -> Subscription:
        """Return a subscription to channels by glob pattern, e.g. ``events:task:*``. Use it in ``async with``."""
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
        """Publish an event that is not durable to those who listen now, and return it.

        Raises ``invalid_body`` for one that is not declared, or that is durable and so belongs in the log;
        ``unavailable`` when Redis does not answer: then nobody heard of it.
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
        await self._redis.publish([(self._keys.channel(channel_of(event_type)), msgspec.json.encode(event))])
        return event
