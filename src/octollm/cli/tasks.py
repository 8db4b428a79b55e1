"""`octollm run`, `watch` and `task`: submit a goal, follow a task, list, show and cancel tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from octollm.cli.approvals import app as approvals_app
from octollm.cli.completion import complete_task
from octollm.cli.following import follow_task, print_updates, read_subtasks
from octollm.cli.goals import (
    GoalRequest,
    print_outcome,
    read_goal_files,
    results_folder,
    run_goal,
    save_outcome,
    validate_goal,
)
from octollm.cli.output import messages, output, table_cell
from octollm.cli.progress import SubTaskBranch
from octollm.cli.runtime import (
    EXIT_DONE,
    EXIT_FAILED,
    AsJson,
    async_command,
    command_settings,
    has_no_installation,
    open_client,
    print_json,
)
from octollm.cli.task_recordings import app as recordings_app
from octollm.cli.task_runs import app as runs_app
from octollm.contracts.api import StepView, TaskView
from octollm.contracts.approvals import ApprovalPolicy, ApprovalView
from octollm.contracts.task import Budget, TaskStatus

_STATUS_STYLES = {"completed": "octo.good", "failed": "octo.bad", "cancelled": "octo.warn"}

app = typer.Typer()
task_app = typer.Typer(name="task", help="List, show, steer, cancel and repeat tasks.", no_args_is_help=True)
task_app.add_typer(approvals_app)
task_app.add_typer(runs_app)
task_app.add_typer(recordings_app)
app.add_typer(task_app, rich_help_panel="Tasks")

TaskId = Annotated[str, typer.Argument(help="The task's id.", autocompletion=complete_task)]


@app.command(rich_help_panel="Tasks")
@async_command
async def run(
    goal: Annotated[str, typer.Argument(help="The goal, in plain language.", metavar="GOAL")],
    file: Annotated[
        list[Path] | None,
        typer.Option("--file", "-f", help="A file that the goal is about; may be given several times.", metavar="PATH"),
    ] = None,
    criterion: Annotated[
        list[str] | None,
        typer.Option("--criterion", "-c", help="An acceptance criterion for the result; may be given several times."),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Token budget of the task.", min=1)] = None,
    max_seconds: Annotated[float | None, typer.Option(help="Time limit of the task in seconds.", min=1)] = None,
    approve: Annotated[
        list[str] | None,
        typer.Option(
            "--approve",
            "-a",
            help="What waits for your approval: `plan`, an arm, a scope such as executor:http, or * for every step;"
            " may be given several times.",
        ),
    ] = None,
    max_cost: Annotated[float | None, typer.Option(help="Budget of the task in US dollars.", min=0)] = None,
    start: Annotated[
        bool, typer.Option(help="If no installation runs on this machine, start one for this goal alone.")
    ] = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object to standard output, and the rest to standard error.")
    ] = False,
) -> int:
    """Submit a goal, watch it live, and save the result to ./octollm-results.

    If no installation runs on this machine, one is started in this process for the goal and stopped after it; never
    with OCTOLLM_URL set. Ctrl-C cancels the task. The exit code is 0 if the task completed with a result.
    """
    # All input is checked before anything is sent or started.
    budget = Budget(max_tokens=max_tokens, max_cost_usd=max_cost, max_time_seconds=max_seconds)
    rules = approve or []
    approval = ApprovalPolicy(plan="plan" in rules, steps=tuple(rule for rule in rules if rule != "plan"))
    request = GoalRequest(validate_goal(goal), read_goal_files(file or []), budget, criterion or [], approval)
    settings = command_settings()
    console = messages() if as_json else output()
    if start and await has_no_installation(settings):
        from octollm.cli.up import run_single_goal  # noqa: PLC0415  imports every service

        console.print(Text("Nothing runs here yet: starting an installation for this goal", "octo.quiet"))
        return await run_single_goal(settings, request, console, as_json=as_json)
    async with open_client(settings) as client:
        return await run_goal(client, request, console, root=Path.cwd(), as_json=as_json)


@app.command(rich_help_panel="Tasks")
@async_command
async def watch(
    task_id: TaskId,
    as_json: Annotated[bool, typer.Option("--json", help="Print each frame as one line of JSON.")] = False,
) -> int:
    """Follow a task live from its beginning and save its result; Ctrl-C leaves it running."""
    console = output()
    async with open_client(command_settings()) as client:
        task = client.task(task_id)
        # Read first: updates() would retry for a minute before it reports a gateway that is not there.
        await task.read()
        final = await (print_updates(task) if as_json else follow_task(client, task, console))
        folder = results_folder(task_id, Path.cwd())
        outcome = await save_outcome(task, final, folder)
        if not as_json:
            print_outcome(outcome, console, folder, page_url=f"{client.url}/")
        return EXIT_DONE if final.status == "completed" else EXIT_FAILED


@task_app.command("list")
@async_command
async def list_tasks(
    limit: Annotated[int, typer.Option(help="How many, newest first.", min=1, max=200)] = 20,
    status: Annotated[TaskStatus | None, typer.Option(help="Only those with this status.")] = None,
    as_json: AsJson = False,
) -> int:
    """List tasks, newest first."""
    async with open_client(command_settings()) as client:
        page = await client.task_page(limit=limit, status=status)
    if as_json:
        print_json(page)
        return EXIT_DONE
    table = Table(box=None)
    for name, width in (("Task", 37), ("Status", 9), ("%", 3), ("Made", 11)):
        table.add_column(name, no_wrap=True, min_width=width)
    # The one column that gives way: rich narrows every column without line breaks, down to nothing.
    table.add_column("Goal", min_width=8)
    for task in page.tasks:
        goal = table_cell(task.goal)
        goal.no_wrap, goal.overflow = True, "ellipsis"
        table.add_row(
            task.task_id,
            Text(task.status, style=_STATUS_STYLES.get(task.status, "")),
            f"{task.progress:.0f}",
            task.created_at[5:16].replace("T", " "),
            goal,
        )
    output().print(table)
    return EXIT_DONE


@task_app.command("show")
@async_command
async def show_task(task_id: TaskId, as_json: AsJson = False) -> int:
    """Show a task: its steps, its result or the reason for its failure, and its usage."""
    async with open_client(command_settings()) as client:
        task = await client.task(task_id).read()
        subtasks = [] if as_json else await read_subtasks(client, task)
    if as_json:
        print_json(task)
    else:
        _print_task(task, subtasks)
    return EXIT_DONE


@task_app.command("cancel")
@async_command
async def cancel_task(task_id: TaskId, as_json: AsJson = False) -> int:
    """Cancel a task that has not ended; its running steps stop."""
    async with open_client(command_settings()) as client:
        task = await client.task(task_id).cancel()
    if as_json:
        print_json(task)
    else:
        output().print(Text(f"{task.task_id} is {task.status}."))
    return EXIT_DONE


def _print_task(task: TaskView, subtasks: Sequence[SubTaskBranch]) -> None:
    console = output()
    usage = task.usage
    rows = {
        "Task": task.task_id,
        "Status": f"{task.status} ({task.progress:.0f} %)",
        "Goal": task.goal,
        "Made": task.created_at,
        "Ended": task.finished_at or "",
        "Model": task.model,
        "Used": f"{usage.total_tokens:,} tokens, {usage.cost_usd:.4f} USD",
        "Trace": task.trace_id,
        "Fork of": task.forked_from or "",
        "Part of": task.parent_task_id or "",
    }
    for name, value in rows.items():
        if value:
            console.print(Text.assemble((f"{name:<8}", "octo.title"), value))
    for approval in task.approvals:
        console.print(_approval_line(approval))
    for instruction in task.instructions:
        console.print(Text.assemble(("Told    ", "octo.title"), f"{instruction.text} (by {instruction.given_by})"))
    for step in task.steps:
        console.print(_step_line(step))
        for reason in step.reasons:
            console.print(Text(f"    · {reason}", "octo.quiet"))
    for child in subtasks:
        goal = table_cell(child.goal).plain
        status = (child.status, _STATUS_STYLES.get(child.status, ""))
        console.print(
            Text.assemble(("Sub-task", "octo.title"), f"{'  ' * child.depth}└ {child.task_id} ", status, f"  {goal}")
        )
    if task.error is not None:
        console.print(Text(f"{task.error.detail} [{task.error.code}]", "octo.bad"))
        for reason in task.error.reasons:
            if reason not in task.error.detail:
                console.print(Text(f"    · {reason}", "octo.quiet"))
    if task.output:
        console.print()
        console.print(Text(task.output.rstrip()))
    for artifact in task.artifacts:
        console.print(Text.assemble(("File    ", "octo.title"), f"{artifact.name}, {artifact.size:,} bytes"))


def _approval_line(approval: ApprovalView) -> Text:
    decided = f" by {approval.decided_by}" if approval.decided_by else ""
    comment = f": {approval.comment}" if approval.comment else ""
    style = {"approved": "octo.good", "pending": "octo.warn"}.get(approval.status, "octo.bad")
    what = f"{approval.approval_id}  {approval.reason} "
    return Text.assemble(("Approval ", "octo.title"), what, (approval.status, style), decided, comment)


def _step_line(step: StepView) -> Text:
    return Text.assemble(
        ("Step    ", "octo.title"),
        f"{step.step}  {step.title} ({step.arm}, attempt {step.attempt}): ",
        (step.status, _STATUS_STYLES.get(step.status, "")),
    )
