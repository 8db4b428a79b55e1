"""Revocations: stored in SQL, polled from other replicas, streamed to subscribers; and cancelling tasks, which revokes their tokens."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

import msgspec
from sqlalchemy import delete, select

from octollm.capability import RevocationKind, Revocations
from octollm.capability.revocations import RETENTION_SECONDS
from octollm.clock import Clock
from octollm.concurrency import run_in_background
from octollm.contracts.auth import MAX_REVOCATION_BATCH, RevocationList, RevocationUpdate, RevocationView
from octollm.contracts.stream import HEARTBEAT_SECONDS
from octollm.errors import OctoError
from octollm.rpc.health import DependencyStatus
from octollm.services.orchestrator.audit import Actor, record_audit
from octollm.storage import Database, Transaction
from octollm.storage.tables import revocations
from octollm.tasks.store import TaskStore
from octollm.tasks.worker import Worker

PRUNE_BATCH = 200
"""Rows that have run out and are dropped with each new one."""
PAGE_SIZE = 1000
POLL_SECONDS = 0.4
"""How soon what another replica revoked is known here; the listeners are told at once."""
PRUNE_SECONDS = 600.0
"""How often what has run out is let go of."""
COMMIT_LAG_SECONDS = 60.0
"""A row may be committed later than one with a higher position; after so long none is."""
STREAM_SECONDS = 3000.0
"""How long a listener is told before it has to ask again."""
STALE_SECONDS = 5.0
"""Without a look at the database for so long, this replica does not say that there is nothing new."""
MAX_QUEUED = 5000
"""Revocations that wait for one slow listener; past it the stream ends, and the next begins with all."""


class RevocationStore:
    """Writes revocations, keeps ``known`` true to those of every replica, and tells them to listeners."""

    def __init__(self, db: Database, clock: Clock) -> None:
        self._db = db
        self._clock = clock
        self.revocations = Revocations()
        self._watermark = 0
        self._seen: OrderedDict[int, float] = OrderedDict()
        self._polled_at = clock.monotonic()
        self._subscribers: set[_Subscriber] = set()
        self.failure = ""
        """Why the database could not be read at the last look; empty when it could."""

    async def load(self) -> None:
        """Read what is still in force."""
        await self._poll(self._clock.now())

    async def add(self, tx: Transaction, kind: RevocationKind, value: str, tenant: str) -> None:
        """Revoke in ``tenant`` from now on, once ``tx`` is committed."""
        at = self._clock.now()
        old = select(revocations.c.position).where(revocations.c.until < at).limit(PRUNE_BATCH)
        await tx.execute(delete(revocations).where(revocations.c.position.in_(old.with_for_update(skip_locked=True))))
        row = {"kind": kind, "value": value, "at": at, "until": at + RETENTION_SECONDS, "tenant": tenant}
        await tx.execute(tx.insert(revocations).values(row))
        tx.after_commit(lambda: self._apply([RevocationView(kind, value, at, tenant)]))

    def list(self) -> RevocationList:
        """Return the revocations in force."""
        return RevocationList(tuple(self._views()), self.revocations.floor)

    @contextlib.asynccontextmanager
    async def run(self, on_failure: Callable[[BaseException], None]) -> AsyncGenerator[None]:
        """Look for what other replicas revoke for as long as the context is open."""

        def crashed(failure: BaseException) -> None:
            self.failure = f"What looks for revocations stopped: {type(failure).__name__}."
            on_failure(failure)

        async with run_in_background("revocations", self._poll_loop(), crashed):
            yield

    async def check_health(self) -> DependencyStatus:
        """Say for ``/ready`` whether what other replicas revoke is known here."""
        return DependencyStatus(ok=not self.failure, detail=self.failure, required=False)

    async def stream(self, draining: asyncio.Event) -> AsyncIterator[bytes]:
        """Yield lines of :class:`RevocationUpdate` until the service shuts down, or the listener is too slow."""
        listener = _Subscriber()
        self._subscribers.add(listener)
        end = self._clock.monotonic() + STREAM_SECONDS
        stopped = asyncio.create_task(draining.wait())
        try:
            views = list(self._views())
            for start in range(0, len(views), MAX_REVOCATION_BATCH):
                yield _encode_line(RevocationUpdate(tuple(views[start : start + MAX_REVOCATION_BATCH])))
            yield _encode_line(RevocationUpdate(floor=self.revocations.floor, whole=True))
            while not stopped.done() and not listener.has_overflowed and self._clock.monotonic() < end:
                news = asyncio.create_task(listener.wakeup.wait())
                try:
                    await asyncio.wait({stopped, news}, timeout=HEARTBEAT_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    await _cancel_and_wait(news)
                if told := listener.take(MAX_REVOCATION_BATCH):
                    yield _encode_line(RevocationUpdate(tuple(told), self.revocations.floor))
                elif not stopped.done() and self._clock.monotonic() - self._polled_at < STALE_SECONDS:
                    yield _encode_line(RevocationUpdate())
        finally:
            self._subscribers.discard(listener)
            await _cancel_and_wait(stopped)

    async def _poll_loop(self) -> None:
        pruned = self._clock.monotonic()
        while True:
            await asyncio.sleep(POLL_SECONDS)
            try:
                now = self._clock.now()
                await self._poll(now)
                self.failure = ""
                if self._clock.monotonic() - pruned > PRUNE_SECONDS:
                    pruned = self._clock.monotonic()
                    self.revocations.prune(now)
            except OctoError as error:
                self.failure = error.detail

    async def _poll(self, now: float) -> None:
        """Learn of every row that may have been written since the last look."""
        began = self._clock.monotonic()
        after = self._watermark
        while True:
            query = (
                select(revocations)
                .where(revocations.c.position > after, revocations.c.until >= now)
                .order_by(revocations.c.position)
                .limit(PAGE_SIZE)
            )
            async with self._db.read() as conn:
                rows = await conn.all(query)
            fresh = [row for row in rows if row["position"] not in self._seen]
            self._apply(RevocationView(row["kind"], row["value"], row["at"], row["tenant"]) for row in fresh)
            for row in fresh:
                position = int(row["position"])
                if row["at"] < now - 2 * COMMIT_LAG_SECONDS:
                    # What was written so long ago, and all that was written before it, is committed or never will be.
                    self._watermark = max(self._watermark, position)
                else:
                    self._seen[position] = began
            if len(rows) < PAGE_SIZE:
                break
            after = int(rows[-1]["position"])
        self._polled_at = self._clock.monotonic()
        while self._seen and began - next(iter(self._seen.values())) > COMMIT_LAG_SECONDS:
            position, _ = self._seen.popitem(last=False)
            self._watermark = max(self._watermark, position)

    def _apply(self, views: Iterable[RevocationView]) -> None:
        for view in views:
            before = self.revocations.version
            self.revocations.add(view.kind, view.value, view.at, view.tenant)
            if self.revocations.version != before:
                for listener in self._subscribers:
                    listener.push(view)

    def _views(self) -> Iterable[RevocationView]:
        return (RevocationView(*entry) for entry in self.revocations.entries())


class _Subscriber:
    """What one listener is yet to be told."""

    def __init__(self) -> None:
        self.wakeup = asyncio.Event()
        self.has_overflowed = False
        self._queue: list[RevocationView] = []

    def push(self, view: RevocationView) -> None:
        if len(self._queue) >= MAX_QUEUED:
            self.has_overflowed = True
        else:
            self._queue.append(view)
        self.wakeup.set()

    def take(self, limit: int) -> list[RevocationView]:
        told, self._queue = self._queue[:limit], self._queue[limit:]
        if not self._queue:
            self.wakeup.clear()
        return told


async def _cancel_and_wait(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.wait({task})


def _encode_line(news: RevocationUpdate) -> bytes:
    return msgspec.json.encode(news) + b"\n"


@dataclass(frozen=True, slots=True)
class TaskCanceller:
    """Cancels tasks: their tokens are revoked and their work is stopped all the way down."""

    store: TaskStore
    revocation_store: RevocationStore
    worker: Worker
    clock: Clock
    announce: Callable[[str], Awaitable[None]]
    """Tells the other replicas."""

    async def cancel(self, task_id: str, actor: Actor, reason: str = "") -> None:
        """Cancel a task of the actor's tenant; raises ``state_conflict`` for one that has ended."""
        tenant = actor.principal.tenant
        now = self.clock.now()

        async def also(tx: Transaction) -> None:
            await self.revocation_store.add(tx, "task", task_id, tenant)
            await record_audit(tx, actor, "task.cancelled", task_id, now, {"reason": reason} if reason else None)

        data = {"status": "cancelled", **({"reason": reason} if reason else {})}
        await self.store.change(task_id, "task.cancelled", data, new_status="cancelled", hook=also, finished_at=now)
        await self.worker.stop(task_id)
        await self.announce(task_id)

    async def cancel_all(self, actor: Actor, reason: str, *, sub: str | None = None, cred: str | None = None) -> int:
        """Cancel every open task of a principal or credential in the actor's tenant, and return how many."""
        done = 0
        while found := await self.store.list_open(actor.principal.tenant, sub=sub, cred=cred):
            for task_id in found:
                try:
                    await self.cancel(task_id, actor, reason)
                    done += 1
                except OctoError as error:
                    if error.code != "state_conflict":  # it ended by itself meanwhile
                        raise
        return done
