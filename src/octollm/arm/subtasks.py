"""Sub-tasks of an arm: tasks that it submits for the one that it works on, and waits for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable
from typing import Protocol

from octollm.contracts.api import TaskView
from octollm.contracts.task import Budget, FileRef, ParentEnd, Task, TaskContext
from octollm.errors import OctoError
from octollm.rpc.client import OutgoingCall, ServiceClient
from octollm.rpc.codec import encode

FIRST_POLL_SECONDS = 0.1
LAST_POLL_SECONDS = 2.0
_FINAL = frozenset({"completed", "failed", "cancelled"})


class PrepareTaskCall(Protocol):
    """Prepares a call of the orchestrator's operations on tasks."""

    def __call__(self, operation: str, body: bytes | None, **path: str) -> Awaitable[OutgoingCall]:
        """Return the call."""
        ...


class SubTask:
    """A task by its ``id``, submitted by :meth:`Context.submit`. It goes on when the handle is dropped."""

    def __init__(self, task_id: str, client: ServiceClient, prepare: PrepareTaskCall) -> None:
        self.id = task_id
        self._client = client
        self._prepare = prepare

    def __repr__(self) -> str:
        return f"SubTask({self.id!r})"

    async def read(self) -> TaskView:
        """Return its present state. The arm declares ``tasks:read``."""
        return await self._client.call(await self._prepare("read", None, task_id=self.id), TaskView)

    async def result(self) -> TaskView:
        """Wait until it completes, and return it. The arm declares ``tasks:read``.

        Raises an error with the code of its failure, and ``step_stopped`` when it was cancelled. This call's deadline
        ends the wait.
        """
        pause = FIRST_POLL_SECONDS
        while (task := await self.read()).status not in _FINAL:
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, LAST_POLL_SECONDS)
        if task.status == "cancelled":
            raise OctoError(f"The sub-task {self.id} was cancelled.", code="step_stopped")
        if task.error is not None:
            raise OctoError(f"The sub-task {self.id} failed: {task.error.detail}", code=task.error.code)
        return task

    async def cancel(self) -> TaskView:
        """Cancel it, and return it. The arm declares ``tasks:cancel``."""
        return await self._client.call(await self._prepare("cancel", None, task_id=self.id), TaskView)


def build_contract(
    goal: str,
    files: Iterable[FileRef],
    criteria: Iterable[str],
    constraints: Iterable[str],
    notes: str,
    budget: Budget | None,
    arm: str | None,
    on_parent_end: ParentEnd,
) -> bytes:
    """Return the body of the call that submits a sub-task."""
    return encode(
        Task(
            goal,
            context=TaskContext(files=tuple(files), text=notes),
            constraints=tuple(constraints),
            acceptance_criteria=tuple(criteria),
            budget=budget or Budget(),
            assigned_arm=arm,
            on_parent_end=on_parent_end,
        )
    )
