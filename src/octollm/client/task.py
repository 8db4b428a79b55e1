"""AsyncTaskHandle: watch a task, wait for its result, steer it, run it again, read its history and artifacts."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping
from datetime import datetime
from typing import Generic

from octollm.client._transport import GatewayTransport
from octollm.client.errors import Conflict, DeadlineExceeded, ServerError, TaskCancelled, TaskFailed
from octollm.client.files import verify_digest
from octollm.client.streams import RECONNECT_TIMEOUT_SECONDS, Update, stream_updates
from octollm.client.typed_output import OutputT, decode_output
from octollm.contracts.api import StepText, TaskView
from octollm.contracts.approvals import ApprovalDecision
from octollm.contracts.attempts import AttemptView, ForkRequest
from octollm.contracts.events import Event
from octollm.contracts.observability import TraceView
from octollm.contracts.recording import TaskRecording
from octollm.contracts.steering import ExtendRequest, InstructionRequest, SkipRequest
from octollm.contracts.task import Artifact
from octollm.contracts.task_operations import (
    APPROVE_TASK,
    CANCEL_TASK,
    EXTEND_TASK,
    FORK_TASK,
    INSTRUCT_TASK,
    LIST_ATTEMPTS,
    PAUSE_TASK,
    READ_TASK,
    RECORD_TASK,
    RESUME_TASK,
    RETRY_TASK,
    SKIP_STEP,
    TASK_ARTIFACT,
    TASK_HISTORY,
    TASK_TEXTS,
    TASK_TRACE,
)

_FINAL_STATUSES = frozenset({"completed", "failed", "cancelled"})
_PAGE = 500
_ATTEMPTS_PAGE = 50


class TaskResult(TaskView, Generic[OutputT], frozen=True, kw_only=True):
    """A completed task: everything of :class:`TaskView`, and ``value``, its output as the type given to ``submit``."""

    value: OutputT


class AsyncTaskHandle(Generic[OutputT]):
    """A task by its ``id``. Neither leaving the handle nor closing the client cancels the task."""

    def __init__(self, transport: GatewayTransport, task_id: str, output: type[OutputT] = str) -> None:
        self._transport = transport
        self._output = output
        self.id = task_id

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.id!r})"

    async def read(self) -> TaskView:
        """Return the task's present state. Raises :class:`NotFound`."""
        return await self._transport.call(READ_TASK, task_id=self.id)

    async def cancel(self) -> TaskView:
        """Cancel the task and return it. A task that is already cancelled stays so.

        Raises :class:`Conflict` when it completed or failed before.
        """
        try:
            return await self._transport.call(CANCEL_TASK, task_id=self.id)
        except Conflict:
            # An earlier attempt of this call may have cancelled it, with the response lost.
            task = await self.read()
            if task.status != "cancelled":
                raise
            return task

    async def approve(
        self, approval_id: str = "", *, comment: str = "", goals: Mapping[str, str] | None = None
    ) -> TaskView:
        """Approve what the task waits for, and return the task; ``approval_id`` names one of several approvals.

        ``goals`` gives steps that have not started another goal, by their id. Approving again changes nothing. Raises
        :class:`InvalidRequest`, and :class:`Conflict` when nothing waits for approval, or it was rejected or expired.
        """
        return await self._decide(ApprovalDecision("approve", approval_id, comment, dict(goals or {})))

    async def reject(self, approval_id: str = "", *, comment: str = "") -> TaskView:
        """Reject what the task waits for, and return the task, which ends. Raises as :meth:`approve`."""
        return await self._decide(ApprovalDecision("reject", approval_id, comment))

    async def _decide(self, decision: ApprovalDecision) -> TaskView:
        return await self._transport.call(APPROVE_TASK, decision, task_id=self.id)

    def updates(
        self, *, after: int = 0, reconnect_timeout: float = RECONNECT_TIMEOUT_SECONDS
    ) -> AsyncGenerator[Update]:
        """Yield the task's updates to its end: all of them, or those after the update with ``seq`` ``after``.

        A broken connection is resumed, at another address if there is one: every update and every piece of token text
        comes once. Raises :class:`NotFound`, :class:`AuthenticationError`, :class:`PermissionDenied`, and
        :class:`Unavailable` when no gateway answers for ``reconnect_timeout`` seconds.
        """
        return stream_updates(self._transport, self.id, after=after, reconnect_timeout=reconnect_timeout)

    async def result(self, *, timeout: float | None = None) -> TaskResult[OutputT]:
        """Wait until the task completes; return it with its ``value``, ``output``, ``artifacts``, ``usage``, ``steps``.

        Raises :class:`TaskFailed`, :class:`TaskCancelled`, :class:`OutputInvalid` when the output does not fit the type
        given to ``submit``, and :class:`DeadlineExceeded` after ``timeout`` seconds; the task continues then, and
        ``result`` may be called again.
        """
        try:
            async with asyncio.timeout(timeout):
                task = await self.wait()
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"{self.id} did not end in {timeout:g} s; it goes on.", code="deadline_exceeded"
            ) from error
        if task.status == "failed":
            raise TaskFailed(task)
        if task.status == "cancelled":
            raise TaskCancelled(task)
        fields = {name: getattr(task, name) for name in TaskView.__struct_fields__}
        return TaskResult(**fields, value=decode_output(task, self._output))

    async def wait(self) -> TaskView:
        """Wait until the task has ended, in whatever way, and return it."""
        task = await self.read()
        if task.status in _FINAL_STATUSES:
            return task
        # From the version that was read, so that an update between the two calls is not missed.
        async with contextlib.aclosing(self.updates(after=task.version)) as updates:
            async for _update in updates:
                pass
        # The last update has no steps and no artifacts.
        task = await self.read()
        if task.status not in _FINAL_STATUSES:
            raise ServerError(f"The updates of {self.id} ended before it did ({task.status}).", code="peer_protocol")
        return task

    async def history(self, *, after: int = 0) -> AsyncGenerator[Event]:
        """Yield the task's past events after version ``after``, in order."""
        while True:
            page = await self._transport.call(TASK_HISTORY, query={"after": after, "limit": _PAGE}, task_id=self.id)
            for event in page.events:
                yield event
            if not page.events:
                return
            after = page.events[-1].version

    async def pause(self) -> TaskView:
        """Pause the task and return it: its calls stop, and it uses nothing until :meth:`resume`.

        Pausing it again changes nothing. Raises :class:`Conflict` when it has ended.
        """
        return await self._transport.call(PAUSE_TASK, task_id=self.id)

    async def resume(self) -> TaskView:
        """Let the task go on after :meth:`pause`, and return it. Raises :class:`Conflict` when it has ended."""
        return await self._transport.call(RESUME_TASK, task_id=self.id)

    async def instruct(self, text: str) -> TaskView:
        """Add an instruction, which the task's next attempt or step keeps to, and return the task.

        To have it kept to at once, pause the task before and resume it after. Raises :class:`Conflict` when it has
        ended, and :class:`InvalidRequest`.
        """
        return await self._transport.call(INSTRUCT_TASK, InstructionRequest(text), task_id=self.id)

    async def skip(self, step: str) -> TaskView:
        """Have the task go on without a step that has not completed, and return the task.

        The steps that depend on it run, and are told that its result is missing. Raises :class:`Conflict` when the task
        or the step has ended, and :class:`InvalidRequest` for a step that the plan does not have.
        """
        return await self._transport.call(SKIP_STEP, SkipRequest(step), task_id=self.id)

    async def extend(
        self,
        *,
        max_tokens: int | None = None,
        max_cost_usd: float | None = None,
        max_time_seconds: float | None = None,
        deadline: datetime | str | None = None,
    ) -> TaskView:
        """Raise limits of the task's budget, or put off its deadline, and return the task.

        The numbers are the new limits, as for ``submit``, not what is added. Raises :class:`Conflict` when it has
        ended, and :class:`InvalidRequest` for a limit that is lower than the present one.
        """
        ends = deadline.isoformat() if isinstance(deadline, datetime) else deadline
        request = ExtendRequest(max_tokens, max_cost_usd, max_time_seconds, ends)
        return await self._transport.call(EXTEND_TASK, request, task_id=self.id)

    async def attempts(self, *, step: str = "") -> AsyncGenerator[AttemptView]:
        """Yield the attempts at the task's steps, or at one ``step``, oldest first: what each was given, and made.

        :meth:`artifact` returns the whole of a long text, by the ``digest`` of its excerpt.
        """
        cursor = None
        while True:
            query = {"limit": _ATTEMPTS_PAGE, "cursor": cursor, "step": step}
            page = await self._transport.call(LIST_ATTEMPTS, query=query, task_id=self.id)
            for attempt in page.attempts:
                yield attempt
            cursor = page.cursor
            if cursor is None:
                return

    async def recording(self) -> TaskRecording:
        """Return what the task was given, did, and was answered by models: what ``octollm task export`` writes.

        The contents of its files are not in it. Raises :class:`Conflict` while the task goes on.
        """
        return await self._transport.call(RECORD_TASK, task_id=self.id)

    async def retry(self) -> AsyncTaskHandle[OutputT]:
        """Submit the goal of the task, which has to have ended, again, and return the new task.

        It has the same files, budget and criteria, a plan of its own, and nothing of this task's results. Raises
        :class:`Conflict` while this task goes on.
        """
        return self._successor(await self._transport.call(RETRY_TASK, task_id=self.id))

    async def fork(self, from_step: str = "") -> AsyncTaskHandle[OutputT]:
        """Run the plan of the task, which has to have ended, again from a step, and return the new task.

        It takes over the results of the steps before. Without ``from_step`` it begins with the first step that did not
        complete. Raises :class:`Conflict` as :meth:`retry`, and :class:`InvalidRequest` for an unknown step.
        """
        return self._successor(await self._transport.call(FORK_TASK, ForkRequest(from_step), task_id=self.id))

    def _successor(self, task: TaskView) -> AsyncTaskHandle[OutputT]:
        return AsyncTaskHandle(self._transport, task.task_id, self._output)

    async def texts(self) -> tuple[StepText, ...]:
        """Return the text that each step has written, as last saved."""
        return (await self._transport.call(TASK_TEXTS, task_id=self.id)).texts

    async def trace(self) -> TraceView:
        """Return the task's spans: every call of every service, as far as they are retained."""
        return await self._transport.call(TASK_TRACE, task_id=self.id)

    async def artifact(self, artifact: Artifact | str) -> bytes:
        """Return the content of one of the task's files, by the artifact or its digest, and verify the digest."""
        digest = artifact if isinstance(artifact, str) else artifact.digest
        return verify_digest(await self._transport.call(TASK_ARTIFACT, task_id=self.id, digest=digest), digest)
