"""Change hints for one task. A hint says where to look; the data itself is in SQL and in the token stream."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from types import TracebackType

from octollm.concurrency import BackgroundTask
from octollm.errors import OctoError
from octollm.storage.keys import RedisKeys
from octollm.storage.redis_protocol import PubSub, PubSubMessage, RedisClient
from octollm.storage.text_stream import TEXT_HINT

FALLBACK_POLL_SECONDS = 1.0
"""A watcher looks by itself as often, so a lost hint costs no more than that."""
BACKOFF_FIRST, BACKOFF_MOST = 0.1, 5.0
IDLE_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Hint:
    """What may be new since the last hint: ``events`` of the task, ``text`` of its steps. Both when the timer ran."""

    events: bool
    text: bool


class TaskSubscription:
    """The hints on one task, while its ``async with`` lasts; an async iterator that never ends by itself.

    Hints that come while the watcher is busy become one. The first comes at once, so that a watcher reads what
    is there, and another when the subscription is in effect, so that nothing slips through in between.
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
        """Begin to watch."""
        await self._hub.add(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop watching."""
        await self._hub.remove(self)

    def notify(self, *, events: bool, text: bool) -> None:
        """Note that there may be news."""
        self._events |= events
        self._text |= text
        self._wakeup.set()

    def __aiter__(self) -> TaskSubscription:
        """Return itself."""
        return self

    async def __anext__(self) -> Hint:
        """Return a hint, at the latest when the timer runs out. Raises what the hub died of."""
        self._hub.check()
        try:
            async with asyncio.timeout(self._poll_seconds):
                await self._wakeup.wait()
        except TimeoutError:
            return Hint(events=True, text=True)
        self._hub.check()
        hint = Hint(self._events, self._text)
        self._events = self._text = False
        self._wakeup.clear()
        return hint


class TaskWatchHub:
    """Watches any number of tasks over one connection to Redis. Used in ``async with``, one a process.

    Without Redis the timers go on, and :attr:`degraded` says why there is nothing else.
    """

    def __init__(self, redis: RedisClient, keys: RedisKeys, *, poll_seconds: float = FALLBACK_POLL_SECONDS) -> None:
        self._redis = redis
        self._keys = keys
        self._poll_seconds = poll_seconds
        self._subscriptions: dict[str, set[TaskSubscription]] = {}
        self._confirmed: set[str] = set()
        self._pubsub: PubSub | None = None
        self._send_lock = asyncio.Lock()
        self._background = BackgroundTask("task-watch")
        self._idle_channel = keys.watch("-")  # no task's: a connection that listens to nothing cannot be read
        self.degraded: str | None = None

    async def __aenter__(self) -> TaskWatchHub:
        """Start to listen. Redis need not be there yet."""
        self._background.start(self._listen(), on_end=self._notify_all)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop to listen."""
        await self._background.stop()

    def subscribe(self, task_id: str) -> TaskSubscription:
        """Return the hints on one task: ``async with hub.watch(id) as hints: async for hint in hints: …``."""
        return TaskSubscription(self, task_id, self._poll_seconds)

    def is_listening(self, task_id: str) -> bool:
        """Return whether Redis has confirmed that hints on the task come, and the connection still stands."""
        return self._keys.watch(task_id) in self._confirmed

    def check(self) -> None:
        """Raise what the listener died of."""
        self._background.raise_if_failed()

    async def add(self, subscription: TaskSubscription) -> None:
        """Begin to listen for ``watch``. For :class:`Watch` alone."""
        channel = self._keys.watch(subscription.task_id)
        first = channel not in self._subscriptions
        self._subscriptions.setdefault(channel, set()).add(subscription)
        if first:
            await self._update_channel(channel, subscribe=True)

    async def remove(self, subscription: TaskSubscription) -> None:
        """Stop listening for ``watch``. For :class:`Watch` alone."""
        channel = self._keys.watch(subscription.task_id)
        watches = self._subscriptions.get(channel, set())
        watches.discard(subscription)
        if not watches and self._subscriptions.pop(channel, None) is not None:
            self._confirmed.discard(channel)
            await self._update_channel(channel, subscribe=False)

    async def _update_channel(self, channel: str, *, subscribe: bool) -> None:
        async with self._send_lock:
            # Others may have come or gone while this one waited; what counts is what is wanted now.
            if self._pubsub is None or (channel in self._subscriptions) is not subscribe:
                return
            try:
                if subscribe:
                    await self._pubsub.subscribe(channel)
                else:
                    await self._pubsub.unsubscribe(channel)
            except OctoError:
                # The connection is broken: the listener finds that too, and subscribes anew.
                self._pubsub = None

    async def _listen(self) -> None:
        pause = BACKOFF_FIRST
        while True:
            pubsub = self._redis.pubsub()
            try:
                async with self._send_lock:
                    await pubsub.subscribe(self._idle_channel, *self._subscriptions)
                    self._pubsub = pubsub
                while True:
                    message = await pubsub.receive(IDLE_SECONDS)
                    self.degraded, pause = None, BACKOFF_FIRST
                    if message is not None:
                        self._on_message(message)
            except OctoError as error:
                self.degraded = error.detail
            finally:
                self._pubsub = None
                self._confirmed.clear()
                await _close(pubsub)
            await asyncio.sleep(pause)
            pause = min(pause * 2, BACKOFF_MOST)

    def _on_message(self, message: PubSubMessage) -> None:
        if message.subscribed and message.name in self._subscriptions:
            self._confirmed.add(message.name)
        text = message.subscribed or message.data == TEXT_HINT
        events = message.subscribed or not text
        for watch in self._subscriptions.get(message.name, ()):
            watch.notify(events=events, text=text)

    def _notify_all(self) -> None:
        for watches in self._subscriptions.values():
            for watch in watches:
                watch.notify(events=True, text=True)


async def _close(pubsub: PubSub) -> None:
    try:
        await pubsub.close()
    except OctoError:
        return  # it was broken, which is why it is closed
