"""`octollm task …`."""

from __future__ import annotations

import msgspec
from rich.table import Table
from rich.text import Text

from octollm.cli.door import open_client
from octollm.cli.environment import command_settings
from octollm.cli.exits import EXIT_DONE
from octollm.cli.running import run_command
from octollm.cli.terminal import output
from octollm.contracts.api import StepView, TaskView
from octollm.contracts.task import TaskStatus

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
