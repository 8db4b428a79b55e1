"""Tasks that end from outside their worker: cancellation, approvals, expiry, parents, and what an end leaves reserved.

An ad-hoc task stands for a token that was issued for direct calls. No worker runs it, so a sweep ends it when the token
expires.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from octollm.capability import Principal
from octollm.clock import Clock
from octollm.concurrency import BackgroundLoop, LoopLogger
from octollm.contracts.approvals import ApprovalDecision
from octollm.errors import OctoError
from octollm.services.orchestrator.audit import Actor, record_audit
from octollm.services.orchestrator.revocation import RevocationStore
from octollm.storage import Transaction
from octollm.tasks.approvals import ApprovalStore
from octollm.tasks.clock_guard import ClockGuard
from octollm.tasks.family import TaskFamily
from octollm.tasks.ledger import BudgetLedger
from octollm.tasks.store import TaskStore, TransactionHook
from octollm.tasks.worker import Worker
from octollm.telemetry import Metrics

SWEEP_SECONDS = 2.0
"""Interval of the sweeps for expired ad-hoc tasks and approvals."""
SWEEP_BATCH = 100
ORPHAN_SECONDS = 60.0
"""Seconds after a task's end until an open reservation is orphaned: twice as long as a settlement is tried."""


@dataclass(frozen=True, slots=True)
class TaskCanceller:
    """Cancels tasks: revokes their tokens and stops their work down to the last call."""

    store: TaskStore
    revocation_store: RevocationStore
    worker: Worker
    clock: Clock
    metrics: Metrics
    announce: Callable[[str], Awaitable[None]]
    """Announces a cancelled task id to the other replicas."""
    family: TaskFamily

    async def cancel(
        self, task_id: str, actor: Actor, reason: str = "", *, hook: TransactionHook | None = None
    ) -> None:
        """Cancel a task of the actor's tenant; raise ``state_conflict`` for one that has ended.

        What ``hook`` writes is part of the same transaction.
        """
        ended: list[str] = []
        await self._end(task_id, actor, reason, ended, hook)
        # Last, so that the whole tree stops at the same time.
        await asyncio.gather(*(self.worker.stop(each) for each in ended))

    async def _end(
        self, task_id: str, actor: Actor, reason: str, ended: list[str], hook: TransactionHook | None = None
    ) -> None:
        """Cancel a task and its sub-tasks, and begin to stop them; add them to ``ended``."""
        tenant = actor.principal.tenant
        now = self.clock.now()

        async def revoke_and_audit(tx: Transaction) -> None:
            # In the transaction of the end: a crash leaves no cancelled task whose tokens are still valid.
            await self.revocation_store.add(tx, "task", task_id, tenant)
            await record_audit(tx, actor, "task.cancelled", task_id, now, {"reason": reason} if reason else None)
            if hook is not None:
                await hook(tx)

        data = {"status": "cancelled", **({"reason": reason} if reason else {})}
        await self.store.change(
            task_id, "task.cancelled", data, new_status="cancelled", hook=revoke_and_audit, finished_at=now
        )
        # Counted here and not by the worker: a task may be cancelled before any worker has it.
        self.metrics.tasks.labels("cancelled").inc()
        ended.append(task_id)
        # After the commit: a worker that stops releases its lease, and an open task would be claimed again.
        self.worker.cancel(task_id)
        await self.announce(task_id)
        await self._end_orphans(task_id, ended)

    async def cancel_orphans(self, parent: str | None = None) -> int:
        """Cancel sub-tasks, of one parent if it is given, that are to end with their parent; return their number.

        At most :data:`SWEEP_BATCH` of them. A sub-task is cancelled in the name of its own principal.
        """
        return await self._end_orphans(parent, [])

    async def _end_orphans(self, parent: str | None, ended: list[str]) -> int:
        orphans = await self.family.orphans(SWEEP_BATCH, parent)
        for each in orphans:
            actor = Actor(Principal(each.sub, each.cred, each.tenant), service="orchestrator")
            try:
                await self._end(each.task_id, actor, each.reason, ended)
            except OctoError as error:
                if error.code != "state_conflict":  # it ended by itself meanwhile
                    raise
        return len(orphans)

    async def stop_work(self, task_id: str) -> None:
        """Stop the worker of a cancelled task, here or at another replica; harmless when it has stopped."""
        self.worker.cancel(task_id)
        await self.announce(task_id)
        await self.worker.stop(task_id)

    async def cancel_all(self, actor: Actor, reason: str, *, sub: str | None = None, cred: str | None = None) -> int:
        """Cancel every open task of a principal or credential in the actor's tenant, and return how many."""
        count = 0
        while task_ids := await self.store.list_open(actor.principal.tenant, sub=sub, cred=cred):
            for task_id in task_ids:
                try:
                    await self.cancel(task_id, actor, reason)
                    count += 1
                except OctoError as error:
                    if error.code != "state_conflict":  # the task ended by itself meanwhile
                        raise
        return count


