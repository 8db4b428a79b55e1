"""Task leases with a fencing token (the epoch, column `run`), and the thread that renews them.

The renewer has its own thread and database connection, so that a busy event loop or an exhausted pool loses no lease.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import select, update

from octollm.clock import Clock
from octollm.errors import OctoError
from octollm.storage import Database, Transaction, is_lease_over, row_to_dict
from octollm.storage.database import LEASE_TOLERANCE_SECONDS
from octollm.storage.programs import Program, SqlStatement
from octollm.storage.tables import tasks
from octollm.storage.tables.tasks import WAITING
from octollm.tasks.records import RECORD_COLUMNS, TaskRecord, record_from_driver, task_from_row
from octollm.tasks.scheduling import SharePolicy, WaitingTask, choose_tasks, places_of

# Four renewals fit into one lease, so a single slow or failed one does not lose it. A shorter lease would resume tasks
# of a killed worker sooner, but turn any pause of the database into takeovers.
LEASE_SECONDS = 2.0
"""The time after its last renewal at which another worker may take a task over."""
_CLAIMABLE = ("accepted", "planning", "running")


class ExpiredLease(NamedTuple):
    """A task whose holder did not renew its lease, and the holder's ``epoch``."""

    task_id: str
    tenant: str
    epoch: int


OnTakeover = Callable[[Transaction, ExpiredLease], Awaitable[None]]


_RUNNING = """
SELECT tenant, cred, count(*) AS running FROM tasks
WHERE status IN ('accepted', 'planning', 'running') AND lease_until IS NOT NULL AND kind = 'task'
    AND parent_task_id IS NULL
GROUP BY tenant, cred
"""
_NOW = "extract(epoch FROM clock_timestamp())::float8"
_LOOK_COLUMNS = "task_id, tenant, cred, priority, created_at"
# One statement, for it is the one that an idle worker repeats. It jumps from tenant to tenant in the index: what a
# tenant has waiting is not read. Sub-tasks come apart from the others, and each generation from the rest, which may be
# at their limits and hide them. Expired leases of the deepest come first: these wait for nobody, so they end.
_LOOK = """
WITH RECURSIVE found(tenant) AS (
    SELECT min(tenant) FROM tasks WHERE {waiting}
    UNION ALL
    SELECT (SELECT min(tenant) FROM tasks WHERE {waiting} AND tenant > found.tenant) FROM found
    WHERE found.tenant IS NOT NULL
)
SELECT 'expired' AS kind, generation, {columns} FROM (
    SELECT {generation} AS generation, {columns} FROM tasks
    WHERE status IN ('accepted', 'planning', 'running') AND kind = 'task'
        AND (lease_until < {now} OR lease_until > {now} + $1)
    ORDER BY generation DESC, lease_until LIMIT 100
) AS expired
UNION ALL SELECT 'waiting', generation, {columns} FROM (
    SELECT generation, {columns},
        row_number() OVER (PARTITION BY generation ORDER BY priority DESC, created_at) AS place
    FROM (
        SELECT {generation} AS generation, {columns} FROM tasks WHERE {waiting} AND parent_task_id IS NOT NULL
    ) AS found
) AS subtasks WHERE place <= 50
UNION ALL SELECT 'waiting', 0, {columns} FROM {next}
"""
_NEXT_OF_TENANT = """
SELECT {columns} FROM tasks WHERE {waiting} AND tasks.tenant = found.tenant AND parent_task_id IS NULL
ORDER BY priority DESC, created_at LIMIT $2
"""
_GENERATION = """
coalesce((SELECT {}(ancestors) FROM budgets WHERE budgets.task_id = tasks.task_id), 0)
"""
_FROM_TENANTS_POSTGRES = "(SELECT next.* FROM found CROSS JOIN LATERAL ({}) AS next) AS next"
_FROM_TENANTS_SQLITE = "(SELECT next.* FROM found JOIN tasks AS next ON next.task_id IN ({})) AS next"
_LOOKS = {
    "postgresql": _LOOK.format(
        waiting=WAITING,
        columns=_LOOK_COLUMNS,
        # As `is_lease_over` says it.
        now=_NOW,
        generation=_GENERATION.format("jsonb_array_length"),
        next=_FROM_TENANTS_POSTGRES.format(_NEXT_OF_TENANT.format(waiting=WAITING, columns=_LOOK_COLUMNS)),
    ),
    "sqlite": _LOOK.format(
        waiting=WAITING,
        columns=_LOOK_COLUMNS,
        now="$3",
        generation=_GENERATION.format("json_array_length"),
        next=_FROM_TENANTS_SQLITE.format(_NEXT_OF_TENANT.format(waiting=WAITING, columns="task_id")),
    ),
}
# Otherwise two workers that claim at the same moment would both find room for one more task.
_LOCK_CLAIMS = "SELECT pg_advisory_xact_lock(hashtext('octollm tasks: limits of concurrency'))"
_CLAIM = {
    "postgresql": f"""
UPDATE tasks SET run = run + 1, lease_holder = $2, lease_until = {_NOW} + $3
WHERE task_id IN (
    SELECT task_id FROM tasks WHERE task_id = ANY($1::text[]) AND {WAITING} ORDER BY task_id
    FOR NO KEY UPDATE SKIP LOCKED
) RETURNING {RECORD_COLUMNS}
""",  # noqa: S608  constants
    "sqlite": f"""
UPDATE tasks SET run = run + 1, lease_holder = $2, lease_until = $3
WHERE task_id IN (SELECT value FROM json_each($1)) AND {WAITING} RETURNING {RECORD_COLUMNS}
""",  # noqa: S608  constants
}
# Ended tasks are not renewed. So a worker that missed a cancellation learns of it here, within 0.5 s. Nor are released
# ones: a renewal under way would make the next claim wait for the lease to expire. Rows are locked in ascending order,
# as by the batches of changes.
_RENEWABLE = "status IN ('accepted', 'planning', 'running') AND lease_holder = "
_RENEW_POSTGRES = f"""
UPDATE tasks SET lease_until = {_NOW} + $4 FROM (
    SELECT task_id FROM tasks JOIN unnest($1::text[], $2::bigint[]) AS held (id, epoch)
        ON tasks.task_id = held.id AND tasks.run = held.epoch
    WHERE {_RENEWABLE} $3 ORDER BY task_id FOR NO KEY UPDATE OF tasks
) AS ours WHERE tasks.task_id = ours.task_id RETURNING tasks.task_id
"""  # noqa: S608  constants
_RENEW_SQLITE = f"""
UPDATE tasks SET lease_until = $1 WHERE task_id = $2 AND run = $3 AND {_RENEWABLE} $4 RETURNING task_id
"""  # noqa: S608  constants
_LOOKAHEAD = 50
"""Tasks of a tenant that are looked at for one whose key is below its limit."""


