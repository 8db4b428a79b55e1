"""Giving a goal to the public door, watching it, and saving what comes out."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from rich.console import Console
from rich.text import Text

from octollm.cli.door import Door
from octollm.cli.exits import EXIT_DONE, EXIT_FAILED
from octollm.cli.goal_files import GoalFile
from octollm.cli.results import Outcome, folder_of, save_outcome
from octollm.cli.story import FINAL
from octollm.cli.updates import task_updates
from octollm.cli.view import view_for
from octollm.contracts.api import TaskView
from octollm.contracts.task import Budget, FileRef, TaskContext, TaskContract
from octollm.errors import OctoError

CANCEL_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Order:
    """What is asked for."""

    goal: str
    files: Sequence[GoalFile] = ()
    budget: Budget = field(default_factory=Budget)
    criteria: Sequence[str] = ()


async def submit(door: Door, order: Order) -> TaskView:
    """Send the files, then the goal; return the accepted task."""
    stored = [await door.upload(file.name, file.content, file.media_type) for file in order.files]
    refs = tuple(FileRef(file.name, digest=answer.digest) for file, answer in zip(order.files, stored, strict=True))
    contract = TaskContract(
        goal=order.goal,
        context=TaskContext(files=refs),
        budget=order.budget,
        acceptance_criteria=tuple(order.criteria),
    )
    return await door.post("/tasks", contract, TaskView)


async def follow(door: Door, task_id: str, console: Console) -> TaskView:
    """Show a task until it ends; return it as it ended."""
    with view_for(console) as view:
        async with contextlib.aclosing(task_updates(door, task_id)) as updates:
            async for update in updates:
                view.show(update)
    return await _ended(door, task_id)


async def print_updates(door: Door, task_id: str) -> TaskView:
    """Print a task's updates until it ends, one line of JSON each; return it as it ended."""
    async with contextlib.aclosing(task_updates(door, task_id)) as updates:
        async for update in updates:
            print(msgspec.json.encode(update).decode(), flush=True)
    return await _ended(door, task_id)


async def _ended(door: Door, task_id: str) -> TaskView:
    task = await door.get(f"/tasks/{task_id}", TaskView)
    if task.status not in FINAL:
        raise OctoError(f"The updates of {task_id} ended before the task did ({task.status}).", code="peer_protocol")
    return task


async def carry_out(
    door: Door, order: Order, console: Console, *, root: Path, as_json: bool = False, page: str = ""
) -> int:
    """Submit a goal, follow it, save its results under ``root`` and print them; return the exit code.

    ``console`` gets what a person reads; with ``as_json`` standard output gets one JSON object, last. Cancelling
    cancels the task.
    """
    task = await submit(door, order)
    console.print(Text.assemble(("Task ", "octo.title"), task.task_id))
    console.print(Text.assemble(("Goal ", "octo.title"), order.goal))
    try:
        task = await follow(door, task.task_id, console)
    except asyncio.CancelledError:
        console.print(Text(f"Stopping; {task.task_id} is cancelled.", "octo.warn"))
        await _cancel(door, task.task_id)
        raise
    outcome = await save_outcome(door, task, folder_of(task.task_id, root))
    show_outcome(outcome, console, door, folder_of(task.task_id, root), page=page)
    if as_json:
        print(msgspec.json.encode(outcome).decode(), flush=True)
    return EXIT_DONE if outcome.status == "completed" else EXIT_FAILED


def show_outcome(outcome: Outcome, console: Console, door: Door, folder: Path, *, page: str = "") -> None:
    """Print how a task ended and where to find what it made. ``page`` is said in place of the page's address."""
    console.print()
    if outcome.status == "completed":
        # Why it did not complete was told as its last update.
        console.print(Text("Result", "octo.title"))
        console.print(Text(outcome.output.rstrip()))
        console.print()
    for artifact in outcome.artifacts:
        size = (f"  {artifact.size:,} bytes", "octo.quiet")
        console.print(Text.assemble(("Saved ", "octo.title"), _shown(Path(artifact.path)), size))
    console.print(Text.assemble(("All   ", "octo.title"), f"{_shown(folder)}/"))
    used = outcome.usage
    console.print(
        Text.assemble(
            ("Used  ", "octo.title"),
            f"{used.total_tokens:,} tokens ({used.prompt_tokens:,} read, {used.completion_tokens:,} written)",
        )
    )
    console.print(Text.assemble(("Page  ", "octo.title"), page or f"{door.url}/"))


def _shown(path: Path) -> str:
    """Return a path as it is shortest from here."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


async def _cancel(door: Door, task_id: str) -> None:
    """Cancel the task of an interrupted command, if the door still answers; the command ends either way."""
    with contextlib.suppress(OctoError, TimeoutError):
        async with asyncio.timeout(CANCEL_SECONDS):
            await door.send("POST", f"/tasks/{task_id}/cancel", b"")
