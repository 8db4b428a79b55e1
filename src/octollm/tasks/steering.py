"""Steering in the database: pause and resume, instructions, skipped steps, and larger limits.

A paused task holds no worker and no lease, and its fencing token rises, so that nothing of what ran before can change
it or spend from its budget. Each change and its event are one transaction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from sqlalchemy import select, update

from octollm.clock import Clock, format_rfc3339
from octollm.contracts.attempts import AttemptRequest
from octollm.contracts.steering import MAX_INSTRUCTIONS, ExtendRequest, Instruction
from octollm.contracts.task import TaskStatus
from octollm.errors import OctoError
from octollm.storage import Transaction
from octollm.storage.tables import approvals, attempts, budgets, steps, tasks
from octollm.tasks.limits import TaskLimits, extend_limits
from octollm.tasks.records import put_off, task_from_row
from octollm.tasks.state import SKIPPED_RESULT, check_skip, check_transition, is_final, resume_status
from octollm.tasks.store import TaskStore, TransactionHook


class SteeringStore:
    """What people do to tasks that go on. ``author`` is who does it; ``hook`` writes in the same transaction."""

    def __init__(self, store: TaskStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    async def pause(self, task_id: str, tenant: str, author: str, hook: TransactionHook) -> int | None:
        """Pause a task; return the fencing token of the run that it ended, or ``None`` when it was paused already.

        Raises ``task_not_found``, and ``state_conflict`` when it has ended.
        """
        async with self._store.transaction() as tx:
            row = await self._store.load_row(tx, task_id, tenant)
            if row["status"] == "paused":
                return None
            check_transition(row["status"], "paused")
            now = self._clock.now()
            await tx.execute(
                update(tasks)
                .where(tasks.c.task_id == task_id)
                .values(
                    status="paused",
                    # Whoever ran it has an outdated token from now on, whether or not it hears of the pause.
                    run=row["run"] + 1,
                    lease_holder=None,
                    lease_until=None,
                    # One that waited already has not used its time since then.
                    waiting_since=row["waiting_since"] or now,
                    updated_at=now,
                )
            )
            await hook(tx)
            data = {"by": author, "status": "paused", "progress": row["progress"]}
            await self._store.append_event(tx, task_id, "task.paused", data)
            return int(row["run"])

    async def resume(self, task_id: str, tenant: str, author: str, hook: TransactionHook) -> bool:
        """Let a paused task go on; return ``False`` when it was not paused. Raises as :meth:`pause`."""
        async with self._store.transaction() as tx:
            row = await self._store.load_row(tx, task_id, tenant)
            _refuse_ended(row)
            if row["status"] != "paused":
                return False
            status, now = resume_status(has_started=row["started_at"] is not None), self._clock.now()
            check_transition(row["status"], status)
            values = {
                "status": status,
                "waiting_since": None,
                "deadline_at": put_off(row, now),
                "updated_at": now,
            }
            await tx.execute(update(tasks).where(tasks.c.task_id == task_id).values(**values))
            await self._begin_anew(tx, task_id, len(row["instructions"] or ()), now)
            await hook(tx)
            data = {"by": author, "status": status, "progress": row["progress"]}
            await self._store.append_event(tx, task_id, "task.resumed", data)
            return True

    async def _begin_anew(self, tx: Transaction, task_id: str, instructions: int, now: float) -> None:
        """Have the attempts that the pause interrupted begin anew, if there are instructions that they do not know.

        The others are made again with their keys, so that what their calls have finished is not done twice.
        """
        query = select(attempts).where(attempts.c.task_id == task_id, attempts.c.status == "running")
        for row in await tx.all(query.order_by(attempts.c.step).limit(1000)):
            if len(msgspec.convert(row["request"], AttemptRequest).instructions) == instructions:
                continue
            step, attempt = row["step"], row["attempt"]
            await tx.execute(
                update(steps)
                .where(steps.c.task_id == task_id, steps.c.step == step, steps.c.attempt == attempt)
                .values(attempt=attempt + 1, updated_at=now)
            )
            ended = attempts.c.task_id == task_id, attempts.c.step == step, attempts.c.attempt == attempt
            await tx.execute(update(attempts).where(*ended).values(status="interrupted", finished_at=now))

    async def instruct(self, task_id: str, tenant: str, text: str, author: str, hook: TransactionHook) -> None:
        """Add an instruction to a task. Raises as :meth:`pause`, also when it has as many as it may have."""
        async with self._store.transaction() as tx:
            row = await self._store.load_row(tx, task_id, tenant)
            _refuse_ended(row)
            given: Sequence[Any] = row["instructions"] or ()
            if len(given) >= MAX_INSTRUCTIONS:
                raise OctoError(f"A task takes {MAX_INSTRUCTIONS} instructions at most.", code="state_conflict")
            now = self._clock.now()
            instruction = Instruction(text, author, format_rfc3339(now))
            values = {"instructions": [*given, msgspec.to_builtins(instruction)], "updated_at": now}
            await tx.execute(update(tasks).where(tasks.c.task_id == task_id).values(**values))
            await hook(tx)
            data = {"by": author, "text": text, "number": len(given) + 1, "progress": row["progress"]}
            await self._store.append_event(tx, task_id, "task.instructed", data)

    async def skip(self, task_id: str, tenant: str, step: str, author: str, hook: TransactionHook) -> bool:
        """Have a task go on without a step; return ``False`` when it is skipped already.

        As by a pause, the present run ends with its calls: a worker goes on from what is stored, so it matters neither
        which of them ran the step, nor whether the step was about to begin. Raises as :func:`check_skip`.
        """
        async with self._store.transaction() as tx:
            row = await self._store.load_row(tx, task_id, tenant)
            found = await tx.first(select(steps.c.status).where(steps.c.task_id == task_id, steps.c.step == step))
            if not check_skip(row["status"], step, None if found is None else found["status"]):
                return False
            now = self._clock.now()
            status: TaskStatus = "paused" if row["status"] == "paused" else "running"
            values: dict[str, object] = {"run": row["run"] + 1, "lease_holder": None, "lease_until": None}
            if row["status"] == "waiting":
                values |= {"waiting_since": None, "deadline_at": put_off(row, now)}
            await tx.execute(
                update(tasks).where(tasks.c.task_id == task_id).values(**values, status=status, updated_at=now)
            )
            await tx.execute(
                update(steps)
                .where(steps.c.task_id == task_id, steps.c.step == step)
                .values(status="skipped", result=SKIPPED_RESULT, reasons=None, finished_at=now, updated_at=now)
            )
            begun = attempts.c.task_id == task_id, attempts.c.step == step, attempts.c.status == "running"
            await tx.execute(update(attempts).where(*begun).values(status="interrupted", finished_at=now))
            asked = approvals.c.task_id == task_id, approvals.c.step == step, approvals.c.status == "pending"
            await tx.execute(update(approvals).where(*asked).values(status="cancelled", decided_at=now))
            await hook(tx)
            data = {"step": step, "by": author, "status": status, "progress": row["progress"]}
            await self._store.append_event(tx, task_id, "step.skipped", data)
            return True

    async def extend(
        self, task_id: str, tenant: str, request: ExtendRequest, author: str, hook: TransactionHook
    ) -> bool:
        """Give a task larger limits; return ``False`` when it has them already.

        Raises as :meth:`pause`, and ``budget_invalid`` and ``deadline_invalid`` for a limit that is below the present
        one or out of bounds.
        """
        async with self._store.transaction() as tx:
            row = await self._store.load_row(tx, task_id, tenant)
            _refuse_ended(row)
            now = self._clock.now()
            contract = task_from_row(row).contract
            present = TaskLimits(contract.budget, row["deadline_at"], contract.deadline)
            limits = extend_limits(present, request, now)
            if limits == present:
                return False
            contract = msgspec.structs.replace(contract, budget=limits.budget, deadline=limits.deadline)
            await tx.execute(
                update(tasks)
                .where(tasks.c.task_id == task_id)
                .values(contract=contract, deadline_at=limits.deadline_at, updated_at=now)
            )
            await tx.execute(
                update(budgets)
                .where(budgets.c.task_id == task_id)
                .values(max_tokens=limits.budget.max_tokens, max_cost_usd=limits.budget.max_cost_usd)
            )
            await hook(tx)
            ends = None if limits.deadline_at is None else format_rfc3339(limits.deadline_at)
            data = {
                "by": author,
                "max_tokens": limits.budget.max_tokens,
                "max_cost_usd": limits.budget.max_cost_usd,
                "max_time_seconds": limits.budget.max_time_seconds,
                "deadline": ends,
                "progress": row["progress"],
            }
            await self._store.append_event(tx, task_id, "task.extended", data)
            return True


def _refuse_ended(row: Mapping[str, Any]) -> None:
    if is_final(row["status"]):
        raise OctoError(f"The task is {row['status']} already.", code="state_conflict")
