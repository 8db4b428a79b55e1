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

from octollm.cli.exits import EXIT_DONE, EXIT_FAILED
from octollm.cli.goal_files import GoalFile
from octollm.cli.results import TaskOutcome, results_folder, save_outcome
from octollm.cli.view import create_view
from octollm.client import AsyncClient, AsyncTaskHandle
from octollm.contracts.api import TaskView
from octollm.contracts.task import Budget
from octollm.errors import OctoError

CANCEL_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class GoalRequest:
    """What is asked for."""

    goal: str
    files: Sequence[GoalFile] = ()
    budget: Budget = field(default_factory=Budget)
    criteria: Sequence[str] = ()


async def submit_goal(octo: AsyncClient, request: GoalRequest) -> AsyncTaskHandle:
    """Send the files, then the goal; return the accepted task."""
    files = [(file.name, file.content) for file in request.files]
    return await octo.submit(request.goal, files=files, budget=request.budget, criteria=request.criteria)


async def follow_task(task: AsyncTaskHandle, console: Console) -> TaskView:
    """Show a task until it ends; return it as it ended."""
    with create_view(console) as view:
        async with contextlib.aclosing(task.updates()) as updates:
            async for update in updates:
                view.show(update)
    return await task.wait()


async def print_updates(task: AsyncTaskHandle) -> TaskView:
    """Print a task's updates until it ends, one line of JSON each; return it as it ended."""
    async with contextlib.aclosing(task.updates()) as updates:
        async for update in updates:
            print(msgspec.json.encode(update).decode(), flush=True)
    return await task.wait()


async def run_goal(
    octo: AsyncClient, request: GoalRequest, console: Console, *, root: Path, as_json: bool = False, page_url: str = ""
) -> int:
    """Submit a goal, follow it, save its results under ``root`` and print them; return the exit code.

    ``console`` gets what a person reads; with ``as_json`` standard output gets one JSON object, last. Cancelling
    cancels the task.
    """
    task = await submit_goal(octo, request)
    console.print(Text.assemble(("Task ", "octo.title"), task.id))
    console.print(Text.assemble(("Goal ", "octo.title"), request.goal))
    try:
        ended = await follow_task(task, console)
    except asyncio.CancelledError:
        console.print(Text(f"Stopping; {task.id} is cancelled.", "octo.warn"))
        await _cancel(task)
        raise
    folder = results_folder(task.id, root)
    outcome = await save_outcome(task, ended, folder)
    print_outcome(outcome, console, folder, page_url=page_url or f"{octo.transport.url}/")
    if as_json:
        print(msgspec.json.encode(outcome).decode(), flush=True)
    return EXIT_DONE if outcome.status == "completed" else EXIT_FAILED


def print_outcome(outcome: TaskOutcome, console: Console, folder: Path, *, page_url: str) -> None:
    """Print how a task ended and where to find what it made; ``page`` is where to look at it."""
    console.print()
    if outcome.status == "completed":
        # Why it did not complete was told as its last update.
        console.print(Text("Result", "octo.title"))
        console.print(Text(outcome.output.rstrip()))
        console.print()
    for artifact in outcome.artifacts:
        size = (f"  {artifact.size:,} bytes", "octo.quiet")
        console.print(Text.assemble(("Saved ", "octo.title"), _relative_path(Path(artifact.path)), size))
    console.print(Text.assemble(("All   ", "octo.title"), f"{_relative_path(folder)}/"))
    used = outcome.usage
    console.print(
        Text.assemble(
            ("Used  ", "octo.title"),
            f"{used.total_tokens:,} tokens ({used.prompt_tokens:,} read, {used.completion_tokens:,} written)",
        )
    )
    console.print(Text.assemble(("Page  ", "octo.title"), page_url))


def _relative_path(path: Path) -> str:
    """Return a path as it is shortest from here."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


async def _cancel(task: AsyncTaskHandle) -> None:
    """Cancel the task of an interrupted command, if the door still answers; the command ends either way."""
    with contextlib.suppress(OctoError, TimeoutError):
        async with asyncio.timeout(CANCEL_SECONDS):
            await task.cancel()
