"""`octollm run`, `watch` and `task`: submit a goal, follow a task, list, show and cancel tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from octollm.cli.completion import complete_task
from octollm.cli.goals import (
    GoalRequest,
    follow_task,
    print_outcome,
    print_updates,
    read_goal_files,
    results_folder,
    run_goal,
    save_outcome,
    validate_goal,
)
from octollm.cli.output import messages, output
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
from octollm.contracts.api import StepView, TaskView
from octollm.contracts.task import Budget, TaskStatus

_STATUS_STYLES = {"completed": "octo.good", "failed": "octo.bad", "cancelled": "octo.warn"}

app = typer.Typer()
task_app = typer.Typer(name="task", help="List, show and cancel tasks.", no_args_is_help=True)
app.add_typer(task_app, rich_help_panel="Tasks")

TaskId = Annotated[str, typer.Argument(help="The task's id.", autocompletion=complete_task)]


@app.command(rich_help_panel="Tasks")
@async_command
async def run(
    goal: Annotated[str, typer.Argument(help="What the team is to do.", metavar="GOAL")],
    file: Annotated[
        list[Path] | None,
        typer.Option("--file", "-f", help="A file that the goal is about; may be given several times.", metavar="PATH"),
    ] = None,
    criterion: Annotated[
        list[str] | None,
        typer.Option("--criterion", "-c", help="What the result has to satisfy; may be given several times."),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens that the task may use.", min=1)] = None,
    max_seconds: Annotated[float | None, typer.Option(help="Seconds that the task may take.", min=1)] = None,
    max_cost: Annotated[float | None, typer.Option(help="US dollars that the task may cost.", min=0)] = None,
    start: Annotated[
        bool, typer.Option(help="If no installation runs on this machine, start one for this goal alone.")
    ] = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object to standard output, and the rest to standard error.")
    ] = False,
) -> int:
    """Submit a goal, watch it live, and save the result to ./octollm-results.

    If no installation runs on this machine, one is started in this process for the goal and stopped after it; never
    with OCTOLLM_URL set. Ctrl-C cancels the task. The exit code is 0 only when the task completed.
    """
    # All input is checked before anything is sent or started.
    budget = Budget(max_tokens=max_tokens, max_cost_usd=max_cost, max_time_seconds=max_seconds)
    request = GoalRequest(validate_goal(goal), read_goal_files(file or []), budget, criterion or [])
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
        final = await (print_updates(task) if as_json else follow_task(task, console))
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
    table.add_column("Goal", no_wrap=True, overflow="ellipsis", min_width=8)
    for task in page.tasks:
        table.add_row(
            task.task_id,
            Text(task.status, style=_STATUS_STYLES.get(task.status, "")),
            f"{task.progress:.0f}",
            task.created_at[5:16].replace("T", " "),
            Text(" ".join(task.goal.split())),
        )
    output().print(table)
    return EXIT_DONE


@task_app.command("show")
@async_command
async def show_task(task_id: TaskId, as_json: AsJson = False) -> int:
    """Show a task: its steps, its result or the reason of its failure, and its usage."""
    async with open_client(command_settings()) as client:
        task = await client.task(task_id).read()
    if as_json:
        print_json(task)
    else:
        _print_task(task)
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


def _print_task(task: TaskView) -> None:
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
    }
    for name, value in rows.items():
        if value:
            console.print(Text.assemble((f"{name:<8}", "octo.title"), value))
    for step in task.steps:
        console.print(_step_line(step))
        for reason in step.reasons:
            console.print(Text(f"    · {reason}", "octo.quiet"))
    if task.error is not None:
        console.print(Text(f"{task.error.detail} [{task.error.code}]", "octo.bad"))
        for reason in task.error.reasons:
            console.print(Text(f"    · {reason}", "octo.quiet"))
    if task.output:
        console.print()
        console.print(Text(task.output.rstrip()))
    for artifact in task.artifacts:
        console.print(Text.assemble(("File    ", "octo.title"), f"{artifact.name}, {artifact.size:,} bytes"))


def _step_line(step: StepView) -> Text:
    return Text.assemble(
        ("Step    ", "octo.title"),
        f"{step.step}  {step.title} ({step.arm}, attempt {step.attempt}): ",
        (step.status, _STATUS_STYLES.get(step.status, "")),
    )
