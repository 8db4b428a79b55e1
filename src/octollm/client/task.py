"""AsyncTaskHandle: watch a task, wait for its result, cancel it, read its history and artifacts."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from urllib.parse import quote

from octollm.client._transport import GatewayTransport
from octollm.client.errors import Conflict, DeadlineExceeded, ServerError, TaskCancelled, TaskFailed
from octollm.client.files import verify_digest
from octollm.client.streams import RECONNECT_TIMEOUT_SECONDS, Update, stream_updates
from octollm.contracts.api import EventList, StepText, StepTexts, TaskView
from octollm.contracts.events import Event
from octollm.contracts.observability import TraceView
from octollm.contracts.task import Artifact

_FINAL = frozenset({"completed", "failed", "cancelled"})
_PAGE = 500


class AsyncTaskHandle:
    """A task by its ``id``. Making one asks nothing; leaving it, or the client, does not cancel the task."""

    def __init__(self, transport: GatewayTransport, task_id: str) -> None:
        self._transport = transport
        self.id = task_id
        self._path = f"/tasks/{quote(task_id, safe='')}"

    def __repr__(self) -> str:
        return f"TaskHandle({self.id})"

    async def read(self) -> TaskView:
        """Return the task as it is now. Raises :class:`NotFound`."""
        return await self._transport.get(self._path, TaskView)

    async def cancel(self) -> TaskView:
        """Cancel the task, and return it; one that is cancelled already stays so.

        Raises :class:`Conflict` when it has ended otherwise.
        """
        try:
            return await self._transport.post(
                f"{self._path}/cancel", None, TaskView, idempotency_key=self._transport.ids.hex()
            )
        except Conflict:
            # Also when the answer to a first try was lost on its way.
            task = await self.read()
            if task.status != "cancelled":
                raise
            return task

    def updates(
        self, *, after: int = 0, reconnect_timeout: float = RECONNECT_TIMEOUT_SECONDS
    ) -> AsyncGenerator[Update]:
        """Yield what happens to the task, from its beginning or behind the update with ``seq`` ``after``, to its end.

        A broken connection is taken up again, at another address if there is one: nothing is lost and nothing comes
        twice, token text included. Raises :class:`NotFound`, :class:`AuthenticationError`,
        :class:`PermissionDenied`, and :class:`Unavailable` when no door is back after ``patience`` seconds.
        """
        return stream_updates(self._transport, self.id, after=after, reconnect_timeout=reconnect_timeout)

    async def result(self, *, timeout: float | None = None) -> TaskView:
        """Wait until the task completed and return it: ``output``, ``artifacts``, ``usage``, ``steps``.

        Raises :class:`TaskFailed`, :class:`TaskCancelled`, and :class:`DeadlineExceeded` after ``timeout`` seconds;
        the task goes on then, and may be waited for again.
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
        return task

    async def wait(self) -> TaskView:
        """Wait until the task has ended, however it did, and return it."""
        task = await self.read()
        if task.status in _FINAL:
            return task
        async with contextlib.aclosing(self.updates(after=task.version)) as updates:
            async for _update in updates:
                pass
        task = await self.read()
        if task.status not in _FINAL:
            raise ServerError(f"The updates of {self.id} ended before it did ({task.status}).", code="peer_protocol")
        return task

    async def history(self, *, after: int = 0) -> AsyncGenerator[Event]:
        """Yield the events that the task has had behind version ``after``, in order."""
        while True:
            page = await self._transport.get(f"{self._path}/history?after={after}&limit={_PAGE}", EventList)
            for event in page.events:
                yield event
            if not page.events:
                return
            after = page.events[-1].version

    async def texts(self) -> tuple[StepText, ...]:
        """Return what the task's steps have written, as last saved."""
        return (await self._transport.get(f"{self._path}/texts", StepTexts)).texts

    async def trace(self) -> TraceView:
        """Return the spans of the task: every call of it over every service, as far as they are kept."""
        return await self._transport.get(f"{self._path}/trace", TraceView)

    async def artifact(self, artifact: Artifact | str) -> bytes:
        """Return the bytes of a file that the task made, by its artifact or digest, checked against that."""
        digest = artifact if isinstance(artifact, str) else artifact.digest
        answer = await self._transport.send("GET", f"{self._path}/artifacts/{quote(digest, safe='')}")
        return verify_digest(answer.body, digest)
