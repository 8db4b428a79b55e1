"""AsyncTaskHandle: watch a task, wait for its result, cancel it, read its history and artifacts."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Generic

from octollm.client._transport import GatewayTransport
from octollm.client.errors import Conflict, DeadlineExceeded, ServerError, TaskCancelled, TaskFailed
from octollm.client.files import verify_digest
from octollm.client.streams import RECONNECT_TIMEOUT_SECONDS, Update, stream_updates
from octollm.client.typed_output import OutputT, decode_output
from octollm.contracts.api import StepText, TaskView
from octollm.contracts.events import Event
from octollm.contracts.observability import TraceView
from octollm.contracts.public_api import (
    CANCEL_TASK,
    READ_TASK,
    TASK_ARTIFACT,
    TASK_HISTORY,
    TASK_TEXTS,
    TASK_TRACE,
)
from octollm.contracts.task import Artifact

_FINAL_STATUSES = frozenset({"completed", "failed", "cancelled"})
_PAGE = 500


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
