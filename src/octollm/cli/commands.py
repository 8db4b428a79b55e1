"""The commands that start an installation or give it a goal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.text import Text

from octollm.cli.door import has_no_installation, open_client
from octollm.cli.environment import command_settings
from octollm.cli.exits import EXIT_DONE, EXIT_FAILED
from octollm.cli.goal import GoalRequest, follow_task, print_outcome, print_updates, run_goal
from octollm.cli.goal_files import read_goal_files, validate_goal
from octollm.cli.results import results_folder, save_outcome
from octollm.cli.running import run_command
from octollm.cli.terminal import messages, output
from octollm.contracts.task import Budget


def demo_command(goal: str) -> int:
    """Start everything, do one goal, stop."""
    from octollm.cli.hosting import run_demo  # noqa: PLC0415  brings in every service; a client needs none

    async def work() -> int:
        wanted = validate_goal(goal)
        return await run_demo(command_settings(), wanted, output())

    return run_command(work)


def up_command(targets: Sequence[str]) -> int:
    """Run every service, and the arms that ``targets`` name, until Ctrl-C."""
    from octollm.cli.hosting import run_until_stopped  # noqa: PLC0415  brings in every service; a client needs none
    from octollm.installation.own_arm import load_arm  # noqa: PLC0415

    async def work() -> int:
        return await run_until_stopped(command_settings(), output(), [load_arm(target) for target in targets])

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
            from octollm.cli.hosting import run_single_goal  # noqa: PLC0415  brings in every service; a client needs none

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
