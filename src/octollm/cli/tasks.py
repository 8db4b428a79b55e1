"""`octollm run`, `watch` and `task`: submit a goal, follow a task, list, show and cancel tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
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
from octollm.cli.runtime import EXIT_DONE, EXIT_FAILED, command_settings, has_no_installation, open_client, run_command
from octollm.contracts.api import StepView, TaskView
from octollm.contracts.task import Budget, TaskStatus

task_app = typer.Typer(name="task", help="List, show and cancel tasks.", no_args_is_help=True)
events_app = typer.Typer(name="events", help="Follow the event log.", no_args_is_help=True)

TaskId = Annotated[str, typer.Argument(help="The task's id.", autocompletion=complete_task)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@task_app.command("list")
def list_tasks(
    limit: Annotated[int, typer.Option(help="How many, newest first.", min=1, max=200)] = 20,
    status: Annotated[TaskStatus | None, typer.Option(help="Only those with this status.")] = None,
    as_json: AsJson = False,
) -> None:
    """List tasks, newest first."""
    raise typer.Exit(list_command(limit, status, as_json=as_json))


@task_app.command("show")
def show_task(task_id: TaskId, as_json: AsJson = False) -> None:
    """Show a task: its steps, its result or why there is none, and what it used."""
    raise typer.Exit(show_command(task_id, as_json=as_json))


@task_app.command("cancel")
def cancel_task(task_id: TaskId, as_json: AsJson = False) -> None:
    """Cancel a task that is not done; whatever it has running stops."""
    raise typer.Exit(cancel_command(task_id, as_json=as_json))


@events_app.command("tail")
def tail(
    after: Annotated[
        int | None, typer.Option(help="Begin behind this position of the log; 0 is its start.", min=0)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print each event's envelope as one line of JSON.")] = False,
) -> None:
    """Print events as they happen, until Ctrl-C."""
    from octollm.cli.events import tail_command  # noqa: PLC0415

    raise typer.Exit(tail_command(after, as_json=as_json))


_TONES = {"completed": "octo.good", "failed": "octo.bad", "cancelled": "octo.warn"}


def list_command(limit: int, status: TaskStatus | None, *, as_json: bool) -> int:
    """List tasks."""

    async def work() -> int:
        async with open_client(command_settings()) as octo:
            found = await octo.task_page(limit=limit, status=status)
        if as_json:
            print(msgspec.json.encode(found).decode())
            return EXIT_DONE
        table = Table(box=None)
        for name, width in (("Task", 37), ("Status", 9), ("%", 3), ("Made", 11)):
            table.add_column(name, no_wrap=True, min_width=width)
        table.add_column("Goal", no_wrap=True, overflow="ellipsis", min_width=8)
        for task in found.tasks:
            goal = " ".join(task.goal.split())
            table.add_row(
                task.task_id,
                Text(task.status, style=_TONES.get(task.status, "")),
                f"{task.progress:.0f}",
                task.created_at[5:16].replace("T", " "),
                Text(goal),
            )
        output().print(table)
        return EXIT_DONE

    return run_command(work)


def show_command(task_id: str, *, as_json: bool) -> int:
    """Show one task."""

    async def work() -> int:
        async with open_client(command_settings()) as octo:
            task = await octo.task(task_id).read()
        if as_json:
            print(msgspec.json.encode(task).decode())
        else:
            _print_task(task)
        return EXIT_DONE

    return run_command(work)


def cancel_command(task_id: str, *, as_json: bool) -> int:
    """Cancel one task."""

    async def work() -> int:
        async with open_client(command_settings()) as octo:
            task = await octo.task(task_id).cancel()
        if as_json:
            print(msgspec.json.encode(task).decode())
        else:
            output().print(Text(f"{task.task_id} is {task.status}."))
        return EXIT_DONE

    return run_command(work)


def _print_task(task: TaskView) -> None:
    console = output()
    used = task.usage
    rows = {
        "Task": task.task_id,
        "Status": f"{task.status} ({task.progress:.0f} %)",
        "Goal": task.goal,
        "Made": task.created_at,
        "Ended": task.finished_at or "",
        "Model": task.model,
        "Used": f"{used.total_tokens:,} tokens, {used.cost_usd:.4f} USD",
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
        (step.status, _TONES.get(step.status, "")),
    )


def demo_command(goal: str) -> int:
    """Start everything, do one goal, stop."""
    from octollm.cli.up import run_demo  # noqa: PLC0415  brings in every service; a client needs none

    async def work() -> int:
        wanted = validate_goal(goal)
        return await run_demo(command_settings(), wanted, output())

    return run_command(work)


def up_command(targets: Sequence[str]) -> int:
    """Run every service, and the arms that ``targets`` name, until Ctrl-C."""
    from octollm.cli.up import run_until_stopped  # noqa: PLC0415  brings in every service; a client needs none
    from octollm.installation.arm_host import load_arms  # noqa: PLC0415

    async def work() -> int:
        return await run_until_stopped(command_settings(), output(), load_arms(targets))

    return run_command(work)


def run_goal_command(
    goal: str, files: Sequence[Path], criteria: Sequence[str], budget: Budget, *, as_json: bool, start: bool
) -> int:
    """Give a goal to the public door. Input is checked before anything is sent or started."""

    async def work() -> int:
        order = GoalRequest(validate_goal(goal), read_goal_files(files), budget, criteria)
        settings = command_settings()
        console = messages() if as_json else output()
        if start and await has_no_installation(settings):
            from octollm.cli.up import run_single_goal  # noqa: PLC0415  brings in every service; a client needs none

            console.print(Text("Nothing runs here yet: starting an installation for this goal", "octo.quiet"))
            return await run_single_goal(settings, order, console, as_json=as_json)
        async with open_client(settings) as octo:
            return await run_goal(octo, order, console, root=Path.cwd(), as_json=as_json)

    return run_command(work)


def watch_command(task_id: str, *, as_json: bool) -> int:
    """Follow a task; its end is the command's."""

    async def work() -> int:
        console = output()
        async with open_client(command_settings()) as octo:
            task = octo.task(task_id)
            # Asked first: a door that is not there, or knows no such task, is told at once.
            await task.read()
            ended = await (print_updates(task) if as_json else follow_task(task, console))
            folder = results_folder(task_id, Path.cwd())
            outcome = await save_outcome(task, ended, folder)
            if not as_json:
                print_outcome(outcome, console, folder, page_url=f"{octo.transport.url}/")
            return EXIT_DONE if ended.status == "completed" else EXIT_FAILED

    return run_command(work)
