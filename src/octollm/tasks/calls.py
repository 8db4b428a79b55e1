"""The orchestrator's own calls for a task: plan, execute, accept, remember."""

from __future__ import annotations

import hashlib
from typing import TypeVar

import msgspec

from octollm.capability import ScopeSet
from octollm.contracts.operations import AcceptRequest, AcceptResult, DocumentIn, DocumentOut
from octollm.contracts.services import route_of, service_of
from octollm.contracts.task import ExecuteResult, Plan, PlanRequest, TaskContract
from octollm.resilience import Deadline, Patience
from octollm.rpc.caller import Caller, OnLine, Outgoing, Target
from octollm.tasks.authority import TaskAuthority
from octollm.tasks.records import TaskRecord

T = TypeVar("T")

PATIENCE = Patience(20.0)
"""A task waits so long for a service that is away: longer than a process takes to start again."""


class TaskCalls:
    """Calls made in the name of one task, each with just the authority that it needs."""

    def __init__(self, caller: Caller, authority: TaskAuthority, task: TaskRecord, allowed: ScopeSet) -> None:
        self._caller = caller
        self._authority = authority
        self._task = task
        self._allowed = allowed

    async def plan(self, request: PlanRequest, deadline: Deadline, on_line: OnLine) -> Plan:
        """Ask the planner for a plan."""
        return await self._call("planner:plan", request, Plan, deadline, step="plan", on_line=on_line)

    async def execute(
        self, arm: str, contract: TaskContract, deadline: Deadline, *, step: str, attempt: int, on_line: OnLine
    ) -> ExecuteResult:
        """Have an arm do a step. The key names task, step and attempt, so that a repeat is answered alike."""
        files = tuple(file.digest for file in contract.context.files if file.digest is not None)
        return await self._call(
            f"{arm}:execute",
            contract,
            ExecuteResult,
            deadline,
            step=step,
            attempt=attempt,
            files=files,
            key=f"{self._task.task_id}:{step}:{attempt}",
            on_line=on_line,
        )

    async def accept(
        self, request: AcceptRequest, deadline: Deadline, *, step: str, attempt: int, on_line: OnLine
    ) -> AcceptResult:
        """Ask the judge about a step's result. It may read the task's files and what the step made."""
        files = {file.digest for file in request.files if file.digest is not None}
        files |= {artifact.digest for artifact in request.result.artifacts}
        return await self._call(
            "judge:accept",
            request,
            AcceptResult,
            deadline,
            step=step,
            attempt=attempt,
            files=tuple(sorted(files)),
            on_line=on_line,
        )

    async def remember(self, document: DocumentIn, deadline: Deadline) -> DocumentOut:
        """Put a document that came with the task into memory."""
        key = hashlib.sha256(f"{self._task.task_id}:{document.name}:{document.digest}".encode()).hexdigest()
        return await self._call("memory:write", document, DocumentOut, deadline, key=key)

    async def _call(
        self,
        scope: str,
        body: object,
        answer: type[T],
        deadline: Deadline,
        *,
        step: str | None = None,
        attempt: int | None = None,
        files: tuple[str, ...] = (),
        key: str | None = None,
        on_line: OnLine | None = None,
    ) -> T:
        family, operation = scope.split(":", 1)
        route = route_of(family, operation)
        bearer = self._authority.bearer(
            self._task, scope, self._allowed, deadline, step=step, attempt=attempt, files=files
        )
        outgoing = Outgoing(
            Target(service_of(family), f"{family}.{operation}", route.method, route.path, route.kind),
            bearer,
            deadline,
            msgspec.json.encode(body),
            key,
            patience=PATIENCE,
        )
        return await self._caller.answer(outgoing, answer, on_line=on_line)
