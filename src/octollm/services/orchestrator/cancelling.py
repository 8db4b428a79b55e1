"""Ending tasks before their time: one that is cancelled, or all of a credential that was revoked."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from octollm.clock import Clock
from octollm.errors import OctoError
from octollm.services.orchestrator.audit import Actor, record_audit
from octollm.services.orchestrator.revoking import RevocationStore
from octollm.storage import Transaction
from octollm.tasks.store import TaskStore
from octollm.tasks.worker import Worker


@dataclass(frozen=True, slots=True)
class TaskCanceller:
    """Cancels tasks: their tokens are revoked and their work is stopped all the way down."""

    store: TaskStore
    revocation_store: RevocationStore
    worker: Worker
    clock: Clock
    announce: Callable[[str], Awaitable[None]]
    """Tells the other replicas."""

    async def cancel(self, task_id: str, actor: Actor, reason: str = "") -> None:
        """Cancel a task of the actor's tenant; raises ``state_conflict`` for one that has ended."""
        tenant = actor.principal.tenant
        now = self.clock.now()

        async def also(tx: Transaction) -> None:
            await self.revocation_store.add(tx, "task", task_id, tenant)
            await record_audit(tx, actor, "task.cancelled", task_id, now, {"reason": reason} if reason else None)

        data = {"status": "cancelled", **({"reason": reason} if reason else {})}
        await self.store.change(task_id, "task.cancelled", data, new_status="cancelled", hook=also, finished_at=now)
        await self.worker.stop(task_id)
        await self.announce(task_id)

    async def cancel_all(self, actor: Actor, reason: str, *, sub: str | None = None, cred: str | None = None) -> int:
        """Cancel every open task of a principal or credential in the actor's tenant, and return how many."""
        done = 0
        while found := await self.store.list_open(actor.principal.tenant, sub=sub, cred=cred):
            for task_id in found:
                try:
                    await self.cancel(task_id, actor, reason)
                    done += 1
                except OctoError as error:
                    if error.code != "state_conflict":  # it ended by itself meanwhile
                        raise
        return done