@dataclass(frozen=True, slots=True)
class ApprovalDecisions:
    """What a person decides about a task: it goes on, or it ends."""

    approvals: ApprovalStore
    canceller: TaskCanceller
    worker: Worker
    clock: Clock
    metrics: Metrics

    async def decide(self, task_id: str, decision: ApprovalDecision, actor: Actor) -> None:
        """Record the decision with who made it; raise as :meth:`ApprovalStore.decide`."""
        principal = actor.principal
        action = "task.approved" if decision.decision == "approve" else "task.rejected"
        detail = {"approval": decision.approval_id, "comment": decision.comment, "goals": sorted(decision.goals)}

        async def audit(tx: Transaction) -> None:
            await record_audit(tx, actor, action, task_id, self.clock.now(), detail)

        if await self.approvals.decide(task_id, principal.tenant, decision, principal.sub, audit):
            await self._end(task_id)
        else:
            self.worker.wake()

    async def expire(self) -> int:
        """Fail up to :data:`SWEEP_BATCH` tasks whose approval nobody decided in time, and return their number."""
        task_ids = await self.approvals.expire(SWEEP_BATCH)
        for task_id in task_ids:
            await self._end(task_id)
        return len(task_ids)

    async def _end(self, task_id: str) -> None:
        self.metrics.tasks.labels("failed").inc()
        # Its other steps may be running, here or at another replica.
        await self.canceller.stop_work(task_id)


@dataclass(frozen=True, slots=True)
class TaskExpiry:
    """Ends what has expired: ad-hoc tasks with their token, and tasks with an approval that nobody decided.

    Every replica may sweep: each task ends once.
    """

    store: TaskStore
    ledger: BudgetLedger
    decisions: ApprovalDecisions
    clock: Clock
    metrics: Metrics
    clock_guard: ClockGuard

    async def sweep(self) -> int:
        """End up to :data:`SWEEP_BATCH` expired tasks, settle their reservations, and return how many ended here."""
        count = 0
        for task_id, created_at in await self.store.list_expired_adhoc(SWEEP_BATCH):
            now = self.clock.now()

            async def settle(tx: Transaction, task_id: str = task_id) -> None:
                # In the transaction of the end, so that the final usage includes what was still reserved.
                await self.ledger.settle_open(tx, task_id)

            data = {
                "status": "completed",
                "duration_ms": int((now - created_at) * 1000),
                "reason": "The token that the task stood for has expired.",
            }
            try:
                await self.store.change(
                    task_id,
                    "task.completed",
                    data,
                    new_status="completed",
                    progress=100.0,
                    hook=settle,
                    finished_at=now,
                )
            except OctoError as error:
                if error.code != "state_conflict":  # another replica ended it since the list was read
                    raise
            else:
                self.metrics.tasks.labels("completed").inc()
                count += 1
        return count

    async def settle_orphans(self) -> int:
        """Settle, at its upper bound, what is still reserved for tasks that ended a while ago; return their number.

        A model call that dies with its process leaves a reservation that nobody settles.
        """
        # Later than the end: a call that is cut off by it settles what it really used within this time.
        task_ids = await self.store.list_ended_with_reservations(self.clock.now() - ORPHAN_SECONDS, SWEEP_BATCH)
        for task_id in task_ids:
            async with self.store.transaction() as tx:
                await self.ledger.settle_open(tx, task_id)
        return len(task_ids)

    def expiry_loop(self, log: LoopLogger) -> BackgroundLoop:
        """Return the loop that sweeps in the background."""

        async def sweep_all() -> None:
            # By a clock that is wrong, everything may look expired.
            await self.clock_guard.check()
            while await self.sweep() == SWEEP_BATCH:
                pass
            while await self.settle_orphans() == SWEEP_BATCH:
                pass
            while await self.decisions.expire() == SWEEP_BATCH:
                pass
            while await self.decisions.canceller.cancel_orphans() == SWEEP_BATCH:
                pass

        return BackgroundLoop("task expiry", sweep_all, interval=SWEEP_SECONDS, restart=True, log=log)
