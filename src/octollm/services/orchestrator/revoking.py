"""Revocations: rows in SQL, and the set that every check in this service uses."""

from __future__ import annotations

from typing import cast

from sqlalchemy import delete, select

from octollm.capability import RevocationKind, Revocations
from octollm.capability.tokens import MAX_ACCESS_SECONDS
from octollm.clock import Clock
from octollm.contracts.api import RevocationList, RevocationView
from octollm.storage import Database, Transaction
from octollm.storage.tables import revocations

PRUNE = 200
"""Rows that have run out and are dropped with each new one."""


class Revoking:
    """Writes revocations and keeps ``known`` true to them."""

    def __init__(self, db: Database, clock: Clock) -> None:
        self._db = db
        self._clock = clock
        self.known = Revocations()

    async def load(self) -> None:
        """Read what is still in force."""
        for item in (await self.list()).revocations:
            self.known.add(cast("RevocationKind", item.kind), item.value, item.at)

    async def add(self, tx: Transaction, kind: RevocationKind, value: str) -> None:
        """Revoke from now on, once ``tx`` is committed."""
        at = self._clock.now()
        old = select(revocations.c.position).where(revocations.c.until < at).limit(PRUNE)
        await tx.execute(delete(revocations).where(revocations.c.position.in_(old.with_for_update(skip_locked=True))))
        await tx.execute(tx.insert(revocations).values(kind=kind, value=value, at=at, until=at + MAX_ACCESS_SECONDS))
        tx.after_commit(lambda: self.known.add(kind, value, at))

    async def list(self) -> RevocationList:
        """Return the revocations in force."""
        now = self._clock.now()
        query = select(revocations).where(revocations.c.until >= now).order_by(revocations.c.position).limit(10_000)
        async with self._db.read() as conn:
            rows = await conn.all(query)
        return RevocationList(tuple(RevocationView(row["kind"], row["value"], row["at"]) for row in rows))
