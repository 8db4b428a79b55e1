"""What happens to a task, read once for everybody who watches it in this process.

A feed keeps the newest events and the newest text of one task. An event that arrives over Redis and continues the
sequence is used as it came; anything else makes the next reader fetch what is missing, and the others wait for it.
"""

from __future__ import annotations

import asyncio
import contextlib
from bisect import bisect_right
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice

import msgspec

from octollm.clock import Clock
from octollm.concurrency import BackgroundLoop
from octollm.contracts.api import StepTexts, TaskView
from octollm.contracts.events import Event
from octollm.errors import OctoError
from octollm.events import Hint, TaskWatchHub
from octollm.live.session import HISTORY_PAGE, TaskSource, TextSource, is_transient
from octollm.live.step_text import parse_stream_id
from octollm.storage import TextEntry
from octollm.storage.text_stream import READ_COUNT

MAX_EVENTS = 8192
"""Events that one feed keeps: those of a plan of a thousand steps."""
MAX_ENTRIES = 4096
"""Entries of text that one feed keeps."""
MAX_FEED_BYTES = 4 * 1024 * 1024
MAX_TOTAL_BYTES = 256 * 1024 * 1024
"""Bytes of the events and text in all feeds of a process. Past it the oldest of the feed that grows are dropped."""
TEXTS_MAX_AGE = 0.1
"""Age up to which saved texts are shared by readers, in seconds."""


@dataclass(slots=True)
class _Freshness:
    """Whether something has to be fetched: a hint makes it stale, a fetch that began after the hint fresh again."""

    hinted: int = 1
    fetched: int = 0
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    _failures: int = 0
    _failure: OctoError | None = None

    @property
    def is_stale(self) -> bool:
        return self.fetched < self.hinted

    async def fetch(self, fetch: Callable[[], Awaitable[None]]) -> None:
        """Call ``fetch`` if that is due. Those who ask meanwhile wait for it, and share a transient failure."""
        if not self.is_stale:
            return
        failures = self._failures
        async with self._lock:
            if not self.is_stale:
                return
            # A failure of the server is everybody's; without this, a thousand readers would try one after the other.
            if self._failures > failures and self._failure is not None:
                raise self._failure.with_traceback(None)
            hinted = self.hinted
            try:
                await fetch()
            except OctoError as error:
                if is_transient(error):
                    self._failures, self._failure = self._failures + 1, error
                raise
            self.fetched, self._failure = hinted, None


class TaskFeed:
    """The newest events and text of one task. Readers come and go by :meth:`TaskFeeds.join`."""

    def __init__(self, task_id: str, feeds: TaskFeeds) -> None:
        self.task_id = task_id
        self.readers: dict[FeedReader, None] = {}
        self.watchers = 0
        """Readers that joined. A broadcast's own reader may outlive the last of them by a round of frames."""
        self._feeds = feeds
        self._bytes = 0
        self._events: deque[tuple[Event, int]] = deque()
        self._version = 0
        """The version of the newest event here."""
        self._event_state = _Freshness()
        self._entries: deque[tuple[TextEntry, int]] = deque()
        self._entries_after = "0"
        """The id of the last entry that is not here any more."""
        self._text_state = _Freshness()
        self._texts: tuple[float, StepTexts] = (float("-inf"), StepTexts(()))
        self._texts_lock = asyncio.Lock()
        self._loop = BackgroundLoop(f"feed of {task_id}", self._follow, on_crash=lambda _error: self._wake())

    def start(self) -> None:
        """Follow the hints of the task."""
        self._loop.start()

    async def aclose(self) -> None:
        """Follow no hints any more."""
        await self._loop.aclose()
        self._feeds.total_bytes -= self._bytes
        self._bytes = 0

    def check(self) -> None:
        """Raise the exception that ended the feed, if any."""
        self._loop.raise_if_crashed()

    def refresh(self) -> None:
        """Fetch the events again, as after a hint."""
        self._event_state.hinted += 1
        self._wake(events=True, text=False)

    async def read_events(self, source: TaskSource, after: int, limit: int) -> Sequence[Event]:
        """Return up to ``limit`` events after version ``after``; the task's ``source`` is asked only for new ones.

        Raises what the source raises.
        """
        await self._event_state.fetch(lambda: self._fetch_events(source))
        first = self._events[0][0].version if self._events else self._version + 1
        # The source also refuses what lies beyond the end: a position that was made up, or of a restored database.
        if not first <= after + 1 <= self._version + 1:
            return await source.history(after, limit)
        start = after + 1 - first
        return [event for event, _size in islice(self._events, start, start + limit)]

    async def read_text(self, after: str) -> Sequence[TextEntry]:
        """Return up to ``READ_COUNT`` entries of text after the id ``after``. Raises as the stream."""
        await self._text_state.fetch(self._fetch_text)
        position = parse_stream_id(after)
        if position < parse_stream_id(self._entries_after):
            return await self._feeds.text_source.read(self.task_id, after)
        start = bisect_right(self._entries, position, key=lambda item: parse_stream_id(item[0].id))
        return [entry for entry, _size in islice(self._entries, start, start + READ_COUNT)]

    async def read_texts(self, source: TaskSource) -> StepTexts:
        """Return the text of each step as last saved. Raises what the source raises."""
        asked_at = self._feeds.clock.monotonic()
        async with self._texts_lock:
            if self._texts[0] < asked_at - TEXTS_MAX_AGE:
                began_at = self._feeds.clock.monotonic()
                self._texts = (began_at, await source.texts())
            return self._texts[1]

    async def _follow(self) -> None:
        async with self._feeds.hub.subscribe(self.task_id, self._take_event) as hints:
            async for hint in hints:
                self._event_state.hinted += hint.events
                self._text_state.hinted += hint.text
                self._wake(events=hint.events, text=hint.text)

    def _wake(self, *, events: bool = True, text: bool = True) -> None:
        for reader in self.readers:
            reader.notify(events=events, text=text)

    def _take_event(self, payload: bytes) -> bool:
        """Append an event that continues the sequence; return whether it needs no fetch."""
        # While a fetch is due or under way, it decides what comes next.
        if self._event_state.is_stale:
            return False
        try:
            event = msgspec.json.decode(payload, type=Event)
        except msgspec.DecodeError:
            return False
        if event.version > self._version + 1:
            return False
        if event.version == self._version + 1:
            self._append_event(event, len(payload))
            self._wake(events=True, text=False)
        return True

    async def _fetch_events(self, source: TaskSource) -> None:
        while True:
            page = await source.history(self._version, HISTORY_PAGE)
            # The first events of an old task may have been deleted. What is left has no gaps.
            if not self._version and page:
                self._version = page[0].version - 1
            for event in page:
                if event.version == self._version + 1:
                    self._append_event(event, len(msgspec.json.encode(event)))
            if len(page) < HISTORY_PAGE:
                return

    def _append_event(self, event: Event, size: int) -> None:
        self._events.append((event, size))
        self._version = event.version
        self._grow(size)
        while len(self._events) > 1 and (len(self._events) > MAX_EVENTS or self._is_too_large()):
            self._grow(-self._events.popleft()[1])

    async def _fetch_text(self) -> None:
        while True:
            last_id = self._entries[-1][0].id if self._entries else self._entries_after
            entries = await self._feeds.text_source.read(self.task_id, last_id)
            for entry in entries:
                size = 200 + len(entry.text)
                self._entries.append((entry, size))
                self._grow(size)
            while len(self._entries) > 1 and (len(self._entries) > MAX_ENTRIES or self._is_too_large()):
                entry, size = self._entries.popleft()
                self._entries_after = entry.id
                self._grow(-size)
            if len(entries) < READ_COUNT:
                return

    def _grow(self, size: int) -> None:
        self._bytes += size
        self._feeds.total_bytes += size

    def _is_too_large(self) -> bool:
        return self._bytes > MAX_FEED_BYTES or self._feeds.total_bytes > MAX_TOTAL_BYTES


