"""Tasks over HTTP: submit, list, read, cancel, follow."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
from msgspec import UNSET
from starlette.responses import Response

from octollm.clock import Clock, Ids
from octollm.contracts.api import Done, EventList, SavedTexts, TaskList, TaskView
from octollm.contracts.listing import Behind, TaskPage
from octollm.contracts.screening import SCREENING_HEADER, RefusedGoal, ScreeningNote
from octollm.contracts.task import SUBMIT_CODES, TaskContract
from octollm.contracts.traces import TraceView
from octollm.errors import OctoError
from octollm.rpc.call import About, Call, Operation, Reply
from octollm.rpc.idempotency import KeyOf
from octollm.rpc.idempotency_sql import SqlIdempotency
from octollm.services.orchestrator.accounts import Accounts
from octollm.services.orchestrator.audit import actor_of, record
from octollm.services.orchestrator.cancelling import Cancelling
from octollm.services.orchestrator.files import FileStore, file_response
from octollm.services.orchestrator.intake import Defaults, check_contract, check_kinds, store_inline_files
from octollm.services.orchestrator.registry import Registry
from octollm.services.orchestrator.traces import Traces
from octollm.storage import Transaction
from octollm.tasks.store import NewTask, TaskStore
from octollm.tasks.worker import Worker
from octollm.telemetry.spans import TASK

MAX_TASK_BODY = 1024 * 1024
"""Bytes of a submission. Short texts of files may be given in place; larger files are stored first."""


@dataclass(frozen=True, slots=True)
class TasksApi:
    """What the operations on tasks work with."""

    store: TaskStore
    idempotency: SqlIdempotency
    files: FileStore
    accounts: Accounts
    registry: Registry
    cancelling: Cancelling
    worker: Worker
    defaults: Defaults
    clock: Clock
    ids: Ids
    traces: Traces

    async def submit(self, call: Call, contract: TaskContract) -> Reply:
        """Check a task, store it and wake the worker. A key whose task was stored already leads to that task."""
        principal = call.authority.principal
        key = call.key and KeyOf(principal.tenant, principal.sub, call.service, call.operation, call.key)
        if key and (stored := await self.idempotency.noted(key)):
            return Reply(await self.store.view(stored, principal.tenant), 201, {"Location": f"/tasks/{stored}"})
        arms = frozenset(arm.name for arm in (await self.registry.views(principal.tenant)).arms)
        checked = check_contract(contract, self.defaults, arms, self.clock)
        contract = await store_inline_files(checked.contract, call.tenant, self.files)
        await check_kinds(contract, call.tenant, self.files, await self.registry.arms(principal.tenant))
        scopes = await self.accounts.scopes_now(principal.cred)
        task_id = f"task-{self.ids.hex()}"

        async def also(tx: Transaction) -> None:
            await record(tx, actor_of(call), "task.created", task_id, self.clock.now(), _screened(call))
            if key:
                await self.idempotency.note(tx, key, task_id)

        await self.store.create(
            NewTask(
                task_id=task_id,
                tenant=principal.tenant,
                sub=principal.sub,
                cred=principal.cred,
                authority=str(scopes),
                contract=contract,
                correlation_id=call.correlation_id,
                traceparent=call.trace.traceparent,
                deadline_at=checked.deadline_at,
            ),
            also,
        )
        call.span.attributes[TASK] = task_id
        self.worker.wake()
        view = await self.store.view(task_id, principal.tenant)
        return Reply(view, 201, {"Location": f"/tasks/{task_id}"})

    async def refused(self, call: Call, body: RefusedGoal) -> Done:
        """Record that the public door refused a goal."""
        async with self.store.transaction() as tx:
            detail = {"reason": body.reason, **msgspec.to_builtins(body.note)}
            await record(tx, actor_of(call), "goal.refused", "", self.clock.now(), detail)
        return Done()

    async def list(self, call: Call, _body: object) -> TaskList:
        """Return a page of the tenant's tasks."""
        page: TaskPage = call.query
        status = None if page.status is UNSET else page.status
        return await self.store.list(call.tenant, limit=page.limit, cursor=page.cursor, status=status)

    async def read(self, call: Call, _body: object) -> TaskView:
        """Return one task."""
        return await self.store.view(call.path["task_id"], call.tenant)

    async def cancel(self, call: Call, _body: object) -> TaskView:
        """Cancel a task: its tokens are revoked and its work is stopped all the way down."""
        task_id = call.path["task_id"]
        await self.store.view(task_id, call.tenant)
        await self.cancelling.cancel(task_id, actor_of(call))
        return await self.store.view(task_id, call.tenant)

    async def history(self, call: Call, _body: object) -> EventList:
        """Return a page of a task's events by version."""
        behind: Behind = call.query
        return await self.store.history(call.path["task_id"], call.tenant, behind.after, behind.limit)

    async def texts(self, call: Call, _body: object) -> SavedTexts:
        """Return what the steps have written, as last saved."""
        return await self.store.texts(call.path["task_id"], call.tenant)

    async def trace(self, call: Call, _body: object) -> TraceView:
        """Return the spans of a task, as the monitor has them."""
        task_id = call.path["task_id"]
        await self.store.view(task_id, call.tenant)
        return await self.traces.of_task(call.authority.principal, task_id, call.deadline)

    async def artifact(self, call: Call, _body: object) -> Response:
        """Return the bytes of a file that the task made."""
        view = await self.store.view(call.path["task_id"], call.tenant)
        made = {artifact.digest: artifact.name for artifact in view.artifacts}
        made |= {artifact.digest: artifact.name for step in view.steps for artifact in step.artifacts}
        digest = call.path["digest"]
        if digest not in made:
            raise OctoError("The task made no file of that digest.", code="file_not_found")
        file, body = await self.files.get(call.tenant, digest)
        return file_response(file, body)

    def operations(self) -> list[Operation]:
        """Return the operations on tasks."""
        read = "tasks:read"
        absent = About(codes=("task_not_found",))
        return [
            Operation(
                "tasks.submit",
                "POST",
                "/tasks",
                self.submit,
                scope="tasks:create",
                kind="idempotent",
                body=TaskContract,
                answer=TaskView,
                status=201,
                strict=True,
                max_body=MAX_TASK_BODY,
                traced=True,
                summary="Submit a task.",
                about=About(codes=SUBMIT_CODES),
            ),
            Operation(
                "screenings.record",
                "POST",
                "/screenings",
                self.refused,
                scope="tasks:create",
                body=RefusedGoal,
                answer=Done,
                strict=True,
                summary="Record a goal that the public door refused.",
            ),
            Operation(
                "tasks.list",
                "GET",
                "/tasks",
                self.list,
                scope=read,
                query=TaskPage,
                answer=TaskList,
                cacheable=True,
                summary="List tasks.",
            ),
            Operation(
                "tasks.read",
                "GET",
                "/tasks/{task_id}",
                self.read,
                scope=read,
                answer=TaskView,
                cacheable=True,
                summary="One task.",
                about=absent,
            ),
            Operation(
                "tasks.cancel",
                "POST",
                "/tasks/{task_id}/cancel",
                self.cancel,
                scope="tasks:cancel",
                answer=TaskView,
                summary="Cancel a task.",
                about=About(codes=("task_not_found", "state_conflict")),
            ),
            Operation(
                "tasks.history",
                "GET",
                "/tasks/{task_id}/history",
                self.history,
                scope=read,
                query=Behind,
                answer=EventList,
                summary="A task's events by version.",
                about=absent,
            ),
            Operation(
                "tasks.texts",
                "GET",
                "/tasks/{task_id}/texts",
                self.texts,
                scope=read,
                answer=SavedTexts,
                summary="What the steps have written.",
                about=absent,
            ),
            Operation(
                "tasks.trace",
                "GET",
                "/tasks/{task_id}/trace",
                self.trace,
                scope=read,
                answer=TraceView,
                summary="The spans of every service that worked on the task.",
                about=absent,
            ),
            Operation(
                "tasks.artifact",
                "GET",
                "/tasks/{task_id}/artifacts/{digest}",
                self.artifact,
                scope=read,
                cacheable=True,
                summary="A file that the task made.",
                about=About(media="*/*", codes=("task_not_found", "file_not_found")),
            ),
        ]


def _screened(call: Call) -> dict[str, object] | None:
    """Return what the public door found in a submission, as it is recorded."""
    told = call.request.headers.get(SCREENING_HEADER)
    if told is None:
        return None
    try:
        note = msgspec.json.decode(told, type=ScreeningNote)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None  # it did not come from the door
    return {"screening": msgspec.to_builtins(note)}
