"""The task store: each state change and its event are one transaction.

It rejects illegal transitions, and changes with an outdated fencing token.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from contextlib import AbstractAsyncContextManager
from typing import Any

from sqlalchemy import and_, or_, select, update

from octollm.clock import Clock
from octollm.contracts.api import (
    EventList,
    StepText,
    StepTexts,
    TaskFailure,
    TaskList,
    TaskView,
    decode_cursor,
    encode_cursor,
)
from octollm.contracts.task import Plan, Task, TaskStatus, Usage
from octollm.errors import OctoError
from octollm.events import EventLog, check_position, task_subject
from octollm.group_commit import GroupCommit
from octollm.storage import Database, DatabaseConnection, Transaction, row_to_dict
from octollm.storage.characters import NUL
from octollm.storage.errors import is_conflict
from octollm.storage.programs import Program, R, SqlStatement
from octollm.storage.tables import approvals, budgets, reservations, steps, task_files, tasks
from octollm.tasks.changes import (
    EVENT_SOURCE,
    Applied,
    NewTask,
    TaskChange,
    TaskCreation,
    apply_changes,
    create_tasks,
    plan_change,
    planning_change,
)
from octollm.tasks.records import (
    StepRecord,
    TaskRecord,
    approval_from_row,
    build_task_summary,
    build_task_view,
    step_from_row,
    task_from_row,
)
from octollm.tasks.state import OPEN_STATES, check_transition, is_final

MAX_CHILDREN = 100
"""Sub-tasks of one task."""
MAX_CONFLICTS = 3
"""Conflicts with other transactions after which a batch fails: its tasks must not fail for the first one."""
TransactionHook = Callable[[Transaction], Awaitable[None]]
"""Called in the same transaction, for further writes of the caller."""


class TaskStore:
    """The tasks of all tenants."""

    def __init__(self, db: Database, log: EventLog, clock: Clock) -> None:
        self._db = db
        self._log = log
        self._clock = clock
        self._batches: GroupCommit[Sequence[TaskChange], Applied] = GroupCommit(self._apply_batch, name="task changes")
        self._creations: GroupCommit[TaskCreation, None] = GroupCommit(self._create_batch, name="new tasks")

    def transaction(self) -> AbstractAsyncContextManager[Transaction]:
        """Begin a transaction of the store's database."""
        return self._db.transaction()

    async def create(
        self, new: NewTask, hook: TransactionHook | None = None, statements: Sequence[SqlStatement] = ()
    ) -> TaskView:
        """Store a task with its budget, its files and its ``task.accepted`` event, and return its view.

        A task of kind ``adhoc`` has no event. What ``hook`` or ``statements`` write is part of the same transaction;
        without a hook, tasks that are created at the same time share one.
        """
        now = self._clock.now()
        if hook is None:
            await self._creations.wait(TaskCreation(new, now, statements))
        else:
            async with self._db.transaction() as tx:
                await tx.execute(tx.insert(tasks).values(**new.row(now)))
                await tx.execute(tx.insert(budgets).values(**new.budget_row()))
                if rows := new.file_rows(now):
                    await tx.execute(tx.insert(task_files).on_conflict_do_nothing(), rows)
                # Before the event, because the lock on the event's subject comes last (lock order in `database.py`).
                await hook(tx)
                for statement in statements:
                    await tx.run(statement)
                if new.kind == "task":
                    await self._log.append_all(tx, [new.accepted()])
        # Built from the written values: reading them back would cost four queries and decode the contract again.
        empty = dict.fromkeys(("started_at", "finished_at", "output", "result", "error", "instructions"))
        return build_task_view({**new.row(now), **empty, "progress": 0.0}, [], Usage(), "")

    async def _create_batch(self, items: Sequence[TaskCreation]) -> Sequence[OctoError | None]:
        try:
            results = await self._run(lambda: create_tasks(self._log, items))
        except OctoError as error:
            if len(items) == 1 or error.code in ("unavailable", "overloaded"):
                raise
            # The database refused a value of one of them, which must not fail the others.
            return [await _catch(self._create_batch([item])) for item in items]
        self._log.notify_program()
        return results

    async def apply(self, *changes: TaskChange) -> Applied:
        """Write the changes of one task in one transaction, with those of other tasks; return what came of them.

        None of them is written when one may not be. Raises as :meth:`change`.
        """
        return await self._batches.wait(changes)

    async def _apply_batch(self, items: Sequence[Sequence[TaskChange]]) -> Sequence[Applied | OctoError]:
        try:
            results = await self._run(lambda: apply_changes(self._log, self._db.dialect, items, self._clock.now()))
        except OctoError as error:
            if len(items) == 1 or error.code in ("unavailable", "overloaded"):
                raise
            # The database refused a value of one of them, which must not fail the others.
            return [await _catch(self._apply_batch([item])) for item in items]
        self._log.notify_program()
        return results

    async def _run(self, program: Callable[[], Program[R]]) -> R:
        """Run a program; again, a few times, after a conflict with another transaction, which rolled it back."""
        for _ in range(MAX_CONFLICTS):
            try:
                return await self._db.run(program())
            except OctoError as error:
                if not is_conflict(error):
                    raise
        return await self._db.run(program())

    async def change(
        self,
        task_id: str,
        event: str,
        data: Mapping[str, object],
        *,
        new_status: TaskStatus | None = None,
        epoch: int | None = None,
        progress: float | None = None,
        step: tuple[str, Mapping[str, object]] | None = None,
        hook: TransactionHook | None = None,
        **columns: object,
    ) -> float:
        """Change a task (and one step), record ``event``, and return the task's progress.

        ``epoch`` is the fencing token: raises ``fence_lost`` when a newer one holds the task. Raises
        ``state_conflict`` for an illegal transition and for any change of a task that has ended.
        """
        if hook is None:
            statuses = () if new_status is None else (new_status,)
            changed_steps = () if step is None else (step,)
            change = TaskChange(task_id, ((event, data),), epoch, statuses, progress, columns, changed_steps)
            return (await self.apply(change)).progress
        async with self._db.transaction() as tx:
            row = await self.load_row(tx, task_id)
            # The fence first: an outdated worker gets `fence_lost` even if the newer one has ended the task already.
            # With `state_conflict` it would look up and report an end that is not its own.
            if epoch is not None and row["run"] != epoch:
                raise OctoError("A newer run holds the task.", code="fence_lost")
            if is_final(row["status"]):
                raise OctoError(f"The task is {row['status']} already.", code="state_conflict")
            if new_status is not None:
                check_transition(row["status"], new_status)
                columns["status"] = new_status
            # Progress never falls, in whatever order the reports of parallel steps are committed.
            new_progress = max(row["progress"], progress or 0.0)
            columns["progress"] = new_progress
            columns["updated_at"] = self._clock.now()
            await tx.execute(update(tasks).where(tasks.c.task_id == task_id).values(**columns))
            if step is not None:
                name, values = step
                await tx.execute(
                    update(steps)
                    .where(steps.c.task_id == task_id, steps.c.step == name)
                    .values(**values, updated_at=self._clock.now())
                )
            if new_status is not None and is_final(new_status):
                await self._cancel_open(tx, task_id)
            if hook is not None:
                await hook(tx)
            await self.append_event(tx, task_id, event, {**data, "progress": new_progress})
            return float(new_progress)

    async def fail(
        self,
        tx: Transaction,
        row: Mapping[str, Any],
        error: TaskFailure,
        data: Mapping[str, object],
        hook: TransactionHook | None = None,
    ) -> None:
        """Fail an open task from outside its worker. ``row`` is from :meth:`load_row` in the same transaction."""
        task_id, now = row["task_id"], self._clock.now()
        check_transition(row["status"], "failed")
        await tx.execute(
            update(tasks)
            .where(tasks.c.task_id == task_id)
            .values(status="failed", error=error, updated_at=now, finished_at=now)
        )
        await self._cancel_open(tx, task_id)
        if hook is not None:
            await hook(tx)
        ended = {
            "status": "failed",
            "code": error.code,
            "reason": error.detail,
            "reasons": list(error.reasons),
            "duration_ms": int((now - row["created_at"]) * 1000),
            "progress": row["progress"],
        }
        await self.append_event(tx, task_id, "task.failed", {**data, **ended})

    async def _cancel_open(self, tx: Transaction, task_id: str) -> None:
        """Cancel what is open of a task that ends: no step of a completed task is."""
        now = self._clock.now()
        open_steps = steps.c.task_id == task_id, steps.c.status.in_(("pending", "running"))
        await tx.execute(update(steps).where(*open_steps).values(status="cancelled", finished_at=now))
        pending = approvals.c.task_id == task_id, approvals.c.status == "pending"
        await tx.execute(update(approvals).where(*pending).values(status="cancelled", decided_at=now))

    async def set_plan(self, task_id: str, plan: Plan, epoch: int, *, replan: bool, reasons: Sequence[str]) -> None:
        """Store a plan with its steps and set the task running. A replan deletes the steps that did not complete."""
        await self.apply(plan_change(task_id, plan, epoch, replan=replan, reasons=reasons))

    async def begin_planning(self, task_id: str, epoch: int) -> None:
        """Move a task to ``planning``, without an event. Does nothing when it is in that state already."""
        await self.apply(planning_change(task_id, epoch))

    async def set_files(self, task_id: str, contract: Task, epoch: int) -> None:
        """Store the files of ``contract`` with what was noted when they were read. Raises ``fence_lost``."""
        async with self._db.transaction() as tx:
            row = await self.load_row(tx, task_id)
            if row["run"] != epoch:
                raise OctoError("A newer run holds the task.", code="fence_lost")
            values = {"contract": contract, "updated_at": self._clock.now()}
            await tx.execute(update(tasks).where(tasks.c.task_id == task_id).values(**values))

    async def was_replanned(self, task_id: str) -> bool:
        """Return whether the task was replanned."""
        async with self._db.read() as conn:
            query = select(steps.c.step).where(steps.c.task_id == task_id, steps.c.plan_number > 1).limit(1)
            return await conn.first(query) is not None

    async def get(self, task_id: str) -> TaskRecord:
        """Return a task; raise ``task_not_found``."""
        async with self._db.read() as conn:
            return task_from_row(await self.load_row(conn, task_id))

    async def epochs(self, task_ids: Set[str]) -> dict[str, int]:
        """Return the current epoch of each task; unknown tasks are omitted."""
        if not task_ids:
            return {}
        async with self._db.read() as conn:
            rows = await conn.all(select(tasks.c.task_id, tasks.c.run).where(tasks.c.task_id.in_(task_ids)))
        return {row["task_id"]: int(row["run"]) for row in rows}

    async def list_open(
        self, tenant: str, *, sub: str | None = None, cred: str | None = None, limit: int = 100
    ) -> list[str]:
        """Return the ids of open tasks of a principal or credential, oldest first."""
        query = select(tasks.c.task_id).where(
            tasks.c.tenant == tenant, tasks.c.kind == "task", tasks.c.status.in_(OPEN_STATES)
        )
        if sub is not None:
            query = query.where(tasks.c.sub == sub)
        if cred is not None:
            query = query.where(tasks.c.cred == cred)
        async with self._db.read() as conn:
            rows = await conn.all(query.order_by(tasks.c.created_at).limit(limit))
        return [str(row["task_id"]) for row in rows]

    async def list_expired_adhoc(self, limit: int) -> list[tuple[str, float]]:
        """Return id and creation time of open ad-hoc tasks past their deadline, the longest expired first."""
        query = select(tasks.c.task_id, tasks.c.created_at).where(
            tasks.c.kind == "adhoc", tasks.c.status.in_(OPEN_STATES), tasks.c.deadline_at <= self._clock.now()
        )
        async with self._db.read() as conn:
            rows = await conn.all(query.order_by(tasks.c.deadline_at).limit(limit))
        return [(str(row["task_id"]), float(row["created_at"])) for row in rows]

    async def list_ended_with_reservations(self, ended_before: float, limit: int) -> list[str]:
        """Return ids of tasks that ended before a moment and still have open reservations."""
        query = (
            select(tasks.c.task_id)
            .join(reservations, reservations.c.task_id == tasks.c.task_id)
            .where(
                reservations.c.state == "open",
                tasks.c.status.not_in(OPEN_STATES),
                tasks.c.finished_at <= ended_before,
            )
            .distinct()
            .limit(limit)
        )
        async with self._db.read() as conn:
            return [str(row["task_id"]) for row in await conn.all(query)]

    async def steps(self, task_id: str) -> list[StepRecord]:
        """Return a task's steps in the plan's order."""
        async with self._db.read() as conn:
            return await self.load_steps(conn, task_id)

    async def load_steps(self, conn: DatabaseConnection, task_id: str) -> list[StepRecord]:
        """Return a task's steps in the plan's order, as ``conn`` sees them."""
        return [step_from_row(row) for row in await _load_steps(conn, task_id)]

    async def view(self, task_id: str, tenant: str) -> TaskView:
        """Return the API's view of a task; raise ``task_not_found``, also for another tenant's."""
        async with self._db.read() as conn:
            # All from one snapshot: a live session continues from `version`, which must agree with status and steps.
            row = await self.load_row(conn, task_id, tenant)
            budget = await conn.first(select(budgets).where(budgets.c.task_id == task_id))
            usage = Usage()
            if budget is not None:
                usage = Usage(budget["prompt_tokens"], budget["completion_tokens"], budget["used_cost_usd"])
            latest = (
                select(reservations.c.model)
                .where(reservations.c.task_id == task_id)
                .order_by(reservations.c.created_at.desc())
                .limit(1)
            )
            requested = select(approvals).where(approvals.c.task_id == task_id).order_by(approvals.c.position)
            children = select(tasks).where(tasks.c.parent_task_id == task_id).order_by(tasks.c.created_at)
            return build_task_view(
                row,
                await _load_steps(conn, task_id),
                usage,
                str(await conn.scalar(latest) or ""),
                tuple(approval_from_row(row_to_dict(each)) for each in await conn.all(requested)),
                tuple(build_task_summary(row_to_dict(each)) for each in await conn.all(children.limit(MAX_CHILDREN))),
            )

    async def list(self, tenant: str, *, limit: int, cursor: str, status: str | None, text: str = "") -> TaskList:
        """Return a page of tasks, newest first; raise ``invalid_parameter`` for an invalid cursor."""
        conditions = [tasks.c.tenant == tenant, tasks.c.kind == "task"]
        if status is not None:
            conditions.append(tasks.c.status == status)
        if text:
            conditions.append(tasks.c.goal.icontains(text, autoescape=True))
        if cursor:
            at, last = decode_cursor(cursor)
            # The id breaks ties: with the time alone, a page would skip or repeat tasks created at the same moment.
            conditions.append(or_(tasks.c.created_at < at, and_(tasks.c.created_at == at, tasks.c.task_id < last)))
        query = (
            select(tasks)
            .where(*conditions)
            .order_by(tasks.c.created_at.desc(), tasks.c.task_id.desc())
            .limit(limit + 1)
        )
        async with self._db.read() as conn:
            rows = await conn.all(query)
        more = len(rows) > limit
        page = rows[:limit]
        following = encode_cursor(page[-1]["created_at"], page[-1]["task_id"]) if more else None
        return TaskList(tuple(build_task_summary(row_to_dict(row)) for row in page), following)

    async def history(self, task_id: str, tenant: str, after: int, limit: int) -> EventList:
        """Return a page of a task's events after the version ``after``. Raises as :func:`check_position` does."""
        async with self._db.read() as conn:
            row = await self.load_row(conn, task_id, tenant)
            events = await self._log.read_subject(task_subject(task_id), after, limit, tenant=tenant, connection=conn)
        check_position(after, events[0].version if events else row["version"] + 1, row["version"])
        return EventList(tuple(events), events[-1].version if events else after)

    async def texts(self, task_id: str, tenant: str) -> StepTexts:
        """Return the last saved text of each step."""
        async with self._db.read() as conn:
            await self.load_row(conn, task_id, tenant)
            rows = await _load_steps(conn, task_id)
        return StepTexts(
            tuple(
                StepText(row["step"], row["attempt"], row["run"], row["text"], row["text_base"])
                for row in rows
                if row["text"]
            )
        )

    async def save_text(self, task_id: str, step: str, *, attempt: int, epoch: int, base: int, text: str) -> None:
        """Save the current text of a running step, which begins at offset ``base``.

        There is no event for it: clients get token frames from the stream.
        """
        async with self._db.transaction() as tx:
            await tx.execute(
                update(steps)
                .where(
                    steps.c.task_id == task_id,
                    steps.c.step == step,
                    steps.c.attempt == attempt,
                    # The fence: the last flush of an earlier holder must not overwrite the text of the current one.
                    or_(steps.c.run.is_(None), steps.c.run <= epoch),
                )
                .values(text=text, text_base=base, run=epoch)
            )

    async def append_event(self, tx: Transaction, task_id: str, event: str, data: Mapping[str, object]) -> None:
        """Append an event of a task, as the last write of a transaction (lock order in `database.py`)."""
        row = await self.load_row(tx, task_id)
        appended = await self._log.append(
            tx,
            event,
            subject=task_subject(task_id),
            tenant=row["tenant"],
            source=EVENT_SOURCE,
            data={"task_id": task_id, **data},
            correlation_id=row["correlation_id"],
            traceparent=row["traceparent"],
        )
        # In the same transaction, so that a reader of this version also finds its event in the history.
        await tx.execute(update(tasks).where(tasks.c.task_id == task_id).values(version=appended.version))

    async def load_row(self, conn: DatabaseConnection, task_id: str, tenant: str | None = None) -> Mapping[str, Any]:
        """Return a task's row, locked when ``conn`` is a transaction; raise ``task_not_found``."""
        query = select(tasks).where(tasks.c.task_id == task_id)
        if isinstance(conn, Transaction):
            # Locked, so that what is decided from the row is still true at the commit. FOR NO KEY UPDATE rather than
            # FOR UPDATE: foreign keys to the row (a journal entry, a reservation) take KEY SHARE, and must not wait.
            query = query.with_for_update(key_share=True)
        # PostgreSQL takes no text with U+0000, not even to compare it.
        row = None if NUL in task_id else await conn.first(query)
        if row is None or (tenant is not None and (row["tenant"] != tenant or row["kind"] != "task")):
            raise OctoError("There is no task of that id.", code="task_not_found")
        return row_to_dict(row)


async def _catch(batch: Awaitable[Sequence[R | OctoError]]) -> R | OctoError:
    """Return the outcome of a batch of one."""
    try:
        return (await batch)[0]
    except OctoError as error:
        return error


async def _load_steps(conn: DatabaseConnection, task_id: str) -> Sequence[Mapping[str, Any]]:
    query = select(steps).where(steps.c.task_id == task_id).order_by(steps.c.plan_number, steps.c.position).limit(200)
    return [row_to_dict(row) for row in await conn.all(query)]
