"""Change hints for one task, over one shared Redis connection per process.

A hint says where to look; the data itself is in SQL and in the token stream. A lost hint therefore costs only the
interval of the fallback poll.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from octollm.events.pubsub import PubSubListener
from octollm.storage.keys import RedisKeys
from octollm.storage.redis_protocol import PubSubMessage, RedisClient
from octollm.storage.text_stream import TEXT_HINT

FALLBACK_POLL_SECONDS = 1.0
"""Seconds after which a subscription yields a hint by itself, while Redis delivers none."""
QUIET_POLL_SECONDS = 15.0
"""The same while Redis delivers hints: they are lost with the connection only, and a new one yields a hint, too."""


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

    def __init__(self, hub: TaskWatchHub, task_id: str, take_event: Callable[[bytes], bool]) -> None:
        self._hub = hub
        self.task_id = task_id
        self._take_event = take_event
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

    def handle(self, payload: bytes) -> None:
        """Handle a message on the task's channel: a hint of text, or an event."""
        if payload == TEXT_HINT:
            self.notify(events=False, text=True)
        elif not self._take_event(payload):
            self.notify(events=True, text=False)

    def __aiter__(self) -> TaskSubscription:
        """Return itself."""
        return self

    async def __anext__(self) -> Hint:
        """Return the next hint, after the poll interval at the latest. Raises the exception that ended the hub."""
        self._hub.check()
        try:
            async with asyncio.timeout(self._hub.get_poll_seconds(self.task_id)):
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

    def __init__(
        self,
        redis: RedisClient,
        keys: RedisKeys,
        *,
        poll_seconds: float = FALLBACK_POLL_SECONDS,
        quiet_poll_seconds: float = QUIET_POLL_SECONDS,
    ) -> None:
        self._keys = keys
        self._poll_seconds = poll_seconds
        self._quiet_poll_seconds = quiet_poll_seconds
        self._subscriptions: dict[str, set[TaskSubscription]] = {}
        self._listener = PubSubListener(
            "task watch",
            redis,
            self._on_message,
            channels=(keys.watch("-"),),  # of no task, so that the connection has one while nothing is watched
            on_crash=self._notify_all,
        )

    @property
    def degraded(self) -> str | None:
        """Return why no hints arrive now; ``None`` while they do."""
        return self._listener.degraded

    async def __aenter__(self) -> TaskWatchHub:
        """Start the listener. Redis need not be up yet."""
        await self._listener.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the listener and close its connection."""
        await self._listener.__aexit__(kind, error, trace)

    def subscribe(self, task_id: str, take_event: Callable[[bytes], bool] = lambda _payload: False) -> TaskSubscription:
        """Return the hints on one task: ``async with hub.subscribe(id) as hints: async for hint in hints: …``.

        ``take_event`` is called with each event of the task as it arrives, a JSON document. Returning ``True`` means
        that it was used, and then no hint follows.
        """
        return TaskSubscription(self, task_id, take_event)

    def get_poll_seconds(self, task_id: str) -> float:
        """Return the time after which a subscription to a task yields a hint by itself."""
        return self._quiet_poll_seconds if self.is_listening(task_id) else self._poll_seconds

    def is_listening(self, task_id: str) -> bool:
        """Return whether Redis has confirmed the task's channel and the connection still stands."""
        return self._listener.is_confirmed(self._keys.watch(task_id))

    def check(self) -> None:
        """Raise the exception that ended the listener, if any."""
        self._listener.raise_if_crashed()

    async def add(self, subscription: TaskSubscription) -> None:
        """Add a subscription. Called by :class:`TaskSubscription` only."""
        channel = self._keys.watch(subscription.task_id)
        first = channel not in self._subscriptions
        self._subscriptions.setdefault(channel, set()).add(subscription)
        if first:
            await self._listener.subscribe(channel)

    async def remove(self, subscription: TaskSubscription) -> None:
        """Remove a subscription. Called by :class:`TaskSubscription` only."""
        channel = self._keys.watch(subscription.task_id)
        subscriptions = self._subscriptions.get(channel, set())
        subscriptions.discard(subscription)
        if not subscriptions and self._subscriptions.pop(channel, None) is not None:
            await self._listener.unsubscribe(channel)

    def _on_message(self, message: PubSubMessage) -> None:
        for subscription in self._subscriptions.get(message.name, ()):
            if message.subscribed:
                # Changes before the confirmation were not announced on this connection.
                subscription.notify(events=True, text=True)
            else:
                subscription.handle(message.data)

    def _notify_all(self) -> None:
        for subscriptions in self._subscriptions.values():
            for subscription in subscriptions:
                subscription.notify(events=True, text=True)
