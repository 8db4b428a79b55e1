"""Change hints for one task, over one shared Redis connection per process.

A hint says where to look; the data itself is in SQL and in the token stream. A lost hint therefore costs only the
interval of the fallback poll.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from types import TracebackType

from octollm.concurrency import BackgroundLoop
from octollm.errors import OctoError
from octollm.events.bus import RECEIVE_SECONDS, RECONNECT_BACKOFF, close_pubsub
from octollm.storage.keys import RedisKeys
from octollm.storage.redis_protocol import PubSub, PubSubMessage, RedisClient
from octollm.storage.text_stream import TEXT_HINT

FALLBACK_POLL_SECONDS = 1.0
"""Seconds after which a subscription yields a hint by itself, in case one was lost."""


@dataclass(frozen=True, slots=True)
class Hint:
    """What may have changed since the last hint: ``events`` of the task, ``text`` of its steps; both after a poll."""

    events: bool
    text: bool


class TaskSubscription:
    """Endless async iterator over the hints on one task, within ``async with``.

    Hints that arrive while the consumer is busy are merged. The first hint comes at once so that the consumer reads
    the current state, and another when Redis confirms the subscription, which closes the window in between.
    """

    def __init__(self, hub: TaskWatchHub, task_id: str, poll_seconds: float) -> None:
        self._hub = hub
        self.task_id = task_id
        self._poll_seconds = poll_seconds
        self._wakeup = asyncio.Event()
        self._events = True
        self._text = True
        self._wakeup.set()

    async def __aenter__(self) -> TaskSubscription:
        """Register with the hub."""
        await self._hub.add(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the hub."""
        await self._hub.remove(self)

    def notify(self, *, events: bool, text: bool) -> None:
        """Record that events or text may have changed, and wake the consumer."""
        self._events |= events
        self._text |= text
        self._wakeup.set()

    def __aiter__(self) -> TaskSubscription:
        """Return itself."""
        return self

    async def __anext__(self) -> Hint:
        """Return the next hint, after the poll interval at the latest. Raises the exception that ended the hub."""
        self._hub.check()
        try:
            async with asyncio.timeout(self._poll_seconds):
                await self._wakeup.wait()
        except TimeoutError:
            return Hint(events=True, text=True)
        # The wake-up may come from the listener's crash (`_notify_all`).
        self._hub.check()
        hint = Hint(self._events, self._text)
        self._events = self._text = False
        self._wakeup.clear()
        return hint


class TaskWatchHub:
    """Watches any number of tasks over one Redis connection, within ``async with``; one per process.

    Without Redis the fallback polls continue, and :attr:`degraded` says why hints are missing.
    """

    def __init__(self, redis: RedisClient, keys: RedisKeys, *, poll_seconds: float = FALLBACK_POLL_SECONDS) -> None:
        self._redis = redis
        self._keys = keys
        self._poll_seconds = poll_seconds
        self._subscriptions: dict[str, set[TaskSubscription]] = {}
        self._confirmed: set[str] = set()
        self._pubsub: PubSub | None = None
        self._send_lock = asyncio.Lock()
        self._listener = BackgroundLoop(
            "task watch", self._listen, backoff=RECONNECT_BACKOFF, on_crash=lambda _error: self._notify_all()
        )
        self._idle_channel = keys.watch("-")  # of no task: Redis has no reads on a connection without a subscription

    @property
    def degraded(self) -> str | None:
        """Return why no hints arrive now; ``None`` while they do."""
        return self._listener.failure or None

    async def __aenter__(self) -> TaskWatchHub:
        """Start the listener. Redis need not be up yet."""
        self._listener.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the listener and close its connection."""
        await self._listener.aclose()
        self._listener.raise_if_crashed()

    def subscribe(self, task_id: str) -> TaskSubscription:
        """Return the hints on one task: ``async with hub.subscribe(id) as hints: async for hint in hints: …``."""
        return TaskSubscription(self, task_id, self._poll_seconds)

    def is_listening(self, task_id: str) -> bool:
        """Return whether Redis has confirmed the task's channel and the connection still stands."""
        return self._keys.watch(task_id) in self._confirmed

    def check(self) -> None:
        """Raise the exception that ended the listener, if any."""
        self._listener.raise_if_crashed()

    async def add(self, subscription: TaskSubscription) -> None:
        """Add a subscription. Called by :class:`TaskSubscription` only."""
        channel = self._keys.watch(subscription.task_id)
        first = channel not in self._subscriptions
        # Added before the SUBSCRIBE, so that a listener that reconnects in the meantime includes this channel.
        self._subscriptions.setdefault(channel, set()).add(subscription)
        if first:
            await self._update_channel(channel, subscribe=True)

    async def remove(self, subscription: TaskSubscription) -> None:
        """Remove a subscription. Called by :class:`TaskSubscription` only."""
        channel = self._keys.watch(subscription.task_id)
        subscriptions = self._subscriptions.get(channel, set())
        subscriptions.discard(subscription)
        if not subscriptions and self._subscriptions.pop(channel, None) is not None:
            self._confirmed.discard(channel)
            await self._update_channel(channel, subscribe=False)

    async def _update_channel(self, channel: str, *, subscribe: bool) -> None:
        async with self._send_lock:
            # Other subscriptions may have been added or removed while this one waited for the lock, so the present
            # state decides whether there is still something to do.
            if self._pubsub is None or (channel in self._subscriptions) is not subscribe:
                return
            try:
                if subscribe:
                    await self._pubsub.subscribe(channel)
                else:
                    await self._pubsub.unsubscribe(channel)
            except OctoError:
                # The connection is broken; the listener notices it as well, and subscribes again.
                self._pubsub = None

    async def _listen(self) -> None:
        pubsub = self._redis.pubsub()
        try:
            # Under the lock: a channel that is added meanwhile waits, and is then sent on this connection.
            async with self._send_lock:
                await pubsub.subscribe(self._idle_channel, *self._subscriptions)
                self._pubsub = pubsub
            while True:
                message = await pubsub.receive(RECEIVE_SECONDS)
                self._listener.report_success()
                if message is not None:
                    self._on_message(message)
        finally:
            self._pubsub = None
            self._confirmed.clear()
            await close_pubsub(pubsub)

    def _on_message(self, message: PubSubMessage) -> None:
        if message.subscribed and message.name in self._subscriptions:
            self._confirmed.add(message.name)
        # A confirmation counts as a hint for both, because changes before it were not announced on this connection.
        text = message.subscribed or message.data == TEXT_HINT
        events = message.subscribed or not text
        for subscription in self._subscriptions.get(message.name, ()):
            subscription.notify(events=events, text=text)

    def _notify_all(self) -> None:
        for subscriptions in self._subscriptions.values():
            for subscription in subscriptions:
                subscription.notify(events=True, text=True)
