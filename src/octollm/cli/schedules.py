"""`octollm schedule`: goals that are submitted again and again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer
from rich.table import Table
from rich.text import Text

from octollm.cli.goals import read_goal_files, validate_goal
from octollm.cli.output import output, table_cell
from octollm.cli.runtime import EXIT_DONE, AsJson, async_command, command_settings, open_client, print_json
from octollm.contracts.schedules import CatchUp, Overlap, ScheduleList, ScheduleView

app = typer.Typer()
schedule_app = typer.Typer(
    name="schedule", help="Submit goals at the times of a cron expression.", no_args_is_help=True
)
app.add_typer(schedule_app, rich_help_panel="Tasks")

ScheduleId = Annotated[
    str, typer.Argument(help="The schedule's id, from `octollm schedule list`.", metavar="SCHEDULE_ID")
]


@schedule_app.command("add")
@async_command
async def add_schedule(
    cron: Annotated[str, typer.Argument(help='Five fields, e.g. "0 7 * * 1": Mondays at seven.', metavar="CRON")],
    goal: Annotated[str, typer.Argument(help="The goal, in plain language.", metavar="GOAL")],
    tz: Annotated[str, typer.Option(help="Time zone of the expression, e.g. Europe/Berlin.")] = "UTC",
    file: Annotated[
        list[Path] | None,
        typer.Option("--file", "-f", help="A file that the goal is about; may be given several times.", metavar="PATH"),
    ] = None,
    catch_up: Annotated[
        str, typer.Option(help="Runs to make up for after an outage: none, last, or all (up to 100).")
    ] = "last",
    overlap: Annotated[
        str, typer.Option(help="While the task of the previous run has not ended: skip or allow.")
    ] = "skip",
    as_json: AsJson = False,
) -> int:
    """Submit a goal at the times of a cron expression, with your authority."""
    goal, files = validate_goal(goal), read_goal_files(file or [])
    async with open_client(command_settings()) as client:
        schedule = await client.schedules.create(
            cron,
            goal,
            time_zone=tz,
            files=[await client.upload((each.name, each.content)) for each in files],
            catch_up=cast("CatchUp", catch_up),
            overlap=cast("Overlap", overlap),
        )
    if as_json:
        print_json(schedule)
    else:
        output().print(Text(f"Schedule {schedule.id}: next run {schedule.next_run}."))
    return EXIT_DONE


@schedule_app.command("list")
@async_command
async def list_schedules(as_json: AsJson = False) -> int:
    """List schedules with their next runs."""
    async with open_client(command_settings()) as client:
        found = await client.schedules.list()
    if as_json:
        print_json(ScheduleList(found))
        return EXIT_DONE
    table = Table(box=None)
    for column in ("Id", "Cron", "Time zone", "State", "Next run", "Goal"):
        table.add_column(column, no_wrap=column in ("Id", "State"), overflow="fold")
    for schedule in found:
        table.add_row(
            schedule.id,
            Text(schedule.cron),
            schedule.time_zone,
            schedule.state,
            (schedule.next_run or "")[:16],
            table_cell(schedule.goal),
        )
    output().print(table)
    return EXIT_DONE


@schedule_app.command("show")
@async_command
async def show_schedule(schedule_id: ScheduleId, as_json: AsJson = False) -> int:
    """Show a schedule and the outcomes of its last runs."""
    async with open_client(command_settings()) as client:
        schedule = await client.schedules.read(schedule_id)
    if as_json:
        print_json(schedule)
    else:
        _print_schedule(schedule)
    return EXIT_DONE


@schedule_app.command("pause")
@async_command
async def pause_schedule(schedule_id: ScheduleId, as_json: AsJson = False) -> int:
    """Pause a schedule."""
    async with open_client(command_settings()) as client:
        schedule = await client.schedules.pause(schedule_id)
    return _print_state(schedule, as_json=as_json)


@schedule_app.command("resume")
@async_command
async def resume_schedule(schedule_id: ScheduleId, as_json: AsJson = False) -> int:
    """Resume a schedule at its next planned time."""
    async with open_client(command_settings()) as client:
        schedule = await client.schedules.resume(schedule_id)
    return _print_state(schedule, as_json=as_json)


@schedule_app.command("run")
@async_command
async def run_schedule(schedule_id: ScheduleId, as_json: AsJson = False) -> int:
    """Submit the task of a schedule now, and print its id."""
    async with open_client(command_settings()) as client:
        task = await client.schedules.run(schedule_id)
    if as_json:
        print_json(task)
    else:
        print(task.task_id, flush=True)
    return EXIT_DONE


@schedule_app.command("remove")
@async_command
async def remove_schedule(schedule_id: ScheduleId, as_json: AsJson = False) -> int:
    """Remove a schedule. Tasks that it started continue."""
    async with open_client(command_settings()) as client:
        await client.schedules.delete(schedule_id)
    if as_json:
        print_json({"id": schedule_id, "state": "removed"})
    else:
        output().print(Text(f"Schedule {schedule_id} is removed."))
    return EXIT_DONE


def _print_state(schedule: ScheduleView, *, as_json: bool) -> int:
    if as_json:
        print_json(schedule)
    else:
        following = f", next run {schedule.next_run}" if schedule.next_run else ""
        output().print(Text(f"Schedule {schedule.id} is {schedule.state}{following}."))
    return EXIT_DONE


def _print_schedule(schedule: ScheduleView) -> None:
    console = output()
    rows = {
        "Schedule": schedule.id,
        "Times": f"{schedule.cron} ({schedule.time_zone})",
        "State": f"{schedule.state} {schedule.reason}".strip(),
        "Next run": schedule.next_run or "",
        "Goal": schedule.goal,
        "Policy": f"catch up {schedule.catch_up}, overlap {schedule.overlap}",
    }
    for name, value in rows.items():
        if value:
            console.print(Text.assemble((f"{name:<9}", "octo.title"), value))
    for run in schedule.runs:
        console.print(Text(f"    · {run.planned_at}  {run.outcome}  {run.task_id or run.reason}", "octo.quiet"))
