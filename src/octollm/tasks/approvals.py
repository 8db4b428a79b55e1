"""Approvals in the database: what a task asks a person, and what the person decided.

A task that can do nothing else becomes ``waiting`` and releases its lease, so that it holds no worker, however long the
person takes. The decision makes it ``running`` again, and any worker continues it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

import msgspec
from sqlalchemy import select, update

from octollm.clock import Clock, format_rfc3339
from octollm.contracts.api import TaskFailure
from octollm.contracts.approvals import ApprovalDecision, ApprovalList, ApprovalView, PendingApproval
from octollm.contracts.task import PlanStep
from octollm.errors import OctoError
from octollm.storage import Database, DatabaseConnection, Transaction, row_to_dict
from octollm.storage.tables import approvals, steps, tasks
from octollm.tasks.records import TaskRecord, approval_from_row, put_off, task_from_row
from octollm.tasks.state import (
    ApprovalRequest,
    apply_goals,
    check_changed_goals,
    choose_approvals,
    find_required_approvals,
    is_final,
)
from octollm.tasks.store import TaskStore, TransactionHook

MAX_LISTED = 200
"""Pending approvals in one list."""


class DecisionArrivedError(Exception):
    """An approval was decided while the task was about to wait for it."""


class ApprovalStore:
    """The approvals of all tasks. A decision and what it does to its task are one transaction."""

    def __init__(self, db: Database, store: TaskStore, clock: Clock, *, default_seconds: float) -> None:
        """``default_seconds`` is the life of an approval whose policy has none."""
        self._db = db
        self._store = store
        self._clock = clock
        self._default_seconds = default_seconds

    async def read(self, task_id: str) -> dict[str, ApprovalView]:
        """Return a task's approvals by id, in the order in which they were requested."""
        async with self._db.read() as conn:
            return await _load(conn, task_id)

    async def request(
        self,
        task: TaskRecord,
        requests: Sequence[ApprovalRequest],
        known: Mapping[str, ApprovalView],
        *,
        suspend: bool,
    ) -> None:
        """Store the requests that ``known`` does not have; with ``suspend``, also let the task wait without a worker.

        The event ``task.waiting`` lists every pending approval. Raises :class:`DecisionArrivedError` when a person
        decided one of them after ``known`` was read, ``fence_lost`` and ``state_conflict``.
        """
        now = self._clock.now()
        expires_at = now + (task.contract.approval.expires_seconds or self._default_seconds)
        if task.contract.deadline is not None and task.deadline_at is not None:
            # A deadline that the client has set does not wait for anybody.
            expires_at = min(expires_at, task.deadline_at)
        new = [each for each in requests if each.approval_id not in known]
        if not new and not suspend:
            return
        added = [
            ApprovalView(
                each.approval_id, each.kind, each.reason, "pending", format_rfc3339(now), format_rfc3339(expires_at),
                each.step,
            )
            for each in new
        ]  # fmt: skip
        pending = [*(each for each in known.values() if each.status == "pending"), *added]

        async def store(tx: Transaction) -> None:
            stored = await _load(tx, task.task_id)
            if any(stored[name].status != view.status for name, view in known.items()):
                raise DecisionArrivedError
            for position, view in enumerate(added, len(stored)):
                await tx.execute(
                    tx.insert(approvals).values(
                        task_id=task.task_id,
                        approval_id=view.approval_id,
                        tenant=task.tenant,
                        position=position,
                        kind=view.kind,
                        step=view.step,
                        reason=view.reason,
                        status="pending",
                        requested_at=now,
                        expires_at=expires_at,
                    )
                )

        reason = " ".join(dict.fromkeys(each.reason for each in pending))
        data: dict[str, object] = {
            "reason": reason,
            "status": "waiting" if suspend else "running",
            "approvals": msgspec.to_builtins(pending),
        }
        if suspend:
            await self._store.change(
                task.task_id,
                "task.waiting",
                data,
                new_status="waiting",
                epoch=task.epoch,
                hook=store,
                waiting_since=now,
                # In the same statement: a worker that released it later could do so after another has claimed it.
                lease_holder=None,
                lease_until=None,
            )
        else:
            await self._store.change(task.task_id, "task.waiting", data, epoch=task.epoch, hook=store)

    async def decide(
        self, task_id: str, tenant: str, decision: ApprovalDecision, decided_by: str, hook: TransactionHook
    ) -> bool:
        """Record a decision; return whether it rejected, and so ended, the task.

        The same decision again has no effect. Raises ``task_not_found``; ``approval_invalid`` for an approval that the
        task does not have, and for goals that may not be changed; ``state_conflict`` when nothing is pending, or the
        approval was decided otherwise or has expired.
        """
        async with self._db.transaction() as tx:
            row = await self._store.load_row(tx, task_id, tenant)
            stored = await _load(tx, task_id)
            chosen = choose_approvals(stored, decision)
            if not chosen:
                return decision.decision == "reject"
            if is_final(row["status"]):
                raise OctoError(f"The task is {row['status']} already.", code="state_conflict")
            now = self._clock.now()
            task = task_from_row(row)
            if any(view.expires_at <= format_rfc3339(now) for view in chosen):
                raise OctoError("The approval has expired.", code="state_conflict")
            await self._change_goals(tx, task, chosen, decision.goals, now)
            values = {
                "status": "approved" if decision.decision == "approve" else "rejected",
                "decided_at": now,
                "decided_by": decided_by,
                "comment": decision.comment,
                "goals": decision.goals or None,
            }
            names = [view.approval_id for view in chosen]
            await tx.execute(
                update(approvals)
                .where(approvals.c.task_id == task_id, approvals.c.approval_id.in_(names))
                .values(**values)
            )
            data: dict[str, object] = {"approvals": names, "decided_by": decided_by, "comment": decision.comment}
            if decision.decision == "reject":
                comment = (decision.comment,) if decision.comment else ()
                error = TaskFailure("approval_rejected", f"{decided_by} rejected it.", comment)
                await self._store.fail(tx, row, error, data, hook)
                return True
            await self._resume(tx, row, now)
            await hook(tx)
            # A paused task stays so: it was another person who stopped it.
            status = "paused" if row["status"] == "paused" else "running"
            await self._store.append_event(
                tx,
                task_id,
                "task.approved",
                {**data, "goals": decision.goals, "status": status, "progress": row["progress"]},
            )
            return False

    async def _change_goals(
        self, tx: Transaction, task: TaskRecord, chosen: Sequence[ApprovalView], goals: Mapping[str, str], now: float
    ) -> None:
        if not goals:
            return
        records = {record.step: record for record in await self._store.load_steps(tx, task.task_id)}
        check_changed_goals(chosen, goals, {name for name, record in records.items() if record.status == "pending"})
        for name, goal in sorted(goals.items()):
            spec = msgspec.structs.replace(records[name].spec, goal=goal)
            where = (steps.c.task_id == task.task_id, steps.c.step == name)
            await tx.execute(update(steps).where(*where).values(spec=spec, updated_at=now))
        if task.plan is not None:
            plan = apply_goals(task.plan, goals)
            await tx.execute(update(tasks).where(tasks.c.task_id == task.task_id).values(plan=plan))

    async def _resume(self, tx: Transaction, row: Mapping[str, Any], now: float) -> None:
        """Set a waiting task running. Its time limit does not count the time for which it waited."""
        if row["status"] != "waiting":
            return
        await tx.execute(
            update(tasks)
            .where(tasks.c.task_id == row["task_id"])
            .values(status="running", waiting_since=None, deadline_at=put_off(row, now), updated_at=now)
        )

    async def list_pending(self, tenant: str) -> ApprovalList:
        """Return the tenant's pending approvals, those that expire first at the top."""
        query = (
            select(approvals, tasks.c.goal)
            .join(tasks, tasks.c.task_id == approvals.c.task_id)
            .where(approvals.c.tenant == tenant, approvals.c.status == "pending")
            .order_by(approvals.c.expires_at, approvals.c.task_id, approvals.c.position)
            .limit(MAX_LISTED)
        )
        async with self._db.read() as conn:
            rows = [row_to_dict(row) for row in await conn.all(query)]
        return ApprovalList(
            tuple(PendingApproval(row["task_id"], row["goal"][:300], approval_from_row(row)) for row in rows)
        )

    async def expire(self, limit: int) -> list[str]:
        """Fail up to ``limit`` tasks with an approval that nobody decided in time, and return their ids."""
        query = (
            select(approvals.c.task_id)
            .where(approvals.c.status == "pending", approvals.c.expires_at <= self._clock.now())
            .distinct()
            .order_by(approvals.c.task_id)
            .limit(limit)
        )
        async with self._db.read() as conn:
            task_ids = [str(row["task_id"]) for row in await conn.all(query)]
        return [task_id for task_id in task_ids if await self._expire_task(task_id)]

    async def _expire_task(self, task_id: str) -> bool:
        async with self._db.transaction() as tx:
            row = await self._store.load_row(tx, task_id)
            now = self._clock.now()
            overdue = approvals.c.task_id == task_id, approvals.c.status == "pending", approvals.c.expires_at <= now
            expired = await tx.all(
                update(approvals)
                .where(*overdue)
                .values(status="expired", decided_at=now)
                .returning(approvals.c.approval_id)
            )
            # Decided, or ended by another replica, since the list was read.
            if not expired or is_final(row["status"]):
                return False
            data: dict[str, object] = {"approvals": sorted(str(each["approval_id"]) for each in expired)}
            error = TaskFailure("approval_expired", "Nobody approved it in time.")
            await self._store.fail(tx, row, error, data)
            return True


