"""The dashboard stream of one client: a snapshot of what its caller may see, and then the changes.

A change is read once for all clients of a tenant that ask for the same. A frame holds the present state, so a slow
client misses none of it: its next frame has more in it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Protocol
from weakref import WeakValueDictionary

import msgspec
from msgspec import UNSET

from octollm.clock import Clock, format_rfc3339
from octollm.concurrency import BackgroundLoop, wait_for_event
from octollm.contracts.dashboard import (
    Changes,
    ChangesQuery,
    DashboardChange,
    DashboardFrame,
    DashboardPart,
    DashboardSnapshot,
    ServicesNow,
)
from octollm.contracts.observability import ServiceStates
from octollm.errors import OctoError
from octollm.events.pubsub import PubSubListener
from octollm.events.watch import FALLBACK_POLL_SECONDS, QUIET_POLL_SECONDS
from octollm.live.session import SessionTiming, is_transient
from octollm.lru import LruCache
from octollm.storage.keys import RedisKeys
from octollm.storage.redis_protocol import PubSubMessage, RedisClient

MAX_PAGES = 64
"""Pages of changes that a tenant's clients share."""
MIN_INTERVAL = 0.1
"""Seconds between two reads of a tenant's changes."""
SERVICES_SECONDS = 5.0
"""Interval at which the state of the services is read."""


class DashboardSource(Protocol):
    """What the stream is made of, as one caller may read it. Each method raises the error that refuses the caller."""

    async def changes(self, query: ChangesQuery) -> Changes:
        """Return a page of changes, or the present state."""
        ...

    async def services(self) -> ServiceStates:
        """Return the state of the services."""
        ...


class ChangeFeed:
    """The changes of one tenant, for all its clients in this process."""

    def __init__(self, tenant: str, feeds: DashboardFeeds) -> None:
        self.tenant = tenant
        self.sessions: dict[DashboardSession, None] = {}
        self._feeds = feeds
        self._hinted = asyncio.Event()
        self._pages: LruCache[ChangesQuery, Changes | OctoError] = LruCache(MAX_PAGES)
        self._locks: WeakValueDictionary[ChangesQuery, asyncio.Lock] = WeakValueDictionary()
        self.loop = BackgroundLoop(f"dashboard of {tenant}", self._follow, restart=True)

    def hint(self) -> None:
        """Have the changes read again."""
        self._hinted.set()

    async def _follow(self) -> None:
        await wait_for_event(self._hinted, self._feeds.poll_seconds)
        self._pages = LruCache(MAX_PAGES)
        for session in self.sessions:
            session.notify()
        await asyncio.sleep(MIN_INTERVAL)

    async def read(self, source: DashboardSource, query: ChangesQuery) -> Changes:
        """Return a page; ``source`` is asked only if nobody has read it since the last hint. Raises as the source."""
        pages = self._pages
        lock = self._locks.get(query)
        if lock is None:
            lock = self._locks[query] = asyncio.Lock()
        async with lock:
            page = pages.get(query)
            if page is None:
                try:
                    page = await source.changes(query)
                except OctoError as error:
                    # An outage is everybody's. A refusal is this caller's alone.
                    if not is_transient(error):
                        raise
                    page = error
                    asyncio.get_running_loop().call_later(FALLBACK_POLL_SECONDS, self.hint)
                pages.put(query, page)
        if isinstance(page, OctoError):
            raise page.with_traceback(None)
        return page


class _Tenant(msgspec.Struct, frozen=True):
    tenant: str


