"""Retention: old rows are archived, if an archive is configured, and then deleted in batches.

These are events, tasks, files and the audit log, which is deleted only if it is archived. What a deleted task left in
the memory is erased there by the operation that users have, also later, when the memory is away.

The log loses a prefix, so that what is left has no holes. A table partitioned by time would drop it faster, but
PostgreSQL enforces a unique key over partitions only if the key includes the time: an event's id, its position and its
version would not be unique any more. Batched deletes keep each transaction short.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec
from sqlalchemy import delete, exists, func, select, update

from octollm.capability import Principal, RootMinter
from octollm.clock import Clock, IdGenerator, format_rfc3339
from octollm.concurrency import BackgroundLoop, LoopLogger
from octollm.config import Settings
from octollm.contracts.memory_operations import ERASE_TASK, Erasure
from octollm.errors import OctoError, SettingError
from octollm.events import EventLog, SubscriptionStore
from octollm.resilience import Deadline
from octollm.rpc.client import CallTarget, OutgoingCall, ServiceClient
from octollm.rpc.idempotency_sql import PRUNE_BATCH, delete_expired_keys
from octollm.services.orchestrator.archive import StoreObject, open_archive
from octollm.services.orchestrator.audit import SYSTEM_TENANT, archive_audit
from octollm.services.orchestrator.event_sink import read_sink_position
from octollm.services.orchestrator.webhook_feed import read_feed_position
from octollm.storage import Database, Transaction, is_lease_over, row_to_dict
from octollm.storage.migrations import open_service_database
from octollm.storage.tables import (
    events,
    files,
    memory_erasures,
    relay_state,
    steps,
    subjects,
    task_files,
    tasks,
)
from octollm.tasks.state import TASK_TRANSITIONS, is_final

ROUND_SECONDS = 60.0
LEASE_SECONDS = 300.0
"""A replica that dies during a round delays the next one by this."""
EVENT_BATCH = 500
TASK_BATCH = 50
FILE_BATCH = 10
"""Few: a file may have many megabytes."""
ERASE_SECONDS = 60.0
"""How long a round erases from the memory."""
ERASE_CALL_SECONDS = 30.0
"""For one task: it may have thousands of passages."""
ERASE_RETRY_SECONDS = 50.0
"""After a failed erasure; less than the interval of the rounds."""
MAX_BATCHES = 200
"""Batches of a kind in one round, so that a first round after years does not keep the database busy for hours."""
HOLD_FACTOR = 2
"""Events that a durable reader has not handled are kept beyond the limits, up to this many times of each."""
DAY = 86_400.0
_LEASE_ROW = "retention"
FINAL = tuple(status for status in TASK_TRANSITIONS if is_final(status))


@dataclass(frozen=True, slots=True)
class RetentionPolicy:
    """How long to keep what, in days, and how many events at most; 0 is for ever."""

    event_days: int = 0
    event_count: int = 0
    task_days: int = 0
    file_days: int = 0
    audit_days: int = 0

    @classmethod
    def from_settings(cls, settings: Settings) -> RetentionPolicy:
        """Return the policy of the settings."""
        return cls(
            settings.event_retention_days,
            settings.event_retention_count,
            settings.task_retention_days,
            settings.file_retention_days,
            settings.audit_retention_days,
        )


@dataclass(slots=True)
class RetentionResult:
    """What one round deleted. ``truncated`` counts events that a durable reader had not handled.

    ``erased`` counts deleted tasks whose facts and documents were erased from the memory; ``erasures_left`` those that
    still wait for it.
    """

    events: int = 0
    truncated: int = 0
    tasks: int = 0
    files: int = 0
    audit: int = 0
    keys: int = 0
    erased: int = 0
    erasures_left: int = 0


EraseTask = Callable[[str, str], Awaitable[None]]
"""Erases from the memory what a task (tenant and id) left there. Raises ``not_found`` when there is nothing."""
LowestPosition = Callable[[], Awaitable[int | None]]
"""Returns the position after which a durable reader needs the log; ``None`` without one."""


@dataclass(frozen=True, slots=True)
class Cut:
    """How many of the oldest events to delete, and how many of them some durable reader has not handled."""

    count: int = 0
    truncated: int = 0


def plan_cut(
    rows: Sequence[tuple[int, str]], head: int, limits: tuple[str, int], hold: tuple[str, int], needed: int | None
) -> Cut:
    """Return how many of the oldest events, as (position, timestamp) in order, to delete.

    ``head`` is the last position. ``limits`` and ``hold`` are (oldest timestamp to keep, number to keep): past the
    limits an event is deleted when every durable reader is past it (``needed`` is the least position of one);
    past the hold it is deleted in any case. No I/O.
    """
    count = truncated = 0
    for seq, timestamp in rows:
        if not (timestamp < limits[0] or head - seq >= limits[1]):
            break
        if needed is not None and seq > needed:
            if not (timestamp < hold[0] or head - seq >= hold[1]):
                break
            truncated += 1
        count += 1
    return Cut(count, truncated)


@dataclass(slots=True)
class Retention:
    """Deletes what is older than the policy says. Replicas take turns."""

    db: Database
    log: EventLog
    policy: RetentionPolicy
    holder: str
    clock: Clock
    lowest_position: LowestPosition
    archive: StoreObject | None = None
    erase_task: EraseTask | None = None
    """``None`` in a process that cannot call the memory: the orchestrator erases later."""
    count: Callable[[str, int], None] = lambda _kind, _count: None
    """Called with a kind, the name of a member of :class:`RetentionResult`, and how many were deleted."""
    loop_log: LoopLogger | None = None
    loop: BackgroundLoop = field(init=False)

    def __post_init__(self) -> None:
        """Create the loop, which the owner starts."""
        self.loop = BackgroundLoop(
            "retention",
            self.run_round,
            interval=ROUND_SECONDS,
            initial_delay=ROUND_SECONDS,
            restart=True,
            log=self.loop_log,
        )

    async def run_round(self) -> RetentionResult | None:
        """Delete what is due and return how much that was; ``None`` while another replica does it."""
        if not await self._acquire():
            return None
        result = RetentionResult()
        try:
            await self._repeat(self._delete_events, result)
            await self._repeat(self._delete_tasks, result)
            await self._repeat(self._delete_files, result)
            await self._repeat(self._archive_audit, result)
            await self._repeat(self._delete_keys, result)
            # Last: while the memory is away, the rest goes on, and the failure shows in `/ready`.
            await self._erase_memory(result)
        finally:
            await self._release()
        return result

    async def _repeat(self, batch: Callable[[RetentionResult], Awaitable[bool]], result: RetentionResult) -> None:
        for _ in range(MAX_BATCHES):
            if not await batch(result):
                return

    async def _acquire(self) -> bool:
        async with self.db.transaction() as tx:
            await tx.execute(tx.insert(relay_state).values(name=_LEASE_ROW, lease_until=0.0).on_conflict_do_nothing())
            now = await tx.now()
            over = is_lease_over(relay_state.c.lease_until, now, LEASE_SECONDS)
            claim = update(relay_state).where(relay_state.c.name == _LEASE_ROW, over)
            claimed = await tx.execute(claim.values(holder=self.holder, lease_until=now + LEASE_SECONDS))
        return claimed.rowcount == 1

    async def _release(self) -> None:
        async with self.db.transaction() as tx:
            await tx.execute(
                update(relay_state)
                .where(relay_state.c.name == _LEASE_ROW, relay_state.c.holder == self.holder)
                .values(lease_until=0.0)
            )

    def _limits(self, factor: int) -> tuple[str, int]:
        days, count = self.policy.event_days * factor, self.policy.event_count * factor
        cutoff = format_rfc3339(self.clock.now() - days * DAY) if days else ""
        return cutoff, count or 2**62

    async def _delete_events(self, result: RetentionResult) -> bool:
        """Delete one batch of the oldest events; return whether there may be more."""
        if not (self.policy.event_days or self.policy.event_count):
            return False
        needed = await self.lowest_position()
        async with self.db.read() as conn:
            state = await conn.first(select(relay_state).where(relay_state.c.name == "events"))
            query = select(events).where(events.c.seq.is_not(None)).order_by(events.c.seq).limit(EVENT_BATCH)
            rows = [row_to_dict(row) for row in await conn.all(query)]
        if state is None:
            return False
        # What Redis has not received is not deleted, however old.
        rows = [row for row in rows if row["seq"] <= state["published"]]
        cut = plan_cut(
            [(row["seq"], row["timestamp"]) for row in rows],
            int(state["numbered"]),
            self._limits(1),
            self._limits(HOLD_FACTOR),
            needed,
        )
        if not cut.count:
            return False
        rows = rows[: cut.count]
        first, last = rows[0]["seq"], rows[-1]["seq"]
        await self._store(f"events/{first:019d}-{last:019d}.jsonl", rows)
        async with self.db.transaction() as tx:
            if cut.truncated:
                await self._announce_truncation(tx, last, cut.truncated)
            await tx.execute(delete(events).where(events.c.seq <= last))
        self._count("events", cut.count, result)
        self._count("truncated", cut.truncated, result)
        return cut.count == EVENT_BATCH

    async def _announce_truncation(self, tx: Transaction, last: int, count: int) -> None:
        await self.log.append(
            tx,
            "log.truncated",
            subject="log/events",
            tenant=SYSTEM_TENANT,
            source="orchestrator",
            data={"through": last, "count": count},
        )

    async def _delete_tasks(self, result: RetentionResult) -> bool:
        """Delete some tasks that ended long ago, with their steps, budgets, model journal and references to files."""
        if not self.policy.task_days:
            return False
        cutoff = self.clock.now() - self.policy.task_days * DAY
        due = tasks.c.status.in_(FINAL), tasks.c.finished_at < cutoff
        async with self.db.read() as conn:
            query = select(tasks).where(*due).order_by(tasks.c.finished_at).limit(TASK_BATCH)
            rows = [row_to_dict(row) for row in await conn.all(query)]
            ids = [row["task_id"] for row in rows]
            of_tasks = select(steps).where(steps.c.task_id.in_(ids)).order_by(steps.c.task_id, steps.c.position)
            step_rows = [row_to_dict(row) for row in await conn.all(of_tasks.limit(TASK_BATCH * 200))]
        if not rows:
            return False
        for row in rows:
            own = [step for step in step_rows if step["task_id"] == row["task_id"]]
            await self._store(f"tasks/{row['tenant']}/{row['task_id']}.json", [{"task": row, "steps": own}])
        async with self.db.transaction() as tx:
            # The tables of a task follow by their foreign keys. Its version is not needed: nothing is appended to it.
            await tx.execute(delete(tasks).where(tasks.c.task_id.in_(ids), *due))
            await tx.execute(delete(subjects).where(subjects.c.subject.in_([f"task/{task_id}" for task_id in ids])))
            # Noted in the transaction that deletes the task: nothing else knows of it later.
            erasures = [{"tenant": row["tenant"], "task_id": row["task_id"], "due_at": 0.0} for row in rows]
            await tx.execute(tx.insert(memory_erasures).values(erasures).on_conflict_do_nothing())
        self._count("tasks", len(rows), result)
        return len(rows) == TASK_BATCH

    async def _delete_files(self, result: RetentionResult) -> bool:
        """Delete some old files that no task refers to."""
        if not self.policy.file_days:
            return False
        cutoff = self.clock.now() - self.policy.file_days * DAY
        due = files.c.created_at < cutoff, ~exists().where(task_files.c.digest == files.c.digest)
        columns = [files] if self.archive is not None else [files.c.tenant, files.c.digest]
        async with self.db.read() as conn:
            query = select(*columns).where(*due).order_by(files.c.created_at).limit(FILE_BATCH)
            rows = [row_to_dict(row) for row in await conn.all(query)]
        for row in rows:
            if self.archive is not None:
                await self.archive(f"files/{row['tenant']}/{row['digest']}", row["body"])
        if not rows:
            return False
        async with self.db.transaction() as tx:
            for row in rows:
                # The conditions again: a task may refer to the file by now.
                key = files.c.tenant == row["tenant"], files.c.digest == row["digest"]
                await tx.execute(delete(files).where(*key, *due))
        self._count("files", len(rows), result)
        return len(rows) == FILE_BATCH

    async def _delete_keys(self, result: RetentionResult) -> bool:
        """Delete some idempotency keys whose day is over; return whether there may be more.

        Claims delete them as well, but only every so many: a quiet installation would keep responses for weeks.
        """
        count = await delete_expired_keys(self.db)
        self._count("keys", count, result)
        return count >= PRUNE_BATCH

    async def _archive_audit(self, result: RetentionResult) -> bool:
        """Move the oldest rows of each tenant's audit log to the archive; return whether there may be more."""
        if not self.policy.audit_days or self.archive is None:
            return False
        moved = await archive_audit(self.db, self.clock.now() - self.policy.audit_days * DAY, self.archive)
        self._count("audit", moved, result)
        return moved > 0

    async def _erase_memory(self, result: RetentionResult) -> None:
        """Erase from the memory what deleted tasks left there, for :data:`ERASE_SECONDS` at most."""
        until = self.clock.monotonic() + ERASE_SECONDS
        due = select(memory_erasures).order_by(memory_erasures.c.due_at, memory_erasures.c.task_id).limit(TASK_BATCH)
        failure: OctoError | None = None
        while self.erase_task is not None and failure is None and self.clock.monotonic() < until:
            async with self.db.read() as conn:
                rows = await conn.all(due.where(memory_erasures.c.due_at <= await conn.now()))
            if not rows:
                break
            for row in rows:
                failure = await self._erase_task(self.erase_task, row["tenant"], row["task_id"], result) or failure
                if self.clock.monotonic() >= until:
                    break
        async with self.db.read() as conn:
            result.erasures_left = int(await conn.scalar(select(func.count()).select_from(memory_erasures)))
        if failure is not None:
            raise failure

    async def _erase_task(
        self, erase: EraseTask, tenant: str, task_id: str, result: RetentionResult
    ) -> OctoError | None:
        mine = memory_erasures.c.tenant == tenant, memory_erasures.c.task_id == task_id
        try:
            await erase(tenant, task_id)
        except OctoError as error:
            if error.code != "not_found":
                # Later, so that one task which the memory refuses does not hold up the others.
                async with self.db.transaction() as tx:
                    await tx.execute(
                        update(memory_erasures).where(*mine).values(due_at=await tx.now() + ERASE_RETRY_SECONDS)
                    )
                return error
        async with self.db.transaction() as tx:
            await tx.execute(delete(memory_erasures).where(*mine))
        self._count("erased", 1, result)
        return None

    async def _store(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        # Before the deletion: a crash in between stores the same object again.
        if self.archive is not None:
            await self.archive(name, b"".join(msgspec.json.encode(dict(row)) + b"\n" for row in rows))

    def _count(self, kind: str, count: int, result: RetentionResult) -> None:
        if count:
            setattr(result, kind, getattr(result, kind) + count)
            self.count(kind, count)


def open_retention(
    settings: Settings,
    db: Database,
    log: EventLog,
    clock: Clock,
    ids: IdGenerator,
    *,
    erase_task: EraseTask | None = None,
    count: Callable[[str, int], None] = lambda _kind, _count: None,
    loop_log: LoopLogger | None = None,
) -> Retention:
    """Return what deletes old rows as the settings say; ``erase_task`` and ``count`` are as in :class:`Retention`.

    Raises :class:`SettingError` for an archive that is not usable, and where the audit log would be deleted without
    one.
    """
    archive = None if settings.archive_url is None else open_archive(settings.archive_url).store
    if settings.audit_retention_days and archive is None:
        raise SettingError(
            "OCTOLLM_AUDIT_RETENTION_DAYS needs OCTOLLM_ARCHIVE_URL: the audit log is never only deleted."
        )
    policy = RetentionPolicy.from_settings(settings)
    subscriptions = SubscriptionStore(db, clock, ids)
    needed = partial(lowest_needed_position, db, subscriptions, with_sink=settings.event_sink is not None)
    return Retention(db, log, policy, ids.hex(), clock, needed, archive, erase_task, count, loop_log)


async def lowest_needed_position(
    db: Database, subscriptions: SubscriptionStore, *, with_sink: bool = False
) -> int | None:
    """Return the position after which some durable reader needs the log; ``None`` without one.

    Every durable reader of the log belongs in here: retention deletes the events up to it. A sink that is no longer
    configured leaves its position, which must not hold events.
    """
    async with db.read() as connection:
        feed = await read_feed_position(connection)
        sink = await read_sink_position(connection) if with_sink else None
    positions = (feed, sink, await subscriptions.lowest_position())
    return min((position for position in positions if position is not None), default=None)


async def run_retention(settings: Settings, clock: Clock, ids: IdGenerator) -> RetentionResult | None:
    """Delete what is due now, and return how much; ``None`` while a running orchestrator does it."""
    async with open_service_database(settings, "orchestrator", clock=clock) as db:
        return await open_retention(settings, db, EventLog(db, clock, ids), clock, ids).run_round()


@dataclass(frozen=True, slots=True)
class MemoryEraser:
    """Erases what tasks left in the memory, in the name of the orchestrator and with a token of their tenant."""

    client: ServiceClient
    minter: RootMinter
    clock: Clock

    async def erase_task(self, tenant: str, task_id: str) -> None:
        """Erase the facts and documents that are known from a task alone. Raises what the memory answers."""
        principal = Principal("orchestrator", "orchestrator", tenant)
        call = OutgoingCall(
            CallTarget.of(ERASE_TASK, task_id=task_id),
            self.minter.mint_access(principal, "memory", "memory:write"),
            Deadline.after(self.clock, ERASE_CALL_SECONDS),
        )
        await self.client.call(call, Erasure)
