"""The end of the log in memory: what the outbox publisher publishes as whole batches on one channel.

A reader that is up to date gets new events from here without a query. Anything else it reads from the log.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from itertools import pairwise
from types import TracebackType

import msgspec

from octollm.concurrency import wait_for_event
from octollm.contracts.events import Event
from octollm.events.log import EventLog
from octollm.events.pubsub import PubSubListener
from octollm.storage.keys import RedisKeys
from octollm.storage.redis_protocol import PubSubMessage, RedisClient

MAX_TAIL_EVENTS = 4000
MAX_TAIL_BYTES = 16 * 1024 * 1024


class Position(msgspec.Struct, frozen=True):
    """The members of a published event that say which one it is."""

    id: str
    seq: int


class TailWindow:
    """The latest events of the log without a gap between them, bounded in number and size. No I/O."""

    def __init__(self, max_events: int = MAX_TAIL_EVENTS, max_bytes: int = MAX_TAIL_BYTES) -> None:
        self._max_events = max_events
        self._max_bytes = max_bytes
        self._events: list[Event] = []
        self._sizes: list[int] = []
        self._bytes = 0

    @property
    def last(self) -> int:
        """Return the position of the newest event; 0 when there is none."""
        return self._events[-1].seq if self._events else 0

    def append(self, batch: Sequence[Event], size: int) -> bool:
        """Add a batch of ``size`` bytes; return whether it has anything new.

        A batch that does not begin where the window ends replaces the window: a reader in between reads the log.
        """
        if not batch or any(later.seq != earlier.seq + 1 for earlier, later in pairwise(batch)):
            return False
        if self._events and not self._continues(batch):
            self._events, self._sizes, self._bytes = [], [], 0
        # A publisher that took over repeats its last batches.
        new = [event for event in batch if event.seq > self.last]
        if not new:
            return False
        share = size // len(batch) + 1
        self._events.extend(new)
        self._sizes.extend([share] * len(new))
        self._bytes += share * len(new)
        self._trim()
        return True

    def _continues(self, batch: Sequence[Event]) -> bool:
        first = batch[0]
        index = first.seq - self._events[0].seq
        if not 0 <= index <= len(self._events):
            # Wholly before the window: an old batch, which changes nothing.
            return batch[-1].seq < self._events[0].seq
        # Another event at a known position: the log was restored from a backup and goes on differently.
        return index == len(self._events) or self._events[index].id == first.id

    def has(self, batch: Sequence[Position]) -> bool:
        """Return whether all events of a batch are in the window."""
        first = self._events[0].seq if self._events else 0
        return bool(batch) and all(
            first <= each.seq <= self.last and self._events[each.seq - first].id == each.id for each in batch
        )

    def _trim(self) -> None:
        drop = 0
        # An eighth at a time, since the head of a list is removed in linear time.
        if len(self._events) > self._max_events:
            drop = len(self._events) - self._max_events * 7 // 8
        while self._bytes - sum(self._sizes[:drop]) > self._max_bytes and drop < len(self._events) - 1:
            drop += max(1, (len(self._events) - drop) // 8)
        if drop:
            self._bytes -= sum(self._sizes[:drop])
            del self._events[:drop], self._sizes[:drop]

    def after(self, position: int, limit: int) -> Sequence[Event] | None:
        """Return up to ``limit`` events after a position; ``None`` when the window does not begin there."""
        if not self._events:
            return None
        index = position + 1 - self._events[0].seq
        if not 0 <= index <= len(self._events):
            return None
        return self._events[index : index + limit]


class LogTail:
    """Follows the published batches over one Redis connection, within ``async with``; one per process.

    Without Redis the window is empty, readers poll the log, and :attr:`degraded` says why.
    """

    def __init__(self, redis: RedisClient, keys: RedisKeys, log: EventLog | None = None) -> None:
        """With ``log``, batches that the publisher of this process numbers come from it, without the way over Redis."""
        self._log = log
        self._remove_listener: Callable[[], None] | None = None
        self.window = TailWindow()
        self._listeners: list[Callable[[], None]] = []
        self._published = PubSubListener(
            "log tail", redis, self._on_message, channels=(keys.log,), on_crash=self._notify
        )

    @property
    def degraded(self) -> str | None:
        """Return why no batches arrive now; ``None`` while they do."""
        return self._published.degraded

    async def __aenter__(self) -> LogTail:
        """Start the listener. Redis need not be up yet."""
        if self._log is not None:
            self._remove_listener = self._log.on_numbered(self._on_numbered)
        await self._published.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the listener and close its connection."""
        if self._remove_listener is not None:
            self._remove_listener()
        await self._published.__aexit__(kind, error, trace)

    def _on_numbered(self, batch: Sequence[Event], size: int) -> None:
        if self.window.append(batch, size):
            self._notify()

    def on_batch(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Call ``listener`` when new events arrived; return the function that removes it."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    async def wait(self, timeout: float) -> None:
        """Return when new events arrived, or after ``timeout`` seconds."""
        wakeup = asyncio.Event()
        remove = self.on_batch(wakeup.set)
        try:
            await wait_for_event(wakeup, timeout)
        finally:
            remove()

    def _notify(self) -> None:
        for listener in tuple(self._listeners):
            listener()

    def _on_message(self, message: PubSubMessage) -> None:
        # A confirmation wakes the readers as well: what was published before it did not arrive.
        if message.subscribed or self._receive(message.data):
            self._notify()

    def _receive(self, payload: bytes) -> bool:
        try:
            # What this process numbered comes back as well: to see that takes a fraction of decoding all of it.
            if self._log is not None and self.window.has(msgspec.json.decode(payload, type=list[Position])):
                return False
            batch = msgspec.json.decode(payload, type=list[Event])
        except msgspec.MsgspecError:
            # Only a hint: the readers find the events in the log.
            return True
        return self.window.append(batch, len(payload))