class ApprovalGate:
    """Decides which ready steps of a running task may start, and requests the approvals that the others need."""

    def __init__(
        self,
        store: ApprovalStore,
        task: TaskRecord,
        plan_approval: str,
        arm_reasons: Mapping[str, str],
        may_call: Callable[[str, str], bool],
        read_cost: Callable[[], Awaitable[float]],
    ) -> None:
        """``arm_reasons`` has, by arm, why its steps need an approval.

        ``may_call`` says whether a step of an arm may lead to a call of a scope. ``read_cost`` returns what the task
        has used, in US dollars.
        """
        self._store = store
        self._task = task
        self._plan_approval = plan_approval
        self._arm_reasons = arm_reasons
        self._may_call = may_call
        self._read_cost = read_cost
        self._known: dict[str, ApprovalView] = {}
        self._missing: dict[str, ApprovalRequest] = {}

    async def filter(self, ready: Sequence[PlanStep]) -> list[PlanStep]:
        """Return the steps of ``ready`` that may start, with the goals that a person gave them."""
        policy = self._task.contract.approval
        self._missing = {}
        # What else a policy has says nothing of whether an approval is needed.
        needs_none = not policy.plan and not policy.steps and policy.cost_above_usd is None
        if needs_none and not any(step.approval or self._arm_reasons.get(step.arm) for step in ready):
            return list(ready)
        self._known = await self._store.read(self._task.task_id)
        approved = {name for name, view in self._known.items() if view.status == "approved"}
        goals = {step: goal for name in approved for step, goal in self._known[name].goals.items()}
        spent = await self._read_cost() if policy.cost_above_usd is not None else 0.0
        allowed: list[PlanStep] = []
        for step in ready:
            required = find_required_approvals(
                step,
                policy,
                plan_approval=self._plan_approval,
                arm_reason=self._arm_reasons.get(step.arm, ""),
                may_call=partial(self._may_call, step.arm),
                spent_usd=spent,
            )
            missing = [each for each in required if each.approval_id not in approved]
            self._missing |= {each.approval_id: each for each in missing}
            if not missing:
                allowed.append(msgspec.structs.replace(step, goal=goals.get(step.id, step.goal)))
        return allowed

    @property
    def holds_steps(self) -> bool:
        """Return whether the last :meth:`filter` held a step back."""
        return bool(self._missing)

    async def request(self, *, suspend: bool) -> bool:
        """Request what the steps that were held back need; with ``suspend``, let the task wait for it without a worker.

        Return ``False`` when a decision has arrived meanwhile, so that :meth:`filter` has to be asked again.
        """
        try:
            await self._store.request(self._task, tuple(self._missing.values()), self._known, suspend=suspend)
        except DecisionArrivedError:
            return False
        return True


async def _load(conn: DatabaseConnection, task_id: str) -> dict[str, ApprovalView]:
    query = select(approvals).where(approvals.c.task_id == task_id).order_by(approvals.c.position)
    return {row["approval_id"]: approval_from_row(row_to_dict(row)) for row in await conn.all(query)}
