"""`octollm task approve`, `reject` and `approvals`, and the question that `octollm run` asks at a terminal."""

from __future__ import annotations

import asyncio
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from octollm.cli.completion import complete_task
from octollm.cli.output import output
from octollm.cli.runtime import EXIT_DONE, AsJson, async_command, command_settings, open_client, print_json
from octollm.client import AsyncTaskHandle, Conflict
from octollm.contracts.api import TaskView
from octollm.contracts.approvals import ApprovalList, ApprovalView

POLL_SECONDS = 1.0
"""Interval at which a waiting question looks whether somebody else has decided."""

app = typer.Typer()

_TaskId = Annotated[str, typer.Argument(help="The task's id.", autocompletion=complete_task)]
_Approval = Annotated[
    str,
    typer.Option("--approval", "-a", help="One approval by its id, e.g. `plan` or a step; without it, all."),
]
_Comment = Annotated[str, typer.Option("--comment", "-m", help="A comment, which is recorded with the decision.")]


@app.command("approvals")
@async_command
async def list_approvals(as_json: AsJson = False) -> int:
    """List pending approvals, and when they expire."""
    async with open_client(command_settings()) as client:
        pending = await client.approvals()
    if as_json:
        print_json(ApprovalList(pending))
        return EXIT_DONE
    table = Table(box=None)
    for name in ("Task", "Approval", "Expires"):
        table.add_column(name, no_wrap=True)
    table.add_column("Why")
    for each in pending:
        view = each.approval
        table.add_row(each.task_id, Text(view.approval_id), view.expires_at[5:16].replace("T", " "), Text(view.reason))
    output().print(table if pending else Text("Nothing waits for approval."))
    return EXIT_DONE


@app.command("approve")
@async_command
async def approve_task(
    task_id: _TaskId,
    approval: _Approval = "",
    comment: _Comment = "",
    goal: Annotated[
        list[str] | None,
        typer.Option("--goal", "-g", help="Give a step another goal; may be given several times.", metavar="STEP=GOAL"),
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Approve the pending approvals of a task, optionally with other goals for its steps."""
    goals = dict(_parse_goal(text) for text in goal or [])
    async with open_client(command_settings()) as client:
        task = await client.task(task_id).approve(approval, comment=comment, goals=goals)
    return _print_decision(task, as_json=as_json)


@app.command("reject")
@async_command
async def reject_task(
    task_id: _TaskId, approval: _Approval = "", comment: _Comment = "", as_json: AsJson = False
) -> int:
    """Reject the pending approvals of a task; the task fails with the comment as the reason."""
    async with open_client(command_settings()) as client:
        task = await client.task(task_id).reject(approval, comment=comment)
    return _print_decision(task, as_json=as_json)


def _parse_goal(text: str) -> tuple[str, str]:
    step, equals, goal = text.partition("=")
    if not equals or not step.strip() or not goal.strip():
        raise typer.BadParameter(f"{text!r} is not STEP=GOAL.", param_hint="--goal")
    return step.strip(), goal.strip()


def _print_decision(task: TaskView, *, as_json: bool) -> int:
    if as_json:
        print_json(task)
    else:
        output().print(Text(f"{task.task_id} is {task.status}."))
    return EXIT_DONE


def _print_pending(task_id: str, pending: list[ApprovalView], console: Console) -> None:
    """Print what a task waits for, and how to decide it."""
    for view in pending:
        console.print(Text.assemble(("Approve? ", "octo.warn"), f"{view.approval_id}: {view.reason}"))
    console.print(Text(f"  octollm task approve {task_id}    or    octollm task reject {task_id}", "octo.quiet"))


async def show_approvals(task: AsyncTaskHandle, console: Console) -> None:
    """Print what a task waits for. The person at a terminal is asked until it is decided, here or elsewhere."""
    pending = await _read_pending(task)
    if pending:
        _print_pending(task.id, pending, console)
        if console.is_terminal and sys.stdin.isatty():
            await _ask_for_decision(task, console)


async def _ask_for_decision(task: AsyncTaskHandle, console: Console) -> None:
    console.print(Text("  y approves, n rejects, with a comment after it if you like: ", "octo.title"), end="")
    while True:
        line = await _read_line_or_decision(task)
        if line is None:
            console.print(Text("decided elsewhere", "octo.quiet"))
            return
        word, _, comment = line.strip().partition(" ")
        try:
            if word.lower() in ("y", "yes"):
                await task.approve(comment=comment.strip())
                return
            if word.lower() in ("n", "no"):
                await task.reject(comment=comment.strip())
                return
        except Conflict:
            # Somebody else was faster.
            return
        console.print(Text("  y or n: ", "octo.title"), end="")


async def _read_pending(task: AsyncTaskHandle) -> list[ApprovalView]:
    return [view for view in (await task.read()).approvals if view.status == "pending"]


async def _read_line_or_decision(task: AsyncTaskHandle) -> str | None:
    """Return the next line of standard input; ``None`` when nothing is left to decide, or the input has ended."""
    loop = asyncio.get_running_loop()
    line: asyncio.Future[str] = loop.create_future()

    def read() -> None:
        # The terminal hands over whole lines, so this does not block.
        if not line.done():
            line.set_result(sys.stdin.readline())

    loop.add_reader(sys.stdin.fileno(), read)
    try:
        while True:
            await asyncio.wait([line], timeout=POLL_SECONDS)
            if line.done():
                return line.result() or None
            if not await _read_pending(task):
                return None
    finally:
        loop.remove_reader(sys.stdin.fileno())
