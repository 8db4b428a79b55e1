"""Revocations: stored in SQL, polled from other replicas, streamed to every service that verifies tokens.

A revocation names a token, a principal, a credential, a service, a task or one run of a task, and covers what was
issued until then.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable
from typing import Any

from sqlalchemy import delete, select

from octollm.capability import RevocationKind, Revocations
from octollm.capability.revocations import RETENTION_SECONDS
from octollm.clock import Clock
from octollm.concurrency import BackgroundLoop, LoopLogger
from octollm.contracts.auth import MAX_REVOCATION_BATCH, RevocationList, RevocationUpdate, RevocationView
from octollm.contracts.stream import HEARTBEAT_SECONDS
from octollm.events import EventLog
from octollm.framing import encode_ndjson
from octollm.services.orchestrator.audit import SYSTEM_TENANT
from octollm.storage import Database, Transaction
from octollm.storage.tables import revocations

PRUNE_BATCH = 200
"""Expired rows deleted along with each new row."""
PAGE_SIZE = 1000
POLL_SECONDS = 0.4
"""Seconds until a revocation by another replica is known here; subscribers receive it at once then."""
PRUNE_SECONDS = 600.0
"""Seconds between two removals of expired revocations from memory."""
COMMIT_LAG_SECONDS = 60.0
"""A row may be committed after one with a higher position, by at most this many seconds."""
STREAM_SECONDS = 3000.0
"""Seconds after which a stream ends and the subscriber reconnects."""
STALE_SECONDS = 5.0
"""Without a successful poll for this many seconds, no heartbeat vouches for the subscribers' state."""
MAX_SUBJECT = 255
"""Characters of an event's subject."""
MAX_QUEUED = 5000
"""Revocations queued for one slow subscriber; one more ends its stream, and the next begins with a full list."""


