"""The orchestrator's own calls for a task: plan, execute, accept, store a document.

Each call has its own token, minted for its scope alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import TypeVar

import msgspec

from octollm.capability import Declarations, DelegationTree, Principal, RootMinter, Scope, ScopeSet, TaskRef, attenuate
from octollm.contracts.operations import (
    AcceptRequest,
    AcceptResult,
    DocumentIn,
    DocumentOut,
    RunRequest,
    RunResult,
)
from octollm.contracts.service_operations import route_of
from octollm.contracts.services import service_of
from octollm.contracts.stream import StreamEvent
from octollm.contracts.task import INLINE_ARTIFACTS_HEADER, FileRef, Plan, PlanRequest, StepResult, Task
from octollm.documents.model import FlatDocument, decode_flat_document
from octollm.errors import OctoError
from octollm.lru import LruCache
from octollm.resilience import Deadline, OutageRetry
from octollm.rpc.client import CallTarget, OnEvent, OutgoingCall, ServiceClient
from octollm.tasks.records import TaskRecord

MAX_TREES = 512
"""Delegation trees that are kept until the declarations change."""


class TaskTokenMinter:
    """Mints the tokens for the calls of tasks. ``thumbprint`` returns the thumbprint of a service's key.

    What a call may lead to is computed once for the same declarations, scope, authority and files: the tasks of one
    credential share it. ``declarations`` returns the same object until they change.
    """

    def __init__(
        self,
        minter: RootMinter,
        declarations: Callable[[], Declarations],
        thumbprint: Callable[[str], str | None],
    ) -> None:
        self._minter = minter
        self._declarations = declarations
        self._thumbprint = thumbprint
        self._known: Declarations = {}
        self._trees: LruCache[tuple[str, str, tuple[str, ...] | None], tuple[DelegationTree, list[str]]] = LruCache(
            MAX_TREES
        )

    def _attenuate(
        self, scope: str, authority: ScopeSet, files: tuple[str, ...] | None = None
    ) -> tuple[DelegationTree, list[str]]:
        """Return what :func:`attenuate` does. Without ``files``, the file scopes are as wide as the authority."""
        declarations = self._declarations()
        if declarations is not self._known:
            self._trees.clear()
            self._known = declarations
        key = (scope, str(authority), files)
        found = self._trees.get(key)
        if found is None:
            # The callee reads the files of this call only: `files:read` becomes one scope for each digest.
            bound = {} if files is None else {"files:read": tuple(f"files:read:{digest}" for digest in files)}
            found = attenuate(scope, declarations, authority, bindings=bound)
            self._trees.put(key, found)
        return found

    def mint(
        self,
        task: TaskRecord,
        scope: str,
        authority: ScopeSet,
        deadline: Deadline,
        *,
        step: str | None = None,
        attempt: int | None = None,
        files: tuple[str, ...] = (),
    ) -> str:
        """Return a bearer token for one call of ``scope`` on behalf of the task.

        ``authority`` are the task's scopes that its principal still has; ``files`` are the digests that the callee
        may read. Raises ``authority_missing``, naming the scopes, before anything runs.
        """
        service = service_of(scope.split(":", 1)[0])
        may, missing = self._attenuate(scope, authority, files)
        if missing:
            raise OctoError(f"The task lacks the authority for {', '.join(missing)}.", code="authority_missing")
        ref = TaskRef(task.task_id, step, attempt, task.epoch)
        # The access token only starts the call, so 60 s suffice; the grant covers the nested calls until the deadline.
        remaining = max(1.0, deadline.remaining())
        return self._minter.mint_access(
            Principal(task.sub, task.cred, task.tenant),
            service,
            scope,
            60.0,
            task=ref,
            delegation=may,
            holder_jkt=self._thumbprint(service),
            grant_lifetime=min(remaining, 3600.0),
        )

    def may_call(self, scope: str, call: str, authority: ScopeSet) -> bool:
        """Return whether the grant that goes with a call of ``scope`` allows its callee the call ``call``."""
        may, _ = self._attenuate(scope, authority)
        return may.subtree(Scope(call)) is not None

    def may_lead_to(self, scope: str, call: str, authority: ScopeSet) -> bool:
        """Return whether a call of ``scope`` may lead to the call ``call``, by its callee or by any after it."""
        may, _ = self._attenuate(scope, authority)
        return _reaches(may, Scope(call))


def _reaches(tree: DelegationTree, call: Scope) -> bool:
    return any(call.contains(scope) or scope.contains(call) or _reaches(under, call) for scope, under in tree.items())


T = TypeVar("T")

MAX_INLINE_BYTES = 128 * 1024
"""Bytes of artifacts that an arm may send with its result, in all; larger ones it uploads."""
OUTAGE_RETRY = OutageRetry(20.0)
"""Seconds that a call rides out an outage of the callee: longer than a service takes to restart."""


class TaskCalls:
    """The calls of one task, each with only the authority that it needs."""

    def __init__(
        self, client: ServiceClient, token_minter: TaskTokenMinter, task: TaskRecord, allowed_scopes: ScopeSet
    ) -> None:
        self._client = client
        self._token_minter = token_minter
        self._task = task
        self._allowed_scopes = allowed_scopes

    def may_execute(self, arm: str) -> bool:
        """Return whether the task may have steps of an arm."""
        return self._allowed_scopes.allows(f"{arm}:execute")

    def may_lead_to(self, scope: str, call: str) -> bool:
        """Return whether a call of ``scope`` for the task may lead to the call ``call``."""
        return self._token_minter.may_lead_to(scope, call, self._allowed_scopes)

    async def plan(self, request: PlanRequest, deadline: Deadline, on_event: OnEvent, *, attempt: int) -> Plan:
        """Ask the planner for a plan.

        The operation is read-only, so the planner stores no response under the key. But the keys of its model calls
        are derived from it: after a takeover they are answered from the model journal, at no cost.
        """
        return await self._call(
            "planner:plan",
            request,
            Plan,
            deadline,
            step="plan",
            key=f"{self._task.task_id}:{attempt}:plan",
            on_event=on_event,
        )

    async def execute(
        self, arm: str, contract: Task, deadline: Deadline, *, step: str, attempt: int, call: int, on_event: OnEvent
    ) -> StepResult:
        """Have an arm execute a step.

        The key is derived from task, step and ``call``, the first of the attempts that repeat one call, but not from
        the epoch: a worker that takes over repeats the call with the same key and gets the stored response. Small
        artifacts come with the result, because this process stores the files of tasks: each upload would be a call
        back. Raises ``authority_missing`` for artifacts of an arm that may not write files, and ``peer_protocol`` for a
        text that does not match its digest.
        """
        files = tuple(file.digest for file in contract.context.files if file.digest is not None)
        scope = f"{arm}:execute"
        result = await self._call(
            scope,
            contract,
            StepResult,
            deadline,
            step=step,
            attempt=attempt,
            files=files,
            key=f"{self._task.task_id}:{step}:{call}",
            on_event=on_event,
            headers={INLINE_ARTIFACTS_HEADER: str(MAX_INLINE_BYTES)},
        )
        if result.texts and not self._token_minter.may_call(scope, "files:write", self._allowed_scopes):
            raise OctoError(f"The arm {arm} made files without the authority files:write.", code="authority_missing")
        for digest, text in result.texts.items():
            if hashlib.sha256(text.encode()).hexdigest() != digest:
                raise OctoError(f"The arm {arm} sent a text that is not the artifact's.", code="peer_protocol")
        return result

    async def accept(
        self, request: AcceptRequest, deadline: Deadline, *, step: str, attempt: int, on_event: OnEvent
    ) -> AcceptResult:
        """Ask the judge about a step's result. It may read the task's files and the step's artifacts.

        The key serves the judge's model calls, like that of :meth:`plan`.
        """
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
            key=f"{self._task.task_id}:{step}:{attempt}:accept",
            on_event=on_event,
        )

    async def store_document(self, document: DocumentIn, deadline: Deadline) -> DocumentOut:
        """Put a document that came with the task into memory."""
        # Hashed, because a file name may contain characters that an idempotency key must not.
        key = hashlib.sha256(f"{self._task.task_id}:{document.name}:{document.digest}".encode()).hexdigest()
        return await self._call("memory:write", document, DocumentOut, deadline, key=key)

    async def read_file(self, file: FileRef, deadline: Deadline) -> FlatDocument:
        """Have the executor read a file of a binary format.

        Raises what is wrong with the file, ``no_sandbox``, and what a call raises.
        """

        async def ignore(_event: StreamEvent) -> None:
            """Ignore an event: the stream keeps the connection alive while the file is read."""

        result = await self._call(
            "executor:run",
            RunRequest("read", (), (file,)),
            RunResult,
            deadline,
            files=() if file.digest is None else (file.digest,),
            key=f"{self._task.task_id}:read:{file.digest}",
            on_event=ignore,
        )
        return decode_flat_document(result.stdout)

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
        on_event: OnEvent | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> T:
        family, operation = scope.split(":", 1)
        route = route_of(family, operation)
        bearer = self._token_minter.mint(
            self._task, scope, self._allowed_scopes, deadline, step=step, attempt=attempt, files=files
        )
        outgoing = OutgoingCall(
            CallTarget(service_of(family), f"{family}.{operation}", route.method, route.path, route.kind),
            bearer,
            deadline,
            msgspec.json.encode(body),
            key,
            headers=headers or {},
            outage_retry=OUTAGE_RETRY,
        )
        return await self._client.call(outgoing, answer, on_event=on_event)
