"""`octollm task pause`, `resume`, `instruct`, `skip`, `extend`, `history`, `retry`, `fork`: how a task goes on."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from octollm.cli.completion import complete_task
from octollm.cli.output import output
from octollm.cli.runtime import EXIT_DONE, AsJson, async_command, command_settings, open_client, print_json
from octollm.contracts.api import TaskView
from octollm.contracts.attempts import AttemptList, AttemptView, TextExcerpt

SHOWN_CHARS = 300
"""Characters of an input or output without ``--full``."""
_STYLES = {"accepted": "octo.good", "reused": "octo.good", "running": "octo.step", "cancelled": "octo.warn"}

app = typer.Typer()

_TaskId = Annotated[str, typer.Argument(help="The task's id.", autocompletion=complete_task)]


@app.command("pause")
@async_command
async def pause_task(task_id: _TaskId, as_json: AsJson = False) -> int:
    """Pause a task: its calls stop, and it holds no worker until it is resumed."""
    async with open_client(command_settings()) as client:
        task = await client.task(task_id).pause()
    return _print_status(task, as_json=as_json)


@app.command("resume")
@async_command
async def resume_task(task_id: _TaskId, as_json: AsJson = False) -> int:
    """Let a paused task go on where it was."""
    async with open_client(command_settings()) as client:
        task = await client.task(task_id).resume()
    return _print_status(task, as_json=as_json)


@app.command("instruct")
@async_command
async def instruct_task(
    task_id: _TaskId,
    text: Annotated[str, typer.Argument(help="What else to keep to.", metavar="TEXT")],
    as_json: AsJson = False,
) -> int:
    """Add an instruction to a task, which its next attempt or step keeps to."""
    async with open_client(command_settings()) as client:
        task = await client.task(task_id).instruct(text)
    return _print_status(task, as_json=as_json)


@app.command("skip")
@async_command
async def skip_step(
    task_id: _TaskId,
    step: Annotated[str, typer.Argument(help="The step's id.", metavar="STEP")],
    as_json: AsJson = False,
) -> int:
    """Skip a step: the task goes on without its result."""
    async with open_client(command_settings()) as client:
        task = await client.task(task_id).skip(step)
    return _print_status(task, as_json=as_json)


@app.command("extend")
@async_command
async def extend_task(
    task_id: _TaskId,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens that the task may use in all.", min=1)] = None,
    max_cost: Annotated[float | None, typer.Option(help="US dollars that it may cost in all.", min=0)] = None,
    max_seconds: Annotated[float | None, typer.Option(help="Seconds that it may take in all.", min=1)] = None,
    deadline: Annotated[str | None, typer.Option(help="When it ends at the latest (RFC 3339).", metavar="TIME")] = None,
    as_json: AsJson = False,
) -> int:
    """Raise the limits of a task that goes on. None can be lowered."""
    async with open_client(command_settings()) as client:
        task = await client.task(task_id).extend(
            max_tokens=max_tokens, max_cost_usd=max_cost, max_time_seconds=max_seconds, deadline=deadline
        )
    return _print_status(task, as_json=as_json)


@app.command("history")
@async_command
async def show_history(
    task_id: _TaskId,
    step: Annotated[str, typer.Option("--step", "-s", help="Only the attempts at this step.")] = "",
    full: Annotated[bool, typer.Option("--full", help="Show more of inputs and outputs.")] = False,
    as_json: AsJson = False,
) -> int:
    """Show every attempt at a task's steps: input, output, verdict with its reasons, cost and time."""
    async with open_client(command_settings()) as client:
        attempts = [attempt async for attempt in client.task(task_id).attempts(step=step)]
    if as_json:
        print_json(AttemptList(tuple(attempts)))
        return EXIT_DONE
    for attempt in attempts:
        _print_attempt(attempt, full=full)
    if not attempts:
        output().print(Text("No step was tried."))
    return EXIT_DONE


@app.command("retry")
@async_command
async def retry_task(task_id: _TaskId, as_json: AsJson = False) -> int:
    """Submit the goal of a task that has ended again, as a new task."""
    async with open_client(command_settings()) as client:
        task = await (await client.task(task_id).retry()).read()
    return _print_new(task, as_json=as_json)


@app.command("fork")
@async_command
async def fork_task(
    task_id: _TaskId,
    from_step: Annotated[
        str,
        typer.Option(
            "--from", "-f", help="Where it begins; without it, at the first step that did not complete.", metavar="STEP"
        ),
    ] = "",
    as_json: AsJson = False,
) -> int:
    """Run the plan of a task that has ended again from one step, as a new task with the results before it."""
    async with open_client(command_settings()) as client:
        task = await (await client.task(task_id).fork(from_step)).read()
    return _print_new(task, as_json=as_json)


def _print_status(task: TaskView, *, as_json: bool) -> int:
    if as_json:
        print_json(task)
    else:
        output().print(Text(f"{task.task_id} is {task.status}."))
    return EXIT_DONE


def _print_new(task: TaskView, *, as_json: bool) -> int:
    if as_json:
        print_json(task)
    else:
        output().print(Text(f"{task.task_id} is {task.status}. Follow it: octollm watch {task.task_id}"))
    return EXIT_DONE


def _print_attempt(attempt: AttemptView, *, full: bool) -> None:
    console, outcome, verdict = output(), attempt.outcome, attempt.outcome.verdict
    score = "" if verdict is None or verdict.score is None else f", score {verdict.score:.2f}"
    seconds = "" if attempt.duration_ms is None else f", {attempt.duration_ms / 1000:.1f} s"
    console.print(
        Text.assemble(
            (f"{attempt.step}  attempt {attempt.attempt}", "octo.title"),
            f"  {attempt.title} ({attempt.arm}): ",
            (attempt.status, _STYLES.get(attempt.status, "octo.bad")),
            f"{score}{seconds}, {attempt.tokens:,} tokens, {attempt.cost_usd:.4f} USD, began {attempt.started_at}",
        )
    )
    lines = [("goal", TextExcerpt(attempt.request.goal, len(attempt.request.goal)))]
    lines += [(f"from {step}", text) for step, text in attempt.request.inputs.items()]
    if outcome.output is not None:
        lines.append(("output", outcome.output))
    for name, text in lines:
        console.print(Text.assemble((f"    {name}: ", "octo.quiet"), _shorten(text, full=full)))
    for artifact in outcome.artifacts:
        console.print(Text.assemble(("    file: ", "octo.quiet"), f"{artifact.name}, {artifact.size:,} bytes"))
    if verdict is not None:
        for reason in verdict.reasons:
            console.print(Text(f"    · {reason}", "octo.quiet"))
    if outcome.error is not None:
        console.print(Text(f"    {outcome.error.detail} [{outcome.error.code}]", "octo.bad"))


def _shorten(text: TextExcerpt, *, full: bool) -> str:
    shown = text.text.rstrip() if full else " ".join(text.text.split())[:SHOWN_CHARS]
    if not full and len(text.text) > SHOWN_CHARS:
        return f"{shown}… ({text.length:,} characters)"
    return shown if not text.digest else f"{shown}… ({text.length:,} characters, sha256 {text.digest})"
