"""Following a task until it ends: its updates on the terminal, with its usage and its sub-tasks beside them."""

from __future__ import annotations

import asyncio
import contextlib

from rich.console import Console

from octollm.cli.approvals import show_approvals
from octollm.cli.progress import SubTaskBranch
from octollm.cli.runtime import print_json
from octollm.cli.views import ProgressView, create_view
from octollm.client import AsyncClient, AsyncTaskHandle
from octollm.concurrency import run_until_first
from octollm.contracts.api import TaskView
from octollm.errors import OctoError

POLL_SECONDS = 2.0
"""Interval at which usage and sub-tasks are read, for which there are no updates."""
MAX_SHOWN_DEPTH = 8
"""Generations of sub-tasks that are shown: as many as there may be."""
MAX_READ_SUBTASKS = 32
"""Sub-tasks that are read for the live tree; a sub-task's own sub-tasks are seen only when it is read."""


async def follow_task(client: AsyncClient, task: AsyncTaskHandle, console: Console) -> TaskView:
    """Show a task's progress until it ends; return the ended task.

    When it waits for approval, the person at the terminal is asked; without a terminal, the lines say how to decide.
    """
    with create_view(console) as view:
        if view.shows_tree:
            await run_until_first(_show_updates(task, view, console), _show_usage(client, task, view))
        else:
            await _show_updates(task, view, console)
        final = await task.wait()
        if view.shows_tree:
            with contextlib.suppress(OctoError):
                view.show_task(final, await read_subtasks(client, final, limit=MAX_READ_SUBTASKS))
    return final


async def _show_updates(task: AsyncTaskHandle, view: ProgressView, console: Console) -> None:
    async with contextlib.aclosing(task.updates()) as updates:
        async for update in updates:
            view.show(update)
            if view.state.status == "waiting":
                with view.paused():
                    await show_approvals(task, console)


async def _show_usage(client: AsyncClient, task: AsyncTaskHandle, view: ProgressView) -> None:
    while True:
        # A gateway that is away is a matter of the updates, which wait for it, and say so in the end.
        with contextlib.suppress(OctoError):
            current = await task.read()
            view.show_task(current, await read_subtasks(client, current, limit=MAX_READ_SUBTASKS))
        await asyncio.sleep(POLL_SECONDS)


async def read_subtasks(
    client: AsyncClient, task: TaskView, *, limit: int | None = None, depth: int = 1
) -> list[SubTaskBranch]:
    """Return the sub-tasks below a task in the order of a tree. At most ``limit`` of them are read for their own."""
    found: list[SubTaskBranch] = []
    for child in task.children:
        found.append(SubTaskBranch(child.task_id, child.goal, child.status, child.progress, depth))
        if depth < MAX_SHOWN_DEPTH and (limit is None or len(found) <= limit):
            below = await client.task(child.task_id).read()
            rest = None if limit is None else limit - len(found)
            found += await read_subtasks(client, below, limit=rest, depth=depth + 1)
    return found


async def print_updates(task: AsyncTaskHandle) -> TaskView:
    """Print a task's updates until it ends, one line of JSON each; return the ended task."""
    async with contextlib.aclosing(task.updates()) as updates:
        async for update in updates:
            print_json(update)
    return await task.wait()