class FeedReader:
    """A feed as one caller may read it: the source, the text source and the hints of one live session.

    Whoever reads has been authorised by ``source``, which :meth:`view` asks. :meth:`refuse` ends it: the next read
    raises the error.
    """

    __slots__ = ("_hint_events", "_hint_text", "_is_notified", "_refusal", "_waiter", "feed", "source")

    def __init__(self, feed: TaskFeed, source: TaskSource) -> None:
        self.feed = feed
        self.source = source
        self._refusal: OctoError | None = None
        self._hint_events = self._hint_text = self._is_notified = True
        # An `asyncio.Event` would take a kilobyte of each watcher, most of which never wait.
        self._waiter: asyncio.Future[None] | None = None

    def refuse(self, error: OctoError) -> None:
        """Let the next read raise ``error``, and wake the reader."""
        self._refusal = error
        self.notify(events=True, text=False)

    def notify(self, *, events: bool, text: bool) -> None:
        """Record that events or text may have changed, and wake the reader."""
        self._hint_events |= events
        self._hint_text |= text
        self._is_notified = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def __aiter__(self) -> FeedReader:
        """Return itself."""
        return self

    async def __anext__(self) -> Hint:
        """Return the next hint. Raises the exception that ended the feed."""
        if not self._is_notified:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self.feed.check()
        hint = Hint(self._hint_events, self._hint_text)
        self._hint_events = self._hint_text = self._is_notified = False
        return hint

    async def view(self) -> TaskView:
        """Return the task as it is now. Raises the error that refuses the caller."""
        return await self.source.view()

    async def history(self, after: int, limit: int) -> Sequence[Event]:
        """Return up to ``limit`` events after version ``after``. Raises the error that refuses the caller."""
        if self._refusal is not None:
            raise self._refusal
        return await self.feed.read_events(self.source, after, limit)

    async def texts(self) -> StepTexts:
        """Return the text of each step as last saved."""
        return await self.feed.read_texts(self.source)

    async def read(self, task_id: str, last_id: str = "0") -> Sequence[TextEntry]:
        """Return up to ``READ_COUNT`` entries of text after ``last_id``."""
        del task_id
        return await self.feed.read_text(last_id)


class TaskFeeds:
    """The feeds of a process: one for each task that somebody watches."""

    def __init__(self, hub: TaskWatchHub, text_source: TextSource, clock: Clock) -> None:
        self.hub = hub
        self.text_source = text_source
        self.clock = clock
        self.total_bytes = 0
        self._feeds: dict[str, TaskFeed] = {}

    def __len__(self) -> int:
        return len(self._feeds)

    @contextlib.asynccontextmanager
    async def join(self, task_id: str, source: TaskSource) -> AsyncGenerator[FeedReader]:
        """Yield a reader of the task's feed, which ends with its last reader."""
        feed = self._feeds.get(task_id)
        if feed is None:
            feed = self._feeds[task_id] = TaskFeed(task_id, self)
            feed.start()
        reader = FeedReader(feed, source)
        feed.readers[reader] = None
        feed.watchers += 1
        try:
            yield reader
        finally:
            del feed.readers[reader]
            feed.watchers -= 1
            if not feed.watchers:
                del self._feeds[task_id]
                await feed.aclose()
