"""Task leases with a fencing token (the epoch, column `run`), and the thread that renews them.

The renewer has its own thread and database connection, so that a busy event loop or an exhausted pool loses no lease.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from typing import NamedTuple

from sqlalchemy import and_, or_, select, update

from octollm.clock import Clock
from octollm.errors import OctoError
from octollm.storage import Database, Transaction
from octollm.storage.tables import tasks

# Four renewals fit into one lease, so a single slow or failed one does not lose it. A shorter lease would resume tasks
# of a killed worker sooner, but turn any pause of the database into takeovers.
LEASE_SECONDS = 2.0
"""The time after its last renewal at which another worker may take a task over."""
_CLAIMABLE = ("accepted", "planning", "running")
_RENEWABLE = (*_CLAIMABLE, "waiting")


class ExpiredLease(NamedTuple):
    """A task whose holder did not renew its lease, and the holder's ``epoch``."""

    task_id: str
    tenant: str
    epoch: int


OnTakeover = Callable[[Transaction, ExpiredLease], Awaitable[None]]


class TaskLeases:
    """Leases of tasks for one holder, on the database's clock."""

    def __init__(self, db: Database, holder: str, on_takeover: OnTakeover | None = None) -> None:
        """``on_takeover`` runs in the transaction that takes a task from a holder that may still be working on it."""
        self._db = db
        self._holder = holder
        self._on_takeover = on_takeover

    async def acquire(self, *, exclude: frozenset[str]) -> tuple[str, int] | None:
        """Claim the oldest of the tasks with the highest priority; return its id and the new epoch.

        ``exclude`` are the tasks that this process runs already. If its own renewals were late, their leases look
        expired, and claiming them would start the same work twice in one process.
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
                # Rows locked by another worker's claim are skipped rather than waited for, so claims run in parallel.
                .with_for_update(skip_locked=True, key_share=True)
            )
            if row is None:
                return None
            # Each claim increments the fencing token, so that the store rejects writes of earlier holders.
            run = int(row["run"]) + 1
            await tx.execute(
                update(tasks)
                .where(tasks.c.task_id == row["task_id"])
                .values(run=run, lease_holder=self._holder, lease_until=now + LEASE_SECONDS)
            )
            # A released lease is NULL, and its holder has stopped. An expired one means that the holder may be dead or
            # only slow: in that case its tokens are revoked.
            if row["lease_until"] is not None and self._on_takeover is not None:
                await self._on_takeover(tx, ExpiredLease(str(row["task_id"]), str(row["tenant"]), run - 1))
            return str(row["task_id"]), run

    async def renew(self, held: Mapping[str, int]) -> frozenset[str]:
        """Extend the leases of tasks (id → epoch) in one statement; return the ids that were extended.

        The others have ended, or a newer epoch holds them.
        """
        async with self._db.transaction() as tx:
            until = await tx.now() + LEASE_SECONDS
            ours = or_(*(and_(tasks.c.task_id == task_id, tasks.c.run == run) for task_id, run in held.items()))
            renewed = await tx.all(
                update(tasks)
                # Ended tasks are not renewed. So a worker that missed a cancellation learns of it here, within 0.5 s.
                .where(ours, tasks.c.status.in_(_RENEWABLE))
                .values(lease_until=until)
                .returning(tasks.c.task_id)
            )
            return frozenset(str(row["task_id"]) for row in renewed)

    async def release(self, task_id: str, epoch: int) -> None:
        """Release a lease, so that another worker can claim the task immediately."""
        async with self._db.transaction() as tx:
            await tx.execute(
                update(tasks)
                .where(tasks.c.task_id == task_id, tasks.c.run == epoch)
                .values(lease_holder=None, lease_until=None)
            )


RENEW_SECONDS = 0.5
RENEW_DEADLINE_SECONDS = 1.5
"""A holder that could not renew for this long cancels its work. The rest of the lease (0.5 s) is for closing its calls
before another worker can start."""
THREAD_JOIN_SECONDS = 5.0

Connect = Callable[[], AbstractAsyncContextManager[Database]]


class LeaseRenewer:
    """Renews the leases of one holder. ``on_lost`` is called in the event loop with the id of each lost task."""

    def __init__(self, connect: Connect, holder: str, clock: Clock, on_lost: Callable[[str], None]) -> None:
        self._connect = connect
        self._holder = holder
        self._clock = clock
        self._on_lost = on_lost
        self._lock = threading.Lock()
        # Task id → epoch, and the monotonic time at which the lease was last known to be held. The event loop and the
        # renewal thread both use it, hence the lock; it is never held across an await.
        self._leases: dict[str, tuple[int, float]] = {}
        self.failure = ""
        """Why leases cannot be renewed at present; empty when they can."""

    def add(self, task_id: str, epoch: int) -> None:
        """Start renewing the lease of a task that was just claimed."""
        with self._lock:
            self._leases[task_id] = (epoch, self._clock.monotonic())

    def remove(self, task_id: str, epoch: int) -> None:
        """Stop renewing the lease. A newer epoch of the same task is not affected."""
        with self._lock:
            if self._leases.get(task_id, (epoch, 0.0))[0] == epoch:
                self._leases.pop(task_id, None)

    @asynccontextmanager
    async def run(self, on_failure: Callable[[BaseException], None]) -> AsyncGenerator[None]:
        """Renew while the context is open; ``on_failure`` gets an exception that ends the thread, in the event loop."""
        loop = asyncio.get_running_loop()
        stop_event = threading.Event()
        thread_done = asyncio.Event()

        def report(callback: Callable[[], None]) -> None:
            with suppress(RuntimeError):  # the event loop is closed, so nothing needs the report
                loop.call_soon_threadsafe(callback)

        def run() -> None:
            try:
                asyncio.run(self._renew_until(stop_event, report))
            except BaseException as error:
                self.failure = f"The renewal of leases stopped: {type(error).__name__}."
                report(lambda error=error: on_failure(error))
                # Nothing renews them any more, so their work ends before another worker takes it over.
                self._report_all_lost(report)
            finally:
                report(thread_done.set)

        thread = threading.Thread(target=run, name="leases", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop_event.set()
            # Waits for an event rather than joins, which would block the event loop. The timeout is safe: the thread is
            # a daemon, and the leases that it would renew expire by themselves.
            with suppress(TimeoutError):
                async with asyncio.timeout(THREAD_JOIN_SECONDS):
                    await thread_done.wait()

    async def _renew_until(self, stop_event: threading.Event, report: Callable[[Callable[[], None]], None]) -> None:
        """Renew every ``RENEW_SECONDS``; reconnect after an error."""
        while not stop_event.is_set():
            try:
                async with AsyncExitStack() as stack:
                    # A connection attempt may last longer than a lease.
                    watchdog = asyncio.create_task(self._watch_connection_attempt(report))
                    try:
                        db = await stack.enter_async_context(self._connect())
                    finally:
                        watchdog.cancel()
                    claims = TaskLeases(db, self._holder)
                    while not stop_event.is_set():
                        await self._renew(claims, report)
                        await asyncio.sleep(RENEW_SECONDS)
            except OctoError as error:
                self._record_failure(error.detail, report)
                await asyncio.sleep(RENEW_SECONDS)

    async def _watch_connection_attempt(self, report: Callable[[Callable[[], None]], None]) -> None:
        while True:
            await asyncio.sleep(RENEW_SECONDS)
            self._record_failure("The database does not accept a connection.", report)

    async def _renew(self, leases: TaskLeases, report: Callable[[Callable[[], None]], None]) -> None:
        with self._lock:
            held = {task_id: run for task_id, (run, _since) in self._leases.items()}
        # ``held`` is a copy, because the event loop adds and removes leases while the statement runs.
        if not held:
            self.failure = ""
            return
        # Read before the statement, so that the database's lease always ends later than this process assumes.
        started_at = self._clock.monotonic()
        try:
            # Bounded, because an unresponsive database must leave time to cancel the work before the lease ends.
            async with asyncio.timeout(RENEW_DEADLINE_SECONDS - RENEW_SECONDS):
                renewed = await leases.renew(held)
        except TimeoutError:
            self._record_failure("The database did not answer in time.", report)
            return
        except OctoError as error:
            self._record_failure(error.detail, report)
            return
        self.failure = ""
        with self._lock:
            for task_id in renewed:
                # The event loop may have removed the task, or claimed it again, while the statement ran.
                if task_id in self._leases and self._leases[task_id][0] == held[task_id]:
                    self._leases[task_id] = (held[task_id], started_at)
        for task_id in held.keys() - renewed:
            self._report_lost(task_id, held[task_id], report)

    def _record_failure(self, why: str, report: Callable[[Callable[[], None]], None]) -> None:
        """Report every task as lost whose last renewal is older than ``RENEW_DEADLINE_SECONDS``."""
        self.failure = why
        now = self._clock.monotonic()
        with self._lock:
            stale = [
                (task_id, run) for task_id, (run, at) in self._leases.items() if now - at >= RENEW_DEADLINE_SECONDS
            ]
        for task_id, run in stale:
            self._report_lost(task_id, run, report)

    def _report_all_lost(self, report: Callable[[Callable[[], None]], None]) -> None:
        with self._lock:
            held = {task_id: epoch for task_id, (epoch, _since) in self._leases.items()}
        for task_id, epoch in held.items():
            self._report_lost(task_id, epoch, report)

    def _report_lost(self, task_id: str, epoch: int, report: Callable[[Callable[[], None]], None]) -> None:
        # Checked and removed under one lock, so that a loss is reported once, and only for the epoch that was lost.
        with self._lock:
            ours = self._leases.get(task_id, (None, 0.0))[0] == epoch
            if ours:
                del self._leases[task_id]
        if ours:
            report(lambda: self._on_lost(task_id))
