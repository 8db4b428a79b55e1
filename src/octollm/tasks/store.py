"""The task store: each state change and its event are one transaction.

It rejects illegal transitions, and changes with an outdated fencing token.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import and_, or_, select, update

from octollm.clock import Clock
from octollm.contracts.api import EventList, StepText, StepTexts, TaskList, TaskView, decode_cursor, encode_cursor
from octollm.contracts.task import Plan, Task, TaskStatus, Usage
from octollm.errors import OctoError
from octollm.events import EventLog, task_subject
from octollm.storage import Database, DatabaseConnection, Transaction, row_to_dict
from octollm.storage.tables import budgets, reservations, steps, task_files, tasks
from octollm.tasks.records import (
    StepRecord,
    TaskRecord,
    build_task_summary,
    build_task_view,
    step_from_row,
    task_from_row,
)
from octollm.tasks.state import OPEN_STATES, check_transition, is_final

EVENT_SOURCE = "orchestrator"
TransactionHook = Callable[[Transaction], Awaitable[None]]
"""Called in the same transaction, for further writes of the caller."""


@dataclass(frozen=True, slots=True)
class NewTask:
    """A task to store. ``deadline_at`` is in seconds since the Unix epoch."""

    task_id: str
    tenant: str
    sub: str
    cred: str
    authority: str
    contract: Task
    correlation_id: str
    traceparent: str
    deadline_at: float | None
    kind: str = "task"


class TaskStore:
    """The tasks of all tenants."""

    def __init__(self, db: Database, log: EventLog, clock: Clock) -> None:
        self._db = db
        self._log = log
        self._clock = clock

    def transaction(self) -> AbstractAsyncContextManager[Transaction]:
        """Begin a transaction of the store's database."""
        return self._db.transaction()

    async def create(self, new: NewTask, hook: TransactionHook | None = None) -> TaskView:
        """Store a task with its budget, its files and its ``task.accepted`` event, and return its view.

        A task of kind ``adhoc`` has no event. The writes of ``hook`` are part of the same transaction.
        """
        now = self._clock.now()
        row: dict[str, Any] = {
            "task_id": new.task_id,
            "tenant": new.tenant,
            "kind": new.kind,
            "sub": new.sub,
            "cred": new.cred,
            "authority": new.authority,
            "goal": new.contract.goal,
            "contract": new.contract,
            "priority": new.contract.priority,
            "parent_task_id": new.contract.parent_task_id,
            "correlation_id": new.correlation_id,
            "traceparent": new.traceparent,
            "status": "running" if new.kind == "adhoc" else "accepted",
            # The first event of a new subject has version 1.
            "version": 1 if new.kind == "task" else 0,
            "created_at": now,
            "updated_at": now,
            "deadline_at": new.deadline_at,
        }
        async with self._db.transaction() as tx:
            await tx.execute(tx.insert(tasks).values(**row))
            await tx.execute(
                tx.insert(budgets).values(
                    task_id=new.task_id,
                    max_tokens=new.contract.budget.max_tokens,
                    max_cost_usd=new.contract.budget.max_cost_usd,
                )
            )
            for file in new.contract.context.files:
                if file.digest is not None:
                    await tx.execute(
                        tx.insert(task_files)
                        .values(task_id=new.task_id, role="input", name=file.name, digest=file.digest, created_at=now)
                        .on_conflict_do_nothing()
                    )
            if hook is not None:
                # Before the event, because the lock on the event's subject comes last (lock order in `database.py`).
                await hook(tx)
            if new.kind == "task":
                await self._log.append(
                    tx,
                    "task.accepted",
                    subject=task_subject(new.task_id),
                    tenant=new.tenant,
                    source=EVENT_SOURCE,
                    data={"task_id": new.task_id, "goal": new.contract.goal[:2000], "progress": 0.0},
                    correlation_id=new.correlation_id,
                    traceparent=new.traceparent,
                )
        # Built from the written values: reading them back would cost four queries and decode the contract again.
        empty = dict.fromkeys(("started_at", "finished_at", "output", "result", "error"))
        return build_task_view({**row, **empty, "progress": 0.0}, [], Usage(), "")

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
        async with self._db.transaction() as tx:
            row = await self._load_row(tx, task_id)
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
            if new_status is not None and is_final(new_status) and new_status != "completed":
                await tx.execute(
                    update(steps)
                    .where(steps.c.task_id == task_id, steps.c.status.in_(("pending", "running")))
                    .values(status="cancelled", finished_at=self._clock.now())
                )
            if hook is not None:
                await hook(tx)
            await self._append_event(tx, task_id, event, {**data, "progress": new_progress})
            return float(new_progress)

    async def set_plan(self, task_id: str, plan: Plan, epoch: int, *, replan: bool, reasons: Sequence[str]) -> None:
        """Store a plan with its steps and set the task running. A replan deletes the steps that did not complete."""
        async with self._db.transaction() as tx:
            row = await self._load_row(tx, task_id)
            if row["run"] != epoch:
                raise OctoError("A newer run holds the task.", code="fence_lost")
            check_transition(row["status"], "running")
            now = self._clock.now()
            if replan:
                await tx.execute(steps.delete().where(steps.c.task_id == task_id, steps.c.status != "completed"))
            for position, step in enumerate(plan.steps):
                await tx.execute(
                    tx.insert(steps)
                    .values(
                        task_id=task_id,
                        step=step.id,
                        position=position,
                        plan_number=2 if replan else 1,
                        arm=step.arm,
                        title=step.title,
                        spec=step,
                        created_at=now,
                        updated_at=now,
                    )
                    # The new plan includes the completed steps; their rows, which have the results, are kept.
                    .on_conflict_do_nothing()
                )
            new_progress = max(row["progress"], 10.0)
            await tx.execute(
                update(tasks)
                .where(tasks.c.task_id == task_id)
                .values(
                    plan=plan,
                    status="running",
                    progress=new_progress,
                    updated_at=now,
                    started_at=row["started_at"] or now,
                )
            )
            listed = [
                {"step": s.id, "title": s.title, "arm": s.arm, "depends_on": list(s.depends_on)} for s in plan.steps
            ]
            data: dict[str, object] = {"steps": listed, "progress": new_progress}
            if replan:
                data["reasons"] = list(reasons)
            await self._append_event(tx, task_id, "task.replanned" if replan else "task.planned", data)
            if not replan:
                await self._append_event(tx, task_id, "task.started", {"progress": new_progress})

    async def begin_planning(self, task_id: str, epoch: int) -> None:
        """Move a task to ``planning``, without an event. Does nothing when it is in that state already."""
        async with self._db.transaction() as tx:
            row = await self._load_row(tx, task_id)
            if row["run"] != epoch:
                raise OctoError("A newer run holds the task.", code="fence_lost")
            if row["status"] != "planning":
                check_transition(row["status"], "planning")
                values = {"status": "planning", "updated_at": self._clock.now()}
                await tx.execute(update(tasks).where(tasks.c.task_id == task_id).values(**values))

    async def set_files(self, task_id: str, contract: Task, epoch: int) -> None:
        """Store the files of ``contract`` with what was noted when they were read. Raises ``fence_lost``."""
        async with self._db.transaction() as tx:
            row = await self._load_row(tx, task_id)
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
            return task_from_row(await self._load_row(conn, task_id))

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
            return [step_from_row(row) for row in await _load_steps(conn, task_id)]

    async def view(self, task_id: str, tenant: str) -> TaskView:
        """Return the API's view of a task; raise ``task_not_found``, also for another tenant's."""
        async with self._db.read() as conn:
            # All from one snapshot: a live session continues from `version`, which must agree with status and steps.
            row = await self._load_row(conn, task_id, tenant)
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
            return build_task_view(row, await _load_steps(conn, task_id), usage, str(await conn.scalar(latest) or ""))

    async def list(self, tenant: str, *, limit: int, cursor: str, status: str | None) -> TaskList:
        """Return a page of tasks, newest first; raise ``invalid_parameter`` for an invalid cursor."""
        conditions = [tasks.c.tenant == tenant, tasks.c.kind == "task"]
        if status is not None:
            conditions.append(tasks.c.status == status)
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
        """Return a page of a task's events after the version ``after``."""
        async with self._db.read() as conn:
            await self._load_row(conn, task_id, tenant)
        events = await self._log.read_subject(task_subject(task_id), after, limit, tenant=tenant)
        return EventList(tuple(events), events[-1].version if events else after)

    async def texts(self, task_id: str, tenant: str) -> StepTexts:
        """Return the last saved text of each step."""
        async with self._db.read() as conn:
            await self._load_row(conn, task_id, tenant)
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

    async def _append_event(self, tx: Transaction, task_id: str, event: str, data: Mapping[str, object]) -> None:
        row = await self._load_row(tx, task_id)
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

    async def _load_row(self, conn: DatabaseConnection, task_id: str, tenant: str | None = None) -> Mapping[str, Any]:
        query = select(tasks).where(tasks.c.task_id == task_id)
        if isinstance(conn, Transaction):
            # Locked, so that what is decided from the row is still true at the commit. FOR NO KEY UPDATE rather than
            # FOR UPDATE: foreign keys to the row (a journal entry, a reservation) take KEY SHARE, and must not wait.
            query = query.with_for_update(key_share=True)
        row = await conn.first(query)
        if row is None or (tenant is not None and (row["tenant"] != tenant or row["kind"] != "task")):
            raise OctoError("There is no task of that id.", code="task_not_found")
        return row_to_dict(row)


async def _load_steps(conn: DatabaseConnection, task_id: str) -> Sequence[Mapping[str, Any]]:
    query = select(steps).where(steps.c.task_id == task_id).order_by(steps.c.plan_number, steps.c.position).limit(200)
    return [row_to_dict(row) for row in await conn.all(query)]