class RevocationStore:
    """Writes revocations, mirrors those of every replica in memory, and streams them to subscribers."""

    def __init__(self, db: Database, events: EventLog, clock: Clock, log: LoopLogger | None = None) -> None:
        self._db = db
        self._events = events
        self._clock = clock
        self.revocations = Revocations()
        self._watermark = 0
        self._seen: OrderedDict[int, float] = OrderedDict()
        self._polled_at = clock.monotonic()
        self._subscribers: set[_Subscriber] = set()
        self._pruned_at = clock.monotonic()
        self.poll_loop = BackgroundLoop(
            "revocation poll",
            self._poll_and_prune,
            interval=POLL_SECONDS,
            initial_delay=POLL_SECONDS,
            restart=True,
            log=log,
        )

    async def load(self) -> None:
        """Read the revocations in force from the database."""
        await self._poll(self._clock.now())

    async def add(self, tx: Transaction, kind: RevocationKind, value: str, tenant: str) -> None:
        """Revoke in ``tenant`` everything issued before now, effective when ``tx`` is committed.

        The event ``token.revoked`` locks a subject of its own, so it may precede the task's event (lock order in
        ``database.py``).
        """
        at = self._clock.now()
        # Skipping locked rows, two revocations at once delete different rows instead of waiting for each other.
        expired = select(revocations.c.position).where(revocations.c.until < at).limit(PRUNE_BATCH)
        await tx.execute(
            delete(revocations).where(revocations.c.position.in_(expired.with_for_update(skip_locked=True)))
        )
        row = {"kind": kind, "value": value, "at": at, "until": at + RETENTION_SECONDS, "tenant": tenant}
        await tx.execute(tx.insert(revocations).values(row))
        await self._events.append(
            tx,
            "token.revoked",
            # A subject of what is revoked: two revocations do not wait for each other, nor for a task's event.
            subject=f"token/{kind}/{value}"[:MAX_SUBJECT],
            tenant=tenant or SYSTEM_TENANT,
            source="orchestrator",
            data={"kind": kind, "value": value, "at": at},
        )
        tx.after_commit(lambda: self._apply([RevocationView(kind, value, at, tenant)]))

    def list(self) -> RevocationList:
        """Return the revocations in force."""
        return RevocationList(tuple(self._views()), self.revocations.floor)

    async def stream(self, draining: asyncio.Event) -> AsyncIterator[bytes]:
        """Yield NDJSON lines of :class:`RevocationUpdate` until the service drains or the subscriber is too slow."""
        # Subscribed before the full list is read, so that none falls between the list and the updates.
        subscriber = _Subscriber()
        self._subscribers.add(subscriber)
        end = self._clock.monotonic() + STREAM_SECONDS
        drained = asyncio.create_task(draining.wait())
        try:
            views = list(self._views())
            for start in range(0, len(views), MAX_REVOCATION_BATCH):
                yield encode_ndjson(RevocationUpdate(tuple(views[start : start + MAX_REVOCATION_BATCH])))
            yield encode_ndjson(RevocationUpdate(floor=self.revocations.floor, whole=True))
            vouched_at = self._clock.monotonic()
            while not drained.done() and not subscriber.has_overflowed and self._clock.monotonic() < end:
                wakeup = asyncio.create_task(subscriber.wakeup.wait())
                try:
                    await asyncio.wait(
                        {drained, wakeup}, timeout=HEARTBEAT_SECONDS, return_when=asyncio.FIRST_COMPLETED
                    )
                finally:
                    await _cancel_and_wait(wakeup)
                batch = subscriber.take(MAX_REVOCATION_BATCH)
                has_all, now = not subscriber.wakeup.is_set(), self._clock.monotonic()
                if batch:
                    yield encode_ndjson(RevocationUpdate(tuple(batch), self.revocations.floor))
                # Also between revocations that never pause: they alone do not say that none is missing.
                is_due = not batch or (has_all and now - vouched_at >= HEARTBEAT_SECONDS)
                if is_due and not drained.done() and now - self._polled_at < STALE_SECONDS:
                    vouched_at = now
                    yield encode_ndjson(RevocationUpdate())
        finally:
            self._subscribers.discard(subscriber)
            await _cancel_and_wait(drained)

    async def _poll_and_prune(self) -> None:
        now = self._clock.now()
        await self._poll(now)
        if self._clock.monotonic() - self._pruned_at > PRUNE_SECONDS:
            self._pruned_at = self._clock.monotonic()
            self.revocations.prune(now)

    async def _poll(self, now: float) -> None:
        """Apply every row that may have been committed since the last poll."""
        started_at = self._clock.monotonic()
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
                    # All transactions that old have ended, so no row at or below this position can still appear.
                    self._watermark = max(self._watermark, position)
                else:
                    # A lower position may still be committed, so the watermark stays and this row is only remembered.
                    self._seen[position] = started_at
            if len(rows) < PAGE_SIZE:
                break
            after = int(rows[-1]["position"])
        self._polled_at = self._clock.monotonic()
        while self._seen and started_at - next(iter(self._seen.values())) > COMMIT_LAG_SECONDS:
            position, _ = self._seen.popitem(last=False)
            self._watermark = max(self._watermark, position)

    def _apply(self, views: Iterable[RevocationView]) -> None:
        for view in views:
            before = self.revocations.version
            self.revocations.add(view.kind, view.value, view.at, view.tenant)
            # The poll also finds what this replica added itself; subscribers get each revocation once.
            if self.revocations.version != before:
                for subscriber in self._subscribers:
                    subscriber.push(view)

    def _views(self) -> Iterable[RevocationView]:
        return (RevocationView(*entry) for entry in self.revocations.entries())


class _Subscriber:
    """The queue of one stream."""

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
        batch, self._queue = self._queue[:limit], self._queue[limit:]
        if not self._queue:
            self.wakeup.clear()
        return batch


async def _cancel_and_wait(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.wait({task})
