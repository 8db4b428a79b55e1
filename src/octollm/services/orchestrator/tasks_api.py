"""Tasks over HTTP: submit, list, read, cancel, run again; artifacts, attempts, events and the trace of a task."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlencode

import msgspec
from msgspec import UNSET
from starlette.responses import Response

from octollm.capability import Principal, RootMinter, TaskRef
from octollm.clock import Clock
from octollm.context import parse_traceparent
from octollm.contracts import task_operations
from octollm.contracts.api import (
    Acknowledgement,
    EventList,
    EventQuery,
    StepTexts,
    TaskList,
    TaskQuery,
    TaskView,
    UsageQuery,
    UsageReport,
)
from octollm.contracts.approvals import ApprovalDecision, ApprovalList
from octollm.contracts.attempts import AttemptList, ForkRequest
from octollm.contracts.internal_operations import RECORD_REFUSAL
from octollm.contracts.observability import TraceView
from octollm.contracts.recording import TaskRecording
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
from octollm.services.orchestrator.audit import actor_from_call, audit_statement, record_audit
from octollm.services.orchestrator.files import FileStore, build_file_response
from octollm.services.orchestrator.submission import Fork, Submission, TaskSubmitter
from octollm.services.orchestrator.task_endings import ApprovalDecisions, TaskCanceller
from octollm.storage.programs import SqlStatement
from octollm.tasks.attempts import AttemptReader
from octollm.tasks.ledger import UsageReader
from octollm.tasks.recording import RecordingReader
from octollm.tasks.store import TaskStore
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
            CallTarget.of(READ_TRACE, urlencode({"task": task_id})),
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
    submitter: TaskSubmitter
    idempotency: SqlIdempotencyStore
    files: FileStore
    accounts: Accounts
    canceller: TaskCanceller
    decisions: ApprovalDecisions
    clock: Clock
    traces: TraceClient
    attempts: AttemptReader
    usage: UsageReader
    recordings: RecordingReader

    async def submit(self, call: IncomingCall, contract: Task) -> OperationResponse:
        """Validate and store a task, and wake the worker. A key whose task is stored already returns that task."""
        return await self._find_submitted(call) or await self._submit(call, contract, _screening_detail(call))

    async def retry(self, call: IncomingCall, _body: object) -> OperationResponse:
        """Submit the contract of a task that has ended again, with the caller's authority."""
        return await self._find_submitted(call) or await self._run_again(call, None)

    async def fork(self, call: IncomingCall, body: ForkRequest) -> OperationResponse:
        """Submit the contract of a task that has ended again, with its plan and the results before a step."""
        return await self._find_submitted(call) or await self._run_again(call, body.from_step)

    async def _run_again(self, call: IncomingCall, from_step: str | None) -> OperationResponse:
        contract, fork = await self.submitter.find_fork(call.path["task_id"], call.tenant, from_step)
        return await self._submit(call, contract, {"forked_from": fork.task_id}, fork)

    async def _find_submitted(self, call: IncomingCall) -> OperationResponse | None:
        """Return the response to a call whose task is stored already."""
        if effect := await self.idempotency.find_effect(IdempotencyKey.of(call)):
            # Keys are the principal's: an arm could use the one of another task.
            await self.submitter.subtasks.check_reach(call.authority, effect)
            return OperationResponse(await self.store.view(effect, call.tenant), 201, {"Location": f"/tasks/{effect}"})
        return None

    async def _submit(
        self, call: IncomingCall, contract: Task, detail: dict[str, object] | None, fork: Fork | None = None
    ) -> OperationResponse:
        principal, key = call.authority.principal, IdempotencyKey.of(call)
        scopes = await self.accounts.current_scopes(principal.cred)
        parent = await self.submitter.subtasks.find_parent(call, contract, scopes)
        if parent is not None and (screening := await self._screen(call, contract)) is not None:
            detail = {"screening": msgspec.to_builtins(screening)}
        correlation_id, traceparent = call.correlation_id, call.trace.traceparent
        if parent is not None:
            scopes, correlation_id = parent.authority, parent.task.correlation_id
            above = parse_traceparent(parent.task.traceparent)
            if above is not None and above.trace_id != call.trace.trace_id:
                # A tree of tasks is one trace, whoever submits its parts.
                traceparent = parent.task.traceparent

        def audit_and_record(task_id: str) -> tuple[SqlStatement, ...]:
            audited = audit_statement(actor_from_call(call), "task.created", task_id, self.clock.now(), detail)
            # In the same transaction as the task: a repeat after a crash finds the task and does not store another.
            return audited, *self.idempotency.effect_statements(key, task_id)

        submission = Submission(principal, scopes, contract, correlation_id, traceparent, fork, parent)
        view = await self.submitter.submit(submission, statements=audit_and_record)
        call.span.attributes[TASK_ATTRIBUTE] = view.task_id
        return OperationResponse(view, 201, {"Location": f"/tasks/{view.task_id}"})

    async def _screen(self, call: IncomingCall, contract: Task) -> ScreeningRecord | None:
        """Screen the goal of a sub-task that an arm submits, and record its refusal."""
        try:
            return await self.submitter.subtasks.screen(call.authority, contract)
        except OctoError as error:
            async with self.store.transaction() as tx:
                task = None if call.authority.task is None else call.authority.task.task
                refused = {"reason": error.detail, "task": task, "arm": call.authority.issuer}
                await record_audit(tx, actor_from_call(call), "goal.refused", "", self.clock.now(), refused)
            raise

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
        return await self.store.list(call.tenant, limit=page.limit, cursor=page.cursor, status=status, text=page.text)

    async def read_usage(self, call: IncomingCall, _body: object) -> UsageReport:
        """Return what the tenant's model calls used."""
        query: UsageQuery = call.query
        return await self.usage.read(call.tenant, query.by, query.days)

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

    async def approve(self, call: IncomingCall, body: ApprovalDecision) -> TaskView:
        """Decide what a task waits for."""
        task_id = call.path["task_id"]
        await self.decisions.decide(task_id, body, actor_from_call(call))
        return await self.store.view(task_id, call.tenant)

    async def list_approvals(self, call: IncomingCall, _body: object) -> ApprovalList:
        """Return the tenant's pending approvals."""
        return await self.decisions.approvals.list_pending(call.tenant)

    async def history(self, call: IncomingCall, _body: object) -> EventList:
        """Return a page of a task's events by version."""
        query: EventQuery = call.query
        return await self.store.history(call.path["task_id"], call.tenant, query.after, query.limit)

    async def list_attempts(self, call: IncomingCall, _body: object) -> AttemptList:
        """Return a page of the attempts at a task's steps."""
        task_id, query = call.path["task_id"], call.query
        # Refuses another tenant's task: the attempts are read by the id alone.
        await self.store.view(task_id, call.tenant)
        return await self.attempts.list(task_id, query)

    async def recording(self, call: IncomingCall, _body: object) -> TaskRecording:
        """Return the recording of a task that has ended."""
        arms = self.submitter.registry.list_arms(call.tenant)
        return await self.recordings.read(call.path["task_id"], call.tenant, tuple(arms))

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
        if digest not in digests and not await self.attempts.has_file(view.task_id, digest):
            raise OctoError("The task has no artifact with that digest.", code="file_not_found")
        file, body = await self.files.get(call.tenant, digest)
        return build_file_response(file, body)

    def operations(self) -> list[Operation]:
        """Return their declarations."""
        return [
            implement(task_operations.SUBMIT_TASK, self.submit),
            implement(RECORD_REFUSAL, self.record_refusal),
            implement(task_operations.LIST_TASKS, self.list),
            implement(task_operations.READ_TASK, self.read),
            implement(task_operations.CANCEL_TASK, self.cancel),
            implement(task_operations.APPROVE_TASK, self.approve),
            implement(task_operations.LIST_APPROVALS, self.list_approvals),
            implement(task_operations.READ_USAGE, self.read_usage),
            implement(task_operations.TASK_HISTORY, self.history),
            implement(task_operations.LIST_ATTEMPTS, self.list_attempts),
            implement(task_operations.RECORD_TASK, self.recording),
            implement(task_operations.RETRY_TASK, self.retry),
            implement(task_operations.FORK_TASK, self.fork),
            implement(task_operations.TASK_TEXTS, self.texts),
            implement(task_operations.TASK_TRACE, self.trace),
            implement(task_operations.TASK_ARTIFACT, self.artifact),
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
