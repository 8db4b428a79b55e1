"""The commands on tasks and events that exist already."""

from __future__ import annotations

from typing import Annotated

import typer

from octollm.cli.completing import complete_task
from octollm.contracts.task import TaskStatus

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
    from octollm.cli.task_views import list_command  # noqa: PLC0415

    raise typer.Exit(list_command(limit, status, as_json=as_json))


@task_app.command("show")
def show_task(task_id: TaskId, as_json: AsJson = False) -> None:
    """Show a task: its steps, its result or why there is none, and what it used."""
    from octollm.cli.task_views import show_command  # noqa: PLC0415

    raise typer.Exit(show_command(task_id, as_json=as_json))


@task_app.command("cancel")
def cancel_task(task_id: TaskId, as_json: AsJson = False) -> None:
    """Cancel a task that is not done; whatever it has running stops."""
    from octollm.cli.task_views import cancel_command  # noqa: PLC0415

    raise typer.Exit(cancel_command(task_id, as_json=as_json))


@events_app.command("tail")
def tail(
    after: Annotated[
        int | None, typer.Option(help="Begin behind this position of the log; 0 is its start.", min=0)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print each event's envelope as one line of JSON.")] = False,
) -> None:
    """Print events as they happen, until Ctrl-C."""
    from octollm.cli.event_tail import tail_command  # noqa: PLC0415

    raise typer.Exit(tail_command(after, as_json=as_json))
