"""Steering over HTTP: pause, resume, instructions, skipped steps and larger limits of a task that goes on."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec

from octollm.capability import run_value
from octollm.clock import Clock
from octollm.contracts import task_operations
from octollm.contracts.api import TaskView
from octollm.contracts.steering import ExtendRequest, InstructionRequest, SkipRequest
from octollm.errors import FieldError, OctoError
from octollm.rpc.call import IncomingCall, Operation, implement
from octollm.rpc.idempotency import IdempotencyKey
from octollm.rpc.idempotency_sql import SqlIdempotencyStore
from octollm.services.orchestrator.audit import actor_from_call, record_audit
from octollm.services.orchestrator.task_endings import TaskCanceller
from octollm.storage import Transaction
from octollm.storage.characters import find_nul
from octollm.tasks.steering import SteeringStore
from octollm.tasks.store import TaskStore, TransactionHook


@dataclass(frozen=True, slots=True)
class SteeringApi:
    """The operations that change how a task goes on, each recorded with who asked for it."""

    store: TaskStore
    steering: SteeringStore
    canceller: TaskCanceller
    idempotency: SqlIdempotencyStore
    clock: Clock

    async def pause(self, call: IncomingCall, _body: object) -> TaskView:
        """Pause a task with its sub-tasks: their tokens are revoked and their calls are stopped.

        Pausing it again changes nothing.
        """
        task_id, tenant = call.path["task_id"], call.tenant
        await self._pause(call, task_id)
        # After the task itself, whose arms would submit more of them.
        for each in await self._descendants(task_id):
            with _unless_ended():
                await self._pause(call, each)
        return await self.store.view(task_id, tenant)

    async def _pause(self, call: IncomingCall, task_id: str) -> None:
        tenant = call.tenant

        async def record(tx: Transaction) -> None:
            await self._revoke_run(tx, task_id, tenant)
            await self._record(call, "task.paused", task_id)(tx)

        await self.steering.pause(task_id, tenant, call.authority.subject, record)
        # Also after a repeated call: the first may have been cut off before it stopped the work.
        await self.canceller.stop_work(task_id)

    async def _revoke_run(self, tx: Transaction, task_id: str, tenant: str) -> None:
        """Revoke the tokens of the run that ends, as after a take-over: its arms may hold them until they expire."""
        row = await self.store.load_row(tx, task_id)
        await self.canceller.revocation_store.add(tx, "run", run_value(task_id, int(row["run"]) - 1), tenant)

    async def _descendants(self, task_id: str) -> list[str]:
        """Return the open sub-tasks below a task, of all generations."""
        found, waiting = list[str](), [task_id]
        while waiting:
            children = await self.canceller.family.open_children(waiting.pop())
            found += children
            waiting += children
        return found

    async def resume(self, call: IncomingCall, _body: object) -> TaskView:
        """Let a paused task go on with its sub-tasks. Resuming it again changes nothing."""
        task_id, tenant = call.path["task_id"], call.tenant
        author, action = call.authority.subject, "task.resumed"
        await self.steering.resume(task_id, tenant, author, self._record(call, action, task_id))
        for each in await self._descendants(task_id):
            with _unless_ended():
                await self.steering.resume(each, tenant, author, self._record(call, action, each))
        self.canceller.worker.wake()
        return await self.store.view(task_id, tenant)

    async def instruct(self, call: IncomingCall, body: InstructionRequest) -> TaskView:
        """Add an instruction, once for each idempotency key."""
        task_id, tenant, text = call.path["task_id"], call.tenant, body.text.strip()
        if not text or find_nul(text) is not None:
            detail = "The instruction is empty." if not text else "A text contains U+0000, which cannot be stored."
            raise OctoError(detail, code="invalid_body", field_errors=(FieldError("/text", detail),))
        if not await self.idempotency.find_effect(IdempotencyKey.of(call)):
            record = self._record(call, "task.instructed", task_id, {"text": text})
            await self.steering.instruct(task_id, tenant, text, call.authority.subject, record)
        return await self.store.view(task_id, tenant)

    async def skip(self, call: IncomingCall, body: SkipRequest) -> TaskView:
        """Have a task go on without a step. Skipping it again changes nothing."""
        task_id, tenant = call.path["task_id"], call.tenant

        async def record(tx: Transaction) -> None:
            await self._revoke_run(tx, task_id, tenant)
            await self._record(call, "step.skipped", task_id, {"step": body.step})(tx)

        if find_nul(body.step) is not None or not await self.steering.skip(
            task_id, tenant, body.step, call.authority.subject, record
        ):
            return await self.store.view(task_id, tenant)
        # Here only: another replica hears of it with its next renewal, and by then a new run may be under way.
        await self.canceller.worker.stop(task_id)
        self.canceller.worker.wake()
        return await self.store.view(task_id, tenant)

    async def extend(self, call: IncomingCall, body: ExtendRequest) -> TaskView:
        """Raise the limits of a task. The same limits again change nothing."""
        task_id, tenant = call.path["task_id"], call.tenant
        record = self._record(call, "task.extended", task_id, msgspec.to_builtins(body))
        await self.steering.extend(task_id, tenant, body, call.authority.subject, record)
        return await self.store.view(task_id, tenant)

    def _record(
        self, call: IncomingCall, action: str, task_id: str, detail: Mapping[str, object] | None = None
    ) -> TransactionHook:
        """Return the writes that record who did it, and that the key of the call has had its effect."""

        async def record(tx: Transaction) -> None:
            await record_audit(tx, actor_from_call(call), action, task_id, self.clock.now(), detail)
            await self.idempotency.record_effect(tx, IdempotencyKey.of(call), action)

        return record

    def operations(self) -> list[Operation]:
        """Return their declarations."""
        return [
            implement(task_operations.PAUSE_TASK, self.pause),
            implement(task_operations.RESUME_TASK, self.resume),
            implement(task_operations.INSTRUCT_TASK, self.instruct),
            implement(task_operations.EXTEND_TASK, self.extend),
            implement(task_operations.SKIP_STEP, self.skip),
        ]


@contextmanager
def _unless_ended() -> Generator[None]:
    """Let a sub-task that has ended since it was listed be."""
    try:
        yield
    except OctoError as error:
        if error.code != "state_conflict":
            raise
