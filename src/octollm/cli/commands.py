"""The commands that start an installation or give it a goal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from octollm.cli.door import open_door
from octollm.cli.environment import command_settings
from octollm.cli.exits import EXIT_DONE, EXIT_FAILED
from octollm.cli.goal import Order, carry_out, follow, show_outcome
from octollm.cli.goal_files import check_goal, read_files
from octollm.cli.results import folder_of, save_outcome
from octollm.cli.running import run_command
from octollm.cli.terminal import messages, output
from octollm.contracts.task import Budget


def demo_command(goal: str) -> int:
    """Start everything, do one goal, stop."""
    from octollm.cli.hosting import show_demo  # noqa: PLC0415  brings in every service; a client needs none

    async def work() -> int:
        wanted = check_goal(goal)
        return await show_demo(command_settings(), wanted, output())

    return run_command(work)


def up_command() -> int:
    """Run every service until Ctrl-C."""
    from octollm.cli.hosting import stay_up  # noqa: PLC0415  brings in every service; a client needs none

    async def work() -> int:
        return await stay_up(command_settings(), output())

    return run_command(work)


def run_goal_command(
    goal: str, files: Sequence[Path], criteria: Sequence[str], budget: Budget, *, as_json: bool
) -> int:
    """Give a goal to the public door. Input is checked before anything is sent."""

    async def work() -> int:
        order = Order(check_goal(goal), read_files(files), budget, criteria)
        async with open_door(command_settings()) as door:
            console = messages() if as_json else output()
            return await carry_out(door, order, console, root=Path.cwd(), as_json=as_json)

    return run_command(work)


def watch_command(task_id: str) -> int:
    """Follow a task; its end is the command's."""

    async def work() -> int:
        console = output()
        async with open_door(command_settings()) as door:
            task = await follow(door, task_id, console)
            folder = folder_of(task_id, Path.cwd())
            show_outcome(await save_outcome(door, task, folder), console, door, folder)
            return EXIT_DONE if task.status == "completed" else EXIT_FAILED

    return run_command(work)