class DashboardFeeds:
    """The feeds of a process, and the state of the services, within ``async with``."""

    def __init__(self, redis: RedisClient, keys: RedisKeys, clock: Clock) -> None:
        self.clock = clock
        self.services: ServicesNow | None = None
        """As last read; ``None`` before."""
        self._keys = keys
        self._feeds: dict[str, ChangeFeed] = {}
        self._readers: dict[DashboardSession, DashboardSource] = {}
        self._polling: BackgroundLoop | None = None
        self._listener = PubSubListener(
            "dashboard",
            redis,
            self._on_message,
            channels=(keys.watch("-"),),  # of no task, so that the connection has one while nobody looks
            on_crash=self._hint_all,
        )

    async def __aenter__(self) -> DashboardFeeds:
        """Start the listener. Redis need not be up yet."""
        await self._listener.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop the listener."""
        await self._listener.aclose()

    def __len__(self) -> int:
        return len(self._feeds)

    @property
    def poll_seconds(self) -> float:
        """Return the time after which changes are read without a hint."""
        return QUIET_POLL_SECONDS if self._listener.is_confirmed(self._keys.log) else FALLBACK_POLL_SECONDS

    @contextlib.asynccontextmanager
    async def join(self, session: DashboardSession, tenant: str) -> AsyncGenerator[ChangeFeed]:
        """Yield the tenant's feed, which ends with its last session."""
        feed = self._feeds.get(tenant)
        if feed is None:
            feed = self._feeds[tenant] = ChangeFeed(tenant, self)
            feed.loop.start()
        feed.sessions[session] = None
        try:
            await self._listener.subscribe(self._keys.log)
            yield feed
        finally:
            del feed.sessions[session]
            if not feed.sessions:
                del self._feeds[tenant]
                await feed.loop.aclose()
                if not self._feeds:
                    await self._listener.unsubscribe(self._keys.log)

    @contextlib.asynccontextmanager
    async def follow_services(self, session: DashboardSession, source: DashboardSource) -> AsyncGenerator[None]:
        """Read the state of the services while the context is open, once for all who do."""
        self._readers[session] = source
        if self._polling is None:
            self.services = None
            self._polling = BackgroundLoop(
                "dashboard services", self._read_services, interval=SERVICES_SECONDS, restart=True
            )
            self._polling.start()
        try:
            yield
        finally:
            self._readers.pop(session, None)
            if not self._readers:
                polling, self._polling = self._polling, None
                await polling.aclose()

    async def _read_services(self) -> None:
        while self._readers:
            session, source = next(iter(self._readers.items()))
            try:
                states = await source.services()
                # The history of the probes is for those who ask for it: it would be most of the frame.
                brief = tuple(msgspec.structs.replace(state, history=()) for state in states.services)
                services = ServicesNow(True, "", brief)
            except OctoError as error:
                if not is_transient(error) and error.code != "peer_protocol":
                    # This caller may no longer read it. The others may.
                    self._readers.pop(session, None)
                    session.refuse(error)
                    continue
                services = ServicesNow(False, "The monitor does not answer.", ())
            if services != self.services:
                self.services = services
                for each in self._readers:
                    each.notify()
            return

    def _on_message(self, message: PubSubMessage) -> None:
        if message.name != self._keys.log:
            return
        tenants: Sequence[_Tenant] = ()
        if not message.subscribed:
            try:
                tenants = msgspec.json.decode(message.data, type=list[_Tenant])
            except msgspec.DecodeError:
                tenants = ()
        if not tenants:
            # What was published before a confirmation did not arrive.
            self._hint_all()
        for tenant in {each.tenant for each in tenants}:
            if (feed := self._feeds.get(tenant)) is not None:
                feed.hint()

    def _hint_all(self) -> None:
        for feed in self._feeds.values():
            feed.hint()