_CLAIM_ROUNDS = 3
"""How often a worker looks again when others were faster."""


class Claim(NamedTuple):
    """A task that this holder has claimed, and how far it is below its root."""

    task: TaskRecord
    generation: int


class TaskLeases:
    """Leases of tasks for one holder, on the database's clock."""

    def __init__(
        self,
        db: Database,
        holder: str,
        on_takeover: OnTakeover | None = None,
        *,
        shares: SharePolicy | None = None,
    ) -> None:
        """``on_takeover`` runs in the transaction that takes a task from a holder that may still be working on it."""
        self._db = db
        self._holder = holder
        self._on_takeover = on_takeover
        self._shares = shares or SharePolicy()

    async def acquire(self, *, exclude: frozenset[str]) -> tuple[str, int] | None:
        """Claim the next task that is no sub-task; return its id and the new epoch."""
        for task, _ in await self.claim(places_of(1, 0), exclude=exclude):
            return task.task_id, task.epoch
        return None

    async def claim(self, places: Sequence[int], *, exclude: frozenset[str] = frozenset()) -> list[Claim]:
        """Claim tasks of each generation, up to its ``places``, the roots first.

        :func:`choose_tasks` decides; those whose lease has expired come first. ``exclude`` are the tasks that this
        process runs already, or still stops. If its own renewals were late, their leases look expired, and claiming
        them would run the same work twice in one process.
        """
        claims: list[Claim] = []
        room = list(places)
        for _ in range(_CLAIM_ROUNDS):
            expired, waiting = await self._look(room, exclude)
            for task_id, generation in expired:
                if room[generation] > 0:
                    record = await self._take_over(task_id)
                    if record is not None:
                        room[generation] -= 1
                        claims.append(Claim(record, generation))
            if not waiting:
                break
            claimed, wanted = await self._db.run(self._claim_free(waiting, room))
            for claim in claimed:
                room[claim.generation] -= 1
            claims += claimed
            if len(claimed) == wanted:
                break
        return claims

    async def _look(
        self, room: Sequence[int], exclude: frozenset[str]
    ) -> tuple[list[tuple[str, int]], list[WaitingTask]]:
        """Return the tasks whose lease has expired, with their generations, and enough of those without one."""
        lookahead = _LOOKAHEAD if self._shares.max_per_key else 0
        parameters = [LEASE_SECONDS + LEASE_TOLERANCE_SECONDS, room[0] + lookahead]
        if self._db.dialect == "sqlite":
            parameters.append(self._db.clock.now())
        rows = await self._db.fetch(_LOOKS[self._db.dialect], *parameters)
        rows = [row for row in rows if room[int(row["generation"])] > 0 and row["task_id"] not in exclude]
        return [(str(row["task_id"]), int(row["generation"])) for row in rows if row["kind"] == "expired"], [
            WaitingTask(
                row["task_id"],
                row["tenant"],
                row["cred"],
                row["priority"],
                row["created_at"],
                int(row["generation"]),
            )
            for row in rows
            if row["kind"] == "waiting"
        ]

    def _claim_free(self, waiting: Sequence[WaitingTask], room: Sequence[int]) -> Program[tuple[list[Claim], int]]:
        """Claim what there is ``room`` for of the waiting tasks; return them, and how many it wanted."""
        shares = self._shares
        has_limits = bool(shares.max_per_tenant or shares.max_per_key)
        if has_limits and self._db.dialect == "postgresql":
            yield SqlStatement(_LOCK_CLAIMS)
        running: dict[tuple[str, str], int] = {}
        # Without limits a lone tenant gets what there is.
        if has_limits or len({task.tenant for task in waiting}) > 1:
            running = {(row["tenant"], row["cred"]): int(row["running"]) for row in (yield SqlStatement(_RUNNING))}
        chosen: dict[str, int] = {}
        for generation, slots in enumerate(room):
            candidates = [task for task in waiting if task.generation == generation]
            chosen |= {task.task_id: generation for task in choose_tasks(candidates, running, slots, shares)}
        if not chosen:
            return [], 0
        ids = list(chosen)
        if self._db.dialect == "postgresql":
            parameters: tuple[Any, ...] = (ids, self._holder, LEASE_SECONDS)
        else:
            parameters = (msgspec.json.encode(ids).decode(), self._holder, self._db.clock.now() + LEASE_SECONDS)
        # Each claim increments the fencing token, so that the store rejects writes of earlier holders. What another
        # worker claims at the same moment is skipped rather than waited for.
        rows = yield SqlStatement(_CLAIM[self._db.dialect], parameters)
        records = {row["task_id"]: record_from_driver(row) for row in rows}
        return [Claim(records[task_id], chosen[task_id]) for task_id in ids if task_id in records], len(ids)

    async def _take_over(self, task_id: str) -> TaskRecord | None:
        """Claim a task whose lease has expired, unless another worker was faster."""
        async with self._db.transaction() as tx:
            now = await tx.now()
            row = await tx.first(
                select(tasks)
                .where(
                    tasks.c.task_id == task_id,
                    tasks.c.status.in_(_CLAIMABLE),
                    is_lease_over(tasks.c.lease_until, now, LEASE_SECONDS),
                )
                # A row locked by another worker's claim is skipped rather than waited for, so claims run in parallel.
                .with_for_update(skip_locked=True, key_share=True)
            )
            if row is None:
                return None
            record = task_from_row(row_to_dict(row))
            epoch = record.epoch + 1
            await tx.execute(
                update(tasks)
                .where(tasks.c.task_id == task_id)
                .values(run=epoch, lease_holder=self._holder, lease_until=now + LEASE_SECONDS)
            )
            # A released lease is NULL, and its holder has stopped. An expired one means that the holder may be dead or
            # only slow: in that case its tokens are revoked.
            if self._on_takeover is not None:
                await self._on_takeover(tx, ExpiredLease(task_id, record.tenant, record.epoch))
            return replace(record, epoch=epoch)

    async def renew(self, held: Mapping[str, int]) -> frozenset[str]:
        """Extend the leases of tasks (id → epoch) in one statement; return the ids that were extended.

        The others have ended, or a newer epoch holds them.
        """
        return frozenset(await self._db.run(self._renew(held)))

    def _renew(self, held: Mapping[str, int]) -> Program[list[str]]:
        if self._db.dialect == "postgresql":
            parameters = (list(held), list(held.values()), self._holder, LEASE_SECONDS)
            return [str(row["task_id"]) for row in (yield SqlStatement(_RENEW_POSTGRES, parameters))]
        renewed: list[str] = []
        until = self._db.clock.now() + LEASE_SECONDS
        for task_id, epoch in held.items():
            rows = yield SqlStatement(_RENEW_SQLITE, (until, task_id, epoch, self._holder))
            renewed.extend(str(row["task_id"]) for row in rows)
        return renewed

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
            held = {task_id: epoch for task_id, (epoch, _since) in self._leases.items()}
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
                (task_id, epoch) for task_id, (epoch, at) in self._leases.items() if now - at >= RENEW_DEADLINE_SECONDS
            ]
        for task_id, epoch in stale:
            self._report_lost(task_id, epoch, report)

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
