"""Who works on a task: a lease in SQL with a fence (``run``), found again by a sweep when its holder dies."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple

from sqlalchemy import and_, or_, select, update

from octollm.storage import Database, Transaction
from octollm.storage.tables import tasks

LEASE_SECONDS = 2.0
"""How long a task stays with a holder that says nothing."""
_CLAIMABLE = ("accepted", "planning", "running")
_RENEWABLE = (*_CLAIMABLE, "waiting")


class ExpiredLease(NamedTuple):
    """A task whose holder did not renew its lease, and the ``run`` that it held it in."""

    task_id: str
    tenant: str
    epoch: int


OnTakeover = Callable[[Transaction, ExpiredLease], Awaitable[None]]


class TaskLeases:
    """Leases of tasks for one holder, on the database's clock."""

    def __init__(self, db: Database, holder: str, on_takeover: OnTakeover | None = None) -> None:
        """``on_take_over`` is called in the transaction that takes a task from a holder that may still be at work."""
        self._db = db
        self._holder = holder
        self._on_takeover = on_takeover

    async def acquire(self, *, exclude: frozenset[str]) -> tuple[str, int] | None:
        """Claim the task that has waited longest among the most urgent; return its id and run.

        ``besides`` are those that this process works on already: a slow renewal is no reason to begin again.
        """
        async with self._db.transaction() as tx:
            now = await tx.now()
            row = await tx.first(
                select(tasks.c.task_id, tasks.c.tenant, tasks.c.run, tasks.c.lease_until)
                .where(
                    tasks.c.kind == "task",
                    tasks.c.status.in_(_CLAIMABLE),
                    or_(tasks.c.lease_until.is_(None), tasks.c.lease_until < now),
                    tasks.c.task_id.not_in(exclude),
                )
                .order_by(tasks.c.priority.desc(), tasks.c.created_at)
                .limit(1)
                # What another holder is taking at this moment is not waited for.
                .with_for_update(skip_locked=True, key_share=True)
            )
            if row is None:
                return None
            run = int(row["run"]) + 1
            await tx.execute(
                update(tasks)
                .where(tasks.c.task_id == row["task_id"])
                .values(run=run, lease_holder=self._holder, lease_until=now + LEASE_SECONDS)
            )
            if row["lease_until"] is not None and self._on_takeover is not None:
                await self._on_takeover(tx, ExpiredLease(str(row["task_id"]), str(row["tenant"]), run - 1))
            return str(row["task_id"]), run

    async def renew(self, held: Mapping[str, int]) -> frozenset[str]:
        """Prolong the leases of tasks (id to run), in one statement; return those that are still held.

        The others are held by a newer run or have ended.
        """
        async with self._db.transaction() as tx:
            until = await tx.now() + LEASE_SECONDS
            ours = or_(*(and_(tasks.c.task_id == task_id, tasks.c.run == run) for task_id, run in held.items()))
            kept = await tx.all(
                update(tasks)
                .where(ours, tasks.c.status.in_(_RENEWABLE))
                .values(lease_until=until)
                .returning(tasks.c.task_id)
            )
            return frozenset(str(row["task_id"]) for row in kept)

    async def release(self, task_id: str, epoch: int) -> None:
        """Give a lease back, so that another holder takes the task at once."""
        async with self._db.transaction() as tx:
            await tx.execute(
                update(tasks)
                .where(tasks.c.task_id == task_id, tasks.c.run == epoch)
                .values(lease_holder=None, lease_until=None)
            )
