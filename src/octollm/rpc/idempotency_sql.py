"""Keys kept in the service's own SQL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import ColumnElement, and_, delete, select, tuple_, update

from octollm.rpc.idempotency import (
    KEEP_SECONDS,
    LEASE_SECONDS,
    Claimed,
    Conflict,
    InFlight,
    KeyOf,
    Outcome,
    Stored,
    Unknown,
)
from octollm.storage import Database, Transaction, plain
from octollm.storage.tables import idempotency as table

MAX_ANSWER = 1024 * 1024
"""Bytes of an answer that is kept; a call with a larger one is done again when repeated."""
PRUNE = 200
"""Old keys dropped with each claim, so that the table stays bounded by a day's calls."""


class SqlIdempotency:
    """Claims and answers of all services that keep theirs here."""

    def __init__(self, db: Database, holder: str) -> None:
        self._db = db
        self._holder = holder

    async def claim(self, key: KeyOf, body_digest: str, *, repeatable: bool, bearer: str) -> Outcome:
        """Take the key, or say what stands in the way."""
        del bearer  # the caller was authorised before the key is looked up
        return await self.claim_for(key, body_digest, repeatable=repeatable, task_id=None)

    async def claim_for(self, key: KeyOf, body_digest: str, *, repeatable: bool, task_id: str | None) -> Outcome:
        """Take the key for work on a task."""
        async with self._db.transaction() as tx:
            row = await tx.first(select(table).where(_is(key)).with_for_update())
            now = await tx.now()
            if row is None:
                if await self._insert(tx, key, body_digest, task_id, now):
                    await _prune(tx, now - KEEP_SECONDS)
                    return Claimed(1)
                # Another claimed it since: the insertion waited for its commit.
                row = await tx.first(select(table).where(_is(key)).with_for_update())
                if row is None:
                    return InFlight()
            found = _found(plain(row), body_digest, now, repeatable=repeatable)
            if isinstance(found, Claimed):
                await tx.execute(
                    update(table)
                    .where(_is(key))
                    .values(state="claimed", holder=self._holder, fence=found.run, lease_until=now + LEASE_SECONDS)
                )
            elif isinstance(found, Unknown):
                await tx.execute(update(table).where(_is(key)).values(state="unknown"))
            return found

    async def _insert(self, tx: Transaction, key: KeyOf, body_digest: str, task_id: str | None, now: float) -> bool:
        """Claim a key that nobody has; return whether it was so."""
        done = await tx.execute(
            tx.insert(table)
            .values(
                tenant=key.tenant,
                subject=key.subject,
                service=key.service,
                operation=key.operation,
                key=key.key,
                body_digest=body_digest,
                state="claimed",
                task_id=task_id,
                holder=self._holder,
                fence=1,
                lease_until=now + LEASE_SECONDS,
                created_at=now,
            )
            .on_conflict_do_nothing()
        )
        return done.rowcount == 1

    async def noted(self, key: KeyOf) -> str | None:
        """Return what an earlier holder noted, who did the work but died before its answer was stored."""
        async with self._db.read() as conn:
            found = await conn.scalar(select(table.c.headers).where(_is(key)))
        return None if found is None else str(found["done"])

    async def note(self, tx: Transaction, key: KeyOf, done: str) -> None:
        """Note in the transaction that does the work that it is done, so that nobody does it again."""
        await tx.execute(update(table).where(_is(key)).values(headers={"done": done}))

    async def renew(self, key: KeyOf, run: int) -> None:
        """Prolong a claim's lease."""
        async with self._db.transaction() as tx:
            until = await tx.now() + LEASE_SECONDS
            await tx.execute(
                update(table)
                .where(_is(key), table.c.fence == run, table.c.state == "claimed")
                .values(lease_until=until)
            )

    async def complete(self, key: KeyOf, run: int, status: int, answer: bytes) -> None:
        """Store the answer of a claimed call; an older holder's is refused without a word."""
        if len(answer) > MAX_ANSWER:
            await self.release(key, run)
            return
        async with self._db.transaction() as tx:
            now = await tx.now()
            await tx.execute(
                update(table)
                .where(_is(key), table.c.fence == run)
                .values(state="completed", status=status, answer=answer, completed_at=now)
            )

    async def release(self, key: KeyOf, run: int) -> None:
        """Give a claim back: the call was not done."""
        async with self._db.transaction() as tx:
            await tx.execute(delete(table).where(_is(key), table.c.fence == run, table.c.state == "claimed"))


async def _prune(tx: Transaction, before: float) -> None:
    """Drop keys of calls made before an epoch second, leaving those that another process is dropping."""
    names = (table.c.tenant, table.c.subject, table.c.service, table.c.operation, table.c.key)
    old = select(*names).where(table.c.created_at < before).limit(PRUNE).with_for_update(skip_locked=True)
    await tx.execute(delete(table).where(tuple_(*names).in_(old)))


def _found(row: Mapping[str, Any], body_digest: str, now: float, *, repeatable: bool) -> Outcome:
    if row["body_digest"] != body_digest:
        return Conflict()
    if row["state"] == "completed":
        return Stored(row["status"], row["answer"])
    if row["state"] == "unknown":
        return Unknown()
    if row["lease_until"] > now:
        return InFlight()
    return Claimed(row["fence"] + 1) if repeatable else Unknown()


def _is(key: KeyOf) -> ColumnElement[bool]:
    return and_(
        table.c.tenant == key.tenant,
        table.c.subject == key.subject,
        table.c.service == key.service,
        table.c.operation == key.operation,
        table.c.key == key.key,
    )
