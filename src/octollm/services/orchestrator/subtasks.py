"""Sub-tasks: which task a new one belongs to, and what it inherits from it.

A sub-task gets no more than its parent has: the same deadline or an earlier one, a share of the same budget, the
parent's approvals, and the part of its authority that whoever submits it may use.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import msgspec
from starlette.requests import Request

from octollm.capability import Scope, ScopeSet, VerifiedChain, attenuate
from octollm.capability.tokens import GrantClaims
from octollm.contracts.screening import MAX_SCREENED, Risk, ScreeningRecord, max_risk
from octollm.contracts.task import Task
from octollm.contracts.task_operations import CANCEL_TASK, READ_TASK, SUBMIT_TASK
from octollm.errors import FieldError, OctoError
from octollm.rpc.auth import AuthContext, CapabilityAuthenticator
from octollm.rpc.call import IncomingCall, Operation
from octollm.screening import Screener, iter_task_texts, summarize_screening
from octollm.services.orchestrator.registry import ServiceRegistry
from octollm.storage import Transaction
from octollm.tasks.family import TaskFamily
from octollm.tasks.ledger import BudgetLedger, BudgetShare
from octollm.tasks.records import TaskRecord
from octollm.tasks.scheduling import MAX_GENERATIONS
from octollm.tasks.state import is_final, merge_policies

ORCHESTRATED = ("planner:plan", "judge:accept", "memory:write", "executor:run")
"""What the orchestrator calls for any task by itself; a sub-task needs it, whatever its arm may call."""
_FOR_ARMS = frozenset({SUBMIT_TASK.id, READ_TASK.id, CANCEL_TASK.id})
GuardrailMode = Literal["block", "log", "off"]
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Parent:
    """The task that a sub-task belongs to, what is left of its budget, and the authority that the sub-task gets."""

    task: TaskRecord
    share: BudgetShare
    authority: ScopeSet


class SubTaskGuardrail:
    """Screens what arms submit, as the gateway screens what clients do: an arm may repeat what a document told it."""

    def __init__(self, mode: GuardrailMode) -> None:
        self._mode = mode
        self._screener: Screener | None = None
        self._compiling = asyncio.Lock()

    async def check(self, contract: Task) -> ScreeningRecord | None:
        """Return the record of the findings, if there are any. Raises ``goal_refused`` at the text that is refused."""
        if self._mode == "off":
            return None
        screener = await self._get_screener()
        matches: Counter[str] = Counter()
        worst: Risk = "none"
        for pointer, text, is_instruction in iter_task_texts(contract):
            screening = screener.screen(text[:MAX_SCREENED])
            matches.update(summarize_screening(screening).found)
            # A file is material for the work, not an instruction.
            risk: Risk = screening.risk if is_instruction or screening.risk != "high" else "medium"
            worst = max_risk(worst, risk)
            if is_instruction and screening.decision == "refuse" and self._mode == "block":
                fault = FieldError(pointer, screening.reason)
                raise OctoError(screening.reason, code="goal_refused", field_errors=(fault,))
        return ScreeningRecord(worst, dict(matches)) if matches else None

    async def _get_screener(self) -> Screener:
        # At the first sub-task of an arm: compiling the patterns takes long, and most installations need none.
        async with self._compiling:
            if self._screener is None:
                self._screener = await asyncio.to_thread(Screener)
            return self._screener


@dataclass(frozen=True, slots=True)
class SubTasks:
    """Finds the parents of new tasks, and hands down what they inherit."""

    family: TaskFamily
    ledger: BudgetLedger
    registry: ServiceRegistry
    guardrail: SubTaskGuardrail

    async def find_parent(self, call: IncomingCall, contract: Task, scopes: ScopeSet) -> Parent | None:
        """Return the task that a submission belongs to; ``None`` when it stands for itself.

        An arm submits for the task that it works on, whatever it says. ``scopes`` are what the principal has now.
        Raises ``task_not_found``, also for another tenant's task, and ``state_conflict`` for a parent that has ended or
        is nested too deeply.
        """
        work, named = call.authority.task, contract.parent_task_id
        grant = _grant_of_caller(call.authority)
        if grant is not None:
            if work is None or named not in (None, work.task):
                raise _not_found()
            named = work.task
            await self._check_files(grant, named, contract)
        if named is None:
            return None
        try:
            task = await self.family.find_parent(named, call.tenant)
        except OctoError as error:
            if grant is not None or error.code != "task_not_found":
                raise
            raise _not_found() from error
        if is_final(task.status):
            raise OctoError(f"The parent task is {task.status} already.", code="state_conflict")
        share = await self.ledger.share(task.task_id)
        if len(share.ancestors) > MAX_GENERATIONS:
            raise OctoError(f"Sub-tasks are nested {MAX_GENERATIONS} deep at most.", code="state_conflict")
        authority = ScopeSet.parse(task.authority).intersection(scopes)
        if grant is not None:
            authority = authority.intersection(self._granted(grant, authority))
        return Parent(task, share, authority)

    def _granted(self, grant: GrantClaims, authority: ScopeSet) -> ScopeSet:
        """Return what a sub-task of an arm may use: the calls of the arm's grant, and what every task needs."""
        declarations = self.registry.declarations()
        needed = ScopeSet.parse(" ".join(ORCHESTRATED))
        below = (scope for own in ORCHESTRATED for scope in attenuate(own, declarations, authority)[0].scopes())
        return ScopeSet((*grant.may.scopes(), *needed, *below))

    async def _check_files(self, grant: GrantClaims, task_id: str, contract: Task) -> None:
        """Raise ``file_invalid`` for a file that the arm may not read itself: its sub-task would read it out for it."""
        unknown = {
            file.digest
            for file in contract.context.files
            # Others are no digests: the validation refuses them.
            if file.digest is not None
            and _DIGEST.fullmatch(file.digest)
            and grant.may.subtree(Scope(f"files:read:{file.digest}")) is None
        }
        if unknown:
            unknown -= await self.family.files_of_arms(task_id, unknown)
        for index, file in enumerate(contract.context.files):
            if file.digest in unknown:
                pointer = f"/context/files/{index}/digest"
                # As for a file that is not stored, so that the refusal does not say which are.
                detail = f"{file.name} is no file of this task; send it with POST /files first."
                raise OctoError(detail, code="file_invalid", field_errors=(FieldError(pointer, detail),))

    async def screen(self, authority: VerifiedChain, contract: Task) -> ScreeningRecord | None:
        """Screen what an arm submits; see :meth:`SubTaskGuardrail.check`. The gateway has screened the rest."""
        return await self.guardrail.check(contract) if authority.is_delegated else None

    async def check_access(self, authority: VerifiedChain, operation: Operation, task_id: str) -> None:
        """Refuse an arm all operations on tasks but those on its sub-tasks.

        Scopes alone do not: ``tasks:create`` also opens schedules and tokens for direct calls, which would have the
        principal's whole authority. Raises ``scope_missing``, and ``task_not_found`` for a task that is not below the
        one that the arm works on.
        """
        if not operation.scope.startswith("tasks:") or _grant_of_caller(authority) is None:
            return
        if operation.name not in _FOR_ARMS:
            raise OctoError("An arm submits, reads and cancels sub-tasks, and no more.", code="scope_missing")
        if operation.name != SUBMIT_TASK.id:
            await self.check_reach(authority, task_id)

    async def check_reach(self, authority: VerifiedChain, task_id: str) -> None:
        """Raise ``task_not_found`` when an arm calls, and the task is not below the one that the arm works on."""
        work = authority.task
        if _grant_of_caller(authority) is None:
            return
        if work is None or not await self.family.is_below(task_id, work.task):
            raise OctoError("There is no task of that id.", code="task_not_found")

    def inherit(self, parent: Parent, contract: Task, deadline_at: float) -> tuple[Task, float]:
        """Return the contract of a sub-task, and its deadline, within the limits of its parent.

        ``contract`` is complete but for its tokens. Raises ``budget_invalid`` when it wants more than is left.
        """
        share, wanted = parent.share, contract.budget.max_tokens
        if wanted is not None and wanted > share.tokens:
            detail = f"The parent task has {share.tokens} tokens left."
            raise OctoError(detail, code="budget_invalid", field_errors=(FieldError("/budget/max_tokens", detail),))
        if share.share < 1:
            raise OctoError("The parent task has no tokens left.", code="budget_exhausted")
        budget = msgspec.structs.replace(contract.budget, max_tokens=wanted or share.share)
        above = parent.task.contract
        contract = msgspec.structs.replace(
            contract,
            budget=budget,
            approval=merge_policies(above.approval, contract.approval),
            priority=min(contract.priority, above.priority),
            parent_task_id=parent.task.task_id,
        )
        ends_at = parent.task.deadline_at
        return contract, deadline_at if ends_at is None else min(deadline_at, ends_at)

    async def lock(self, tx: Transaction, parent: Parent) -> None:
        """Make sure, in the transaction that stores a sub-task, that its parent may have it.

        Raises ``state_conflict``.
        """
        await self.family.lock_parent(tx, parent.task.task_id, parent.share.ancestors[0])


class SubTaskAuthenticator:
    """As the capability authenticator, and arms reach their sub-tasks only.

    It decides before the handler and before a stored response is returned, and for every operation on tasks, also for
    one that is added later.
    """

    def __init__(self, capabilities: CapabilityAuthenticator, subtasks: SubTasks) -> None:
        self._capabilities = capabilities
        self._subtasks = subtasks

    async def authenticate(self, request: Request, operation: Operation) -> AuthContext:
        """Return the verified capability; raise what both raise."""
        auth = await self._capabilities.authenticate(request, operation)
        if auth.verified is not None:
            await self._subtasks.check_access(auth.verified, operation, str(request.path_params.get("task_id", "")))
        return auth


def _grant_of_caller(authority: VerifiedChain) -> GrantClaims | None:
    """Return the grant under which an arm makes the call; ``None`` for a call that no arm makes."""
    grants = [link for link in authority.links if isinstance(link, GrantClaims) and link != authority.grant]
    return grants[-1] if grants else None


def _not_found() -> OctoError:
    detail = "There is no task of that id."
    return OctoError(detail, code="task_not_found", field_errors=(FieldError("/parent_task_id", detail),))
