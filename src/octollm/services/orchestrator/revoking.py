"""Revocations: rows in SQL, the set that every check in this service uses, and the stream that tells the others."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from typing import Any

import msgspec
from sqlalchemy import delete, select

from octollm.background import kept_going
from octollm.capability import RevocationKind, Revocations
from octollm.capability.revocations import KEPT_SECONDS
from octollm.clock import Clock
from octollm.contracts.revocations import MAX_BATCH, RevocationList, RevocationNews, RevocationView
from octollm.contracts.stream import HEARTBEAT_SECONDS
from octollm.errors import OctoError
from octollm.rpc.health import Dependency
from octollm.storage import Database, Transaction
from octollm.storage.tables import revocations

PRUNE = 200
"""Rows that have run out and are dropped with each new one."""
PAGE = 1000
POLL_SECONDS = 0.4
"""How soon what another replica revoked is known here; the listeners are told at once."""
PRUNE_SECONDS = 600.0
"""How often what has run out is let go of."""
SETTLED_SECONDS = 60.0
"""A row may be committed later than one with a higher position; after so long none is."""
STREAM_SECONDS = 3000.0
"""How long a listener is told before it has to ask again."""
LATE_SECONDS = 5.0
"""Without a look at the database for so long, this replica does not say that there is nothing new."""
MAX_WAITING = 5000
"""Revocations that wait for one slow listener; past it the stream ends, and the next begins with all."""


class Revoking:
    """Writes revocations, keeps ``known`` true to those of every replica, and tells them to listeners."""

    def __init__(self, db: Database, clock: Clock) -> None:
        self._db = db
        self._clock = clock
        self.known = Revocations()
        self._settled = 0
        self._seen: OrderedDict[int, float] = OrderedDict()
        self._read_at = clock.monotonic()
        self._listeners: set[_Listener] = set()
        self.failure = ""
        """Why the database could not be read at the last look; empty when it could."""

    async def load(self) -> None:
        """Read what is still in force."""
        await self._read(self._clock.now())

    async def add(self, tx: Transaction, kind: RevocationKind, value: str, tenant: str) -> None:
        """Revoke in ``tenant`` from now on, once ``tx`` is committed."""
        at = self._clock.now()
        old = select(revocations.c.position).where(revocations.c.until < at).limit(PRUNE)
        await tx.execute(delete(revocations).where(revocations.c.position.in_(old.with_for_update(skip_locked=True))))
        row = {"kind": kind, "value": value, "at": at, "until": at + KEPT_SECONDS, "tenant": tenant}
        await tx.execute(tx.insert(revocations).values(row))
        tx.after_commit(lambda: self._learn([RevocationView(kind, value, at, tenant)]))

    def list(self) -> RevocationList:
        """Return the revocations in force."""
        return RevocationList(tuple(self._views()), self.known.floor)

    @contextlib.asynccontextmanager
    async def watching(self, on_failure: Callable[[BaseException], None]) -> AsyncGenerator[None]:
        """Look for what other replicas revoke for as long as the context is open."""

        def crashed(failure: BaseException) -> None:
            self.failure = f"What looks for revocations stopped: {type(failure).__name__}."
            on_failure(failure)

        async with kept_going("revocations", self._watch(), crashed):
            yield

    async def checkup(self) -> Dependency:
        """Say for ``/ready`` whether what other replicas revoke is known here."""
        return Dependency(ok=not self.failure, detail=self.failure, required=False)

    async def follow(self, draining: asyncio.Event) -> AsyncIterator[bytes]:
        """Yield lines of :class:`RevocationNews` until the service shuts down, or the listener is too slow."""
        listener = _Listener()
        self._listeners.add(listener)
        end = self._clock.monotonic() + STREAM_SECONDS
        stopped = asyncio.create_task(draining.wait())
        try:
            views = list(self._views())
            for start in range(0, len(views), MAX_BATCH):
                yield _line(RevocationNews(tuple(views[start : start + MAX_BATCH])))
            yield _line(RevocationNews(floor=self.known.floor, whole=True))
            while not stopped.done() and not listener.lost and self._clock.monotonic() < end:
                news = asyncio.create_task(listener.news.wait())
                try:
                    await asyncio.wait({stopped, news}, timeout=HEARTBEAT_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    await _ended(news)
                if told := listener.take(MAX_BATCH):
                    yield _line(RevocationNews(tuple(told), self.known.floor))
                elif not stopped.done() and self._clock.monotonic() - self._read_at < LATE_SECONDS:
                    yield _line(RevocationNews())
        finally:
            self._listeners.discard(listener)
            await _ended(stopped)

    async def _watch(self) -> None:
        pruned = self._clock.monotonic()
        while True:
            await asyncio.sleep(POLL_SECONDS)
            try:
                now = self._clock.now()
                await self._read(now)
                self.failure = ""
                if self._clock.monotonic() - pruned > PRUNE_SECONDS:
                    pruned = self._clock.monotonic()
                    self.known.prune(now)
            except OctoError as error:
                self.failure = error.detail

    async def _read(self, now: float) -> None:
        """Learn of every row that may have been written since the last look."""
        began = self._clock.monotonic()
        after = self._settled
        while True:
            query = (
                select(revocations)
                .where(revocations.c.position > after, revocations.c.until >= now)
                .order_by(revocations.c.position)
                .limit(PAGE)
            )
            async with self._db.read() as conn:
                rows = await conn.all(query)
            fresh = [row for row in rows if row["position"] not in self._seen]
            self._learn(RevocationView(row["kind"], row["value"], row["at"], row["tenant"]) for row in fresh)
            for row in fresh:
                position = int(row["position"])
                if row["at"] < now - 2 * SETTLED_SECONDS:
                    # What was written so long ago, and all that was written before it, is committed or never will be.
                    self._settled = max(self._settled, position)
                else:
                    self._seen[position] = began
            if len(rows) < PAGE:
                break
            after = int(rows[-1]["position"])
        self._read_at = self._clock.monotonic()
        while self._seen and began - next(iter(self._seen.values())) > SETTLED_SECONDS:
            position, _ = self._seen.popitem(last=False)
            self._settled = max(self._settled, position)

    def _learn(self, views: Iterable[RevocationView]) -> None:
        for view in views:
            before = self.known.version
            self.known.add(view.kind, view.value, view.at, view.tenant)
            if self.known.version != before:
                for listener in self._listeners:
                    listener.tell(view)

    def _views(self) -> Iterable[RevocationView]:
        return (RevocationView(*entry) for entry in self.known.entries())


class _Listener:
    """What one listener is yet to be told."""

    def __init__(self) -> None:
        self.news = asyncio.Event()
        self.lost = False
        self._waiting: list[RevocationView] = []

    def tell(self, view: RevocationView) -> None:
        if len(self._waiting) >= MAX_WAITING:
            self.lost = True
        else:
            self._waiting.append(view)
        self.news.set()

    def take(self, most: int) -> list[RevocationView]:
        told, self._waiting = self._waiting[:most], self._waiting[most:]
        if not self._waiting:
            self.news.clear()
        return told


async def _ended(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.wait({task})


def _line(news: RevocationNews) -> bytes:
    return msgspec.json.encode(news) + b"\n"
