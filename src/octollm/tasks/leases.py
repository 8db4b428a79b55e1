"""Task leases with a fencing token (the epoch, column `run`), and the thread that renews them.

The renewer has its own database connection, so a busy event loop or an exhausted pool does not lose a lease.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import NamedTuple

from sqlalchemy import and_, or_, select, update

from octollm.clock import Clock
from octollm.errors import OctoError
from octollm.storage import Database, Transaction
from octollm.storage.tables import tasks

LEASE_SECONDS = 2.0
"""How long a task stays with a holder that says nothing."""
_CLAIMABLE = ("accepted", "planning", "running")
_RENEWABLE = (*_CLAIMABLE, "waiting")


class ExpiredLease(NamedTuple):
    """A task whose holder did not renew its lease, and the ``epoch`` that it held it in."""

    task_id: str
    tenant: str
    epoch: int


OnTakeover = Callable[[Transaction, ExpiredLease], Awaitable[None]]


class TaskLeases:
    """Leases of tasks for one holder, on the database's clock."""

    def __init__(self, db: Database, holder: str, on_takeover: OnTakeover | None = None) -> None:
        """``on_takeover`` is called in the transaction that takes a task from a holder that may still be at work."""
        self._db = db
        self._holder = holder
        self._on_takeover = on_takeover

    async def acquire(self, *, exclude: frozenset[str]) -> tuple[str, int] | None:
        """Claim the task that has waited longest among the most urgent; return its id and run.

        ``exclude`` are those that this process works on already: a slow renewal is no reason to begin again.
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
            # Each claim raises the fencing token, so that the writes of an earlier holder are refused.
            run = int(row["run"]) + 1
            await tx.execute(
                update(tasks)
                .where(tasks.c.task_id == row["task_id"])
                .values(run=run, lease_holder=self._holder, lease_until=now + LEASE_SECONDS)
            )
            # A lease that was released has no end: its holder stopped. That of an expired one may still work.
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
                # An ended task is not renewed: a worker that missed its cancellation learns of it here.
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


RENEW_SECONDS = 0.5
RENEW_DEADLINE_SECONDS = 1.5
"""A holder that could not renew for so long stops its calls by itself, before another takes the task over."""
THREAD_JOIN_SECONDS = 5.0

Connect = Callable[[], AbstractAsyncContextManager[Database]]


class LeaseRenewer:
    """The leases of one holder. ``on_lost`` is called in the event loop with the id of each task that was lost."""

    def __init__(self, connect: Connect, holder: str, clock: Clock, on_lost: Callable[[str], None]) -> None:
        self._connect = connect
        self._holder = holder
        self._clock = clock
        self._on_lost = on_lost
        self._lock = threading.Lock()
        # Task to its run and the time on the monotonic clock when it was last known to be ours.
        self._held: dict[str, tuple[int, float]] = {}
        self.failure = ""
        """Why leases are not renewed just now; empty when they are."""

    def add(self, task_id: str, epoch: int) -> None:
        """Renew the lease of a task that was claimed just now."""
        with self._lock:
            self._held[task_id] = (epoch, self._clock.monotonic())

    def remove(self, task_id: str, epoch: int) -> None:
        """Renew it no more."""
        with self._lock:
            if self._held.get(task_id, (epoch, 0.0))[0] == epoch:
                self._held.pop(task_id, None)

    @asynccontextmanager
    async def run(self, on_failure: Callable[[BaseException], None]) -> AsyncGenerator[None]:
        """Renew for as long as the context is open; ``on_failure`` is given what the thread died of, in the loop."""
        loop = asyncio.get_running_loop()
        stopped = threading.Event()
        ended = asyncio.Event()

        def report(callback: Callable[[], None]) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody is left to be told
                loop.call_soon_threadsafe(callback)

        def run() -> None:
            try:
                asyncio.run(self._renew_until(stopped, report))
            except BaseException as error:
                self.failure = f"The renewal of leases stopped: {type(error).__name__}."
                report(lambda error=error: on_failure(error))
            finally:
                report(ended.set)

        thread = threading.Thread(target=run, name="leases", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stopped.set()
            with suppress(TimeoutError):  # it is a daemon: it holds nothing that outlives the process
                async with asyncio.timeout(THREAD_JOIN_SECONDS):
                    await ended.wait()

    async def _renew_until(self, stopped: threading.Event, report: Callable[[Callable[[], None]], None]) -> None:
        """Renew twice a second, over one connection for as long as that is good."""
        while not stopped.is_set():
            try:
                async with self._connect() as db:
                    claims = TaskLeases(db, self._holder)
                    while not stopped.is_set():
                        await self._renew(claims, report)
                        await asyncio.sleep(RENEW_SECONDS)
            except OctoError as error:
                self._record_failure(error.detail, report)
                await asyncio.sleep(RENEW_SECONDS)

    async def _renew(self, leases: TaskLeases, report: Callable[[Callable[[], None]], None]) -> None:
        with self._lock:
            held = {task_id: run for task_id, (run, _since) in self._held.items()}
        if not held:
            self.failure = ""
            return
        # Taken before the statement, so that the lease in the database ends later than this holder believes.
        began = self._clock.monotonic()
        try:
            # Bounded: a database that stays silent must leave time to stop the calls before the lease ends.
            async with asyncio.timeout(RENEW_DEADLINE_SECONDS - RENEW_SECONDS):
                kept = await leases.renew(held)
        except TimeoutError:
            self._record_failure("The database did not answer in time.", report)
            return
        except OctoError as error:
            self._record_failure(error.detail, report)
            return
        self.failure = ""
        with self._lock:
            for task_id in kept:
                # The event loop may have dropped the task while the statement ran, which is without the lock.
                if task_id in self._held and self._held[task_id][0] == held[task_id]:
                    self._held[task_id] = (held[task_id], began)
        for task_id in held.keys() - kept:
            self._report_lost(task_id, held[task_id], report)

    def _record_failure(self, why: str, report: Callable[[Callable[[], None]], None]) -> None:
        """Stop the work on every task that has not been known to be ours for too long."""
        self.failure = why
        now = self._clock.monotonic()
        with self._lock:
            late = [(task_id, run) for task_id, (run, at) in self._held.items() if now - at >= RENEW_DEADLINE_SECONDS]
        for task_id, run in late:
            self._report_lost(task_id, run, report)

    def _report_lost(self, task_id: str, epoch: int, report: Callable[[Callable[[], None]], None]) -> None:
        with self._lock:
            ours = self._held.get(task_id, (None, 0.0))[0] == epoch
            if ours:
                del self._held[task_id]
        if ours:
            report(lambda: self._on_lost(task_id))