@dataclass(eq=False)
class DashboardSession:
    """The frames of one client. Call :meth:`open`, then iterate :meth:`frames` once.

    ``may_read_services`` says whether the caller has that part, apart from whether the client wants it.
    """

    feeds: DashboardFeeds
    source: DashboardSource
    query: ChangesQuery
    may_read_services: bool
    timing: SessionTiming = field(default_factory=SessionTiming)
    includes: tuple[DashboardPart, ...] = ()
    tenant: str = ""
    _first: Changes | None = None
    _wakeup: asyncio.Event = field(default_factory=asyncio.Event)
    _refusal: Exception | None = None
    _position: int = 0

    async def open(self) -> None:
        """Read the first page. Raises the error that refuses the client, before any frame."""
        wanted = self.query.parts
        if "services" in wanted and not self.may_read_services:
            raise OctoError("The caller lacks monitor:read.", code="scope_missing")
        first = await self.source.changes(self.query)
        has_services = self.may_read_services and (not wanted or "services" in wanted)
        self.includes = (*first.includes, *(("services",) if has_services else ()))
        if not self.includes:
            raise OctoError("The caller lacks tasks:read, events:read and monitor:read.", code="scope_missing")
        self._first, self._position, self.tenant = first, first.after, first.tenant
        # From here on only what was granted is asked for, so that those with equal rights share a page.
        granted = ",".join(first.includes) or "services"
        self.query = msgspec.structs.replace(self.query, include=granted, limit=200)

    def notify(self) -> None:
        """Wake the session: something may have changed."""
        self._wakeup.set()

    def refuse(self, error: Exception) -> None:
        """Let the next frame raise ``error``."""
        self._refusal = error
        self.notify()

    async def check(self) -> Changes:
        """Return whatever the caller may still read. Raises the error that refuses it."""
        return await self.source.changes(msgspec.structs.replace(self.query, after=UNSET, limit=1))

    async def frames(self) -> AsyncGenerator[DashboardFrame]:
        """Yield the frames, without end.

        Raises the error that refuses the client, and a transient error that has lasted for ``max_outage`` seconds.
        """
        async with contextlib.AsyncExitStack() as stack:
            feed = await stack.enter_async_context(self.feeds.join(self, self.tenant))
            if "services" in self.includes:
                await stack.enter_async_context(self.feeds.follow_services(self, self.source))
            async with contextlib.aclosing(self._frames(feed)) as frames:
                async for frame in frames:
                    yield frame

    async def _frames(self, feed: ChangeFeed) -> AsyncGenerator[DashboardFrame]:
        assert self._first is not None
        clock, page = self.feeds.clock, self._first
        if self.query.after is UNSET:
            yield self._build("snapshot", DashboardSnapshot(self.tenant, self.includes, page.tasks, page.cursor))
            # Whatever happened since is read at once, without a hint.
            page = None
        services: ServicesNow | None = None
        sent_at, failing_since = clock.monotonic(), None
        while True:
            if page is None:
                self._wakeup.clear()
                try:
                    page = await feed.read(self.source, msgspec.structs.replace(self.query, after=self._position))
                    failing_since = None
                except OctoError as error:
                    failing_since = failing_since or clock.monotonic()
                    if not is_transient(error) or clock.monotonic() - failing_since > self.timing.max_outage:
                        raise
            if self._refusal is not None:
                raise self._refusal
            if page is not None:
                self._position = page.after
                if page.tasks or page.removed or page.events:
                    yield self._build("change", DashboardChange(page.tasks, page.removed, page.events))
                    sent_at = clock.monotonic()
            if "services" in self.includes and self.feeds.services not in (None, services):
                services = self.feeds.services
                assert services is not None
                yield self._build("services", services)
                sent_at = clock.monotonic()
            has_more, page = page is not None and page.more, None
            if has_more:
                continue
            if clock.monotonic() - sent_at >= self.timing.ping_interval:
                yield self._build("ping", {})
                sent_at = clock.monotonic()
            pause = sent_at + self.timing.ping_interval - clock.monotonic()
            await wait_for_event(self._wakeup, max(0.0, pause), clear=False)

    def _build(
        self, kind: str, data: DashboardSnapshot | DashboardChange | ServicesNow | dict[str, str]
    ) -> DashboardFrame:
        now = format_rfc3339(self.feeds.clock.now())
        return DashboardFrame(kind, self._position, now, data)  # type: ignore[arg-type]
