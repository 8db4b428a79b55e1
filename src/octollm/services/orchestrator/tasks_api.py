"""Tasks over HTTP: submit, list, read, cancel; artifacts, events and the trace of a task."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote

import msgspec
from msgspec import UNSET
from starlette.responses import Response

from octollm.capability import Principal, RootMinter, TaskRef
from octollm.clock import Clock, IdGenerator
from octollm.contracts import public_api
from octollm.contracts.api import Acknowledgement, EventList, EventQuery, StepTexts, TaskList, TaskQuery, TaskView
from octollm.contracts.observability import TraceView
from octollm.contracts.screening import SCREENING_HEADER, RejectedGoal, ScreeningRecord
from octollm.contracts.service_operations import READ_TRACE
from octollm.contracts.task import Task
from octollm.errors import OctoError
from octollm.resilience import Deadline
from octollm.rpc.call import IncomingCall, Operation, OperationResponse, implement
from octollm.rpc.client import CallTarget, OutgoingCall, ServiceClient
from octollm.rpc.idempotency import IdempotencyKey
from octollm.rpc.idempotency_sql import SqlIdempotencyStore
from octollm.services.orchestrator.accounts import Accounts
from octollm.services.orchestrator.audit import actor_from_call, record_audit
from octollm.services.orchestrator.files import FileStore, build_file_response
from octollm.services.orchestrator.registry import ServiceRegistry
from octollm.services.orchestrator.submission import (
    BudgetDefaults,
    detect_file_kinds,
    store_inline_files,
    validate_contract,
)
from octollm.services.orchestrator.task_endings import TaskCanceller
from octollm.storage import Transaction
from octollm.tasks.store import NewTask, TaskStore
from octollm.tasks.worker import Worker
from octollm.telemetry.spans import TASK_ATTRIBUTE

TRACE_TIMEOUT = 10.0


class TraceClient:
    """Reads traces from the monitor, with a token that is restricted to one task."""

    def __init__(self, client: ServiceClient, minter: RootMinter, clock: Clock) -> None:
        self._client = client
        self._minter = minter
        self._clock = clock

    async def fetch_task_trace(self, reader: Principal, task_id: str, deadline: Deadline) -> TraceView:
        """Return the spans of a task that ``reader`` may read. Raises ``unavailable`` without the monitor."""
        call = OutgoingCall(
            CallTarget(
                READ_TRACE.service,
                READ_TRACE.id,
                READ_TRACE.method,
                f"{READ_TRACE.path}?task={quote(task_id, safe='')}",
                READ_TRACE.kind,
            ),
            self._minter.mint_access(reader, "monitor", "monitor:read", task=TaskRef(task_id)),
            Deadline.after(self._clock, min(TRACE_TIMEOUT, deadline.remaining())),
        )
        try:
            return await self._client.call(call, TraceView)
        except OctoError as error:
            raise OctoError(
                f"The monitor, which stores the traces, is not available ({error.detail}) Tasks run without it; try"
                " again later.",
                code="unavailable",
                retry_after=5,
            ) from error


@dataclass(frozen=True, slots=True)
class TasksApi:
    """The operations on tasks."""

    store: TaskStore
    idempotency: SqlIdempotencyStore
    files: FileStore
    accounts: Accounts
    registry: ServiceRegistry
    canceller: TaskCanceller
    worker: Worker
    defaults: BudgetDefaults
    clock: Clock
    ids: IdGenerator
    traces: TraceClient

    async def submit(self, call: IncomingCall, contract: Task) -> OperationResponse:
        """Validate and store a task, and wake the worker. A key whose task is stored already returns that task."""
        principal = call.authority.principal
        key = IdempotencyKey.of(call)
        if effect := await self.idempotency.find_effect(key):
            return OperationResponse(
                await self.store.view(effect, principal.tenant), 201, {"Location": f"/tasks/{effect}"}
            )
        arms = self.registry.arm_names(principal.tenant)
        if contract.assigned_arm is not None and contract.assigned_arm not in arms:
            # It may have registered at another replica since the last refresh.
            await self.registry.refresh_on_miss()
            arms = self.registry.arm_names(principal.tenant)
        validated = validate_contract(contract, self.defaults, arms, self.clock)
        contract = await store_inline_files(validated.contract, call.tenant, self.files)
        arms_of_tenant = self.registry.list_arms(principal.tenant)
        contract = await detect_file_kinds(contract, call.tenant, self.files, arms_of_tenant)
        scopes = await self.accounts.current_scopes(principal.cred)
        task_id = f"task-{self.ids.hex()}"

        async def audit_and_record(tx: Transaction) -> None:
            await record_audit(
                tx, actor_from_call(call), "task.created", task_id, self.clock.now(), _screening_detail(call)
            )
            # In the same transaction as the task: a repeat after a crash finds the task and does not store another.
            await self.idempotency.record_effect(tx, key, task_id)

        view = await self.store.create(
            NewTask(
                task_id=task_id,
                tenant=principal.tenant,
                sub=principal.sub,
                cred=principal.cred,
                authority=str(scopes),
                contract=contract,
                correlation_id=call.correlation_id,
                traceparent=call.trace.traceparent,
                deadline_at=validated.deadline_at,
            ),
            audit_and_record,
        )
        call.span.attributes[TASK_ATTRIBUTE] = task_id
        self.worker.wake()
        return OperationResponse(view, 201, {"Location": f"/tasks/{task_id}"})

    async def record_refusal(self, call: IncomingCall, body: RejectedGoal) -> Acknowledgement:
        """Record that the gateway's input guardrail refused a goal."""
        async with self.store.transaction() as tx:
            detail = {"reason": body.reason, **msgspec.to_builtins(body.note)}
            await record_audit(tx, actor_from_call(call), "goal.refused", "", self.clock.now(), detail)
        return Acknowledgement()

    async def list(self, call: IncomingCall, _body: object) -> TaskList:
        """Return a page of the tenant's tasks."""
        page: TaskQuery = call.query
        status = None if page.status is UNSET else page.status
        return await self.store.list(call.tenant, limit=page.limit, cursor=page.cursor, status=status)

    async def read(self, call: IncomingCall, _body: object) -> TaskView:
        """Return one task."""
        return await self.store.view(call.path["task_id"], call.tenant)

    async def cancel(self, call: IncomingCall, _body: object) -> TaskView:
        """Cancel a task: its tokens are revoked and its calls are stopped."""
        task_id = call.path["task_id"]
        # Refuses another tenant's task: the cancellation itself goes by the id alone.
        await self.store.view(task_id, call.tenant)
        key = IdempotencyKey.of(call)
        if await self.idempotency.find_effect(key):
            # This call cancelled the task and was cut off, perhaps before it stopped the work.
            await self.canceller.stop_work(task_id)
        else:
            await self.canceller.cancel(
                task_id,
                actor_from_call(call),
                hook=lambda tx: self.idempotency.record_effect(tx, key, "cancelled"),
            )
        return await self.store.view(task_id, call.tenant)

    async def history(self, call: IncomingCall, _body: object) -> EventList:
        """Return a page of a task's events by version."""
        query: EventQuery = call.query
        return await self.store.history(call.path["task_id"], call.tenant, query.after, query.limit)

    async def texts(self, call: IncomingCall, _body: object) -> StepTexts:
        """Return the texts of the steps, as last saved."""
        return await self.store.texts(call.path["task_id"], call.tenant)

    async def trace(self, call: IncomingCall, _body: object) -> TraceView:
        """Return the spans of a task from the monitor."""
        task_id = call.path["task_id"]
        # Refuses another tenant's task before the monitor is asked.
        await self.store.view(task_id, call.tenant)
        return await self.traces.fetch_task_trace(call.authority.principal, task_id, call.deadline)

    async def artifact(self, call: IncomingCall, _body: object) -> Response:
        """Return the bytes of an artifact of the task."""
        view = await self.store.view(call.path["task_id"], call.tenant)
        digests = {artifact.digest for artifact in view.artifacts}
        digests |= {artifact.digest for step in view.steps for artifact in step.artifacts}
        digest = call.path["digest"]
        # The tenant's other files need their own scope; this one grants the artifacts of one task.
        if digest not in digests:
            raise OctoError("The task has no artifact with that digest.", code="file_not_found")
        file, body = await self.files.get(call.tenant, digest)
        return build_file_response(file, body)

    def operations(self) -> list[Operation]:
        """Return their declarations."""
        return [
            implement(public_api.SUBMIT_TASK, self.submit),
            Operation(
                "screenings.record",
                "POST",
                "/screenings",
                self.record_refusal,
                scope="tasks:create",
                kind="at_most_once",
                body=RejectedGoal,
                response=Acknowledgement,
                strict=True,
                summary="Record a goal that the gateway refused.",
            ),
            implement(public_api.LIST_TASKS, self.list),
            implement(public_api.READ_TASK, self.read),
            implement(public_api.CANCEL_TASK, self.cancel),
            implement(public_api.TASK_HISTORY, self.history),
            implement(public_api.TASK_TEXTS, self.texts),
            implement(public_api.TASK_TRACE, self.trace),
            implement(public_api.TASK_ARTIFACT, self.artifact),
        ]


def _screening_detail(call: IncomingCall) -> dict[str, object] | None:
    """Return the gateway's screening of a submission, as audit detail."""
    header = call.request.headers.get(SCREENING_HEADER)
    if header is None:
        return None
    try:
        record = msgspec.json.decode(header, type=ScreeningRecord)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None  # not written by the gateway
    return {"screening": msgspec.to_builtins(record)}
