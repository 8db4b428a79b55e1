"""`octollm trace TASK`."""

from __future__ import annotations

import msgspec
from rich.console import Console
from rich.text import Text

from octollm.cli.door import open_client
from octollm.cli.environment import command_settings
from octollm.cli.exits import EXIT_DONE
from octollm.cli.running import run_command
from octollm.cli.terminal import output
from octollm.cli.trace_tree import TraceRow, build_rows, build_tree, self_time_by_place, sum_usage
from octollm.contracts.traces import TraceView

BAR_WIDTH = 24
_LABEL_WIDTH = 44
_MAX_PLACES = 8


def trace_command(task_id: str, *, show_internal: bool, as_json: bool) -> int:
    """Show the trace of one task."""

    async def work() -> int:
        async with open_client(command_settings()) as octo:
            trace = await octo.task(task_id).trace()
        if as_json:
            print(msgspec.json.encode(trace).decode())
        else:
            print_trace(trace, output(), show_internal=show_internal)
        return EXIT_DONE

    return run_command(work)


def print_trace(trace: TraceView, console: Console, *, show_internal: bool) -> None:
    """Print a trace: its tree, and where the time went."""
    roots = build_tree(trace.spans)
    if not roots:
        console.print(
            Text(
                "No spans of this task are kept. They come within a second of the work and go after a week; a task"
                " that was submitted in a trace which is not sampled leaves none."
            )
        )
        return
    rows, hidden = build_rows(roots, show_internal=show_internal)
    whole = max([1e-6, *(row.start + row.seconds for row in rows)])
    for row in rows:
        console.print(_render_row(row, whole), no_wrap=True, overflow="ellipsis", crop=console.is_terminal)
    tokens, cost = sum_usage(trace.spans)
    console.print()
    console.print(
        Text.assemble(("Total    ", "octo.title"), f"{_format_duration(whole)}, {tokens:,} tokens, {cost:.4f} USD")
    )
    places = self_time_by_place(roots)
    spent = sum(places.values()) or 1.0
    for number, (place, seconds) in enumerate(list(places.items())[:_MAX_PLACES]):
        title = "Time in  " if number == 0 else " " * 9
        console.print(
            Text.assemble((title, "octo.title"), f"{place:<28}{_format_duration(seconds):>9} {seconds / spent:>5.0%}")
        )
    if hidden:
        console.print(Text(f"Left out: {hidden} calls of the services' own bookkeeping (--all)", "octo.quiet"))
    if not trace.complete:
        console.print(Text("There are more spans than one answer holds: only the first are shown.", "octo.warn"))


def _render_row(row: TraceRow, whole: float) -> Text:
    indent = "  " * row.depth
    label = f"{indent}{row.service} "
    line = Text.assemble(label, (row.name, "octo.step"))
    line.truncate(_LABEL_WIDTH, overflow="ellipsis", pad=True)
    line.append(" " + render_bar(row.start / whole, row.seconds / whole), "octo.bad" if row.failure else "octo.title")
    line.append(f" {_format_duration(row.seconds):>8}  ")
    if row.failure:
        line.append(" ".join(row.failure.split())[:160] + "  ", "octo.bad")
    line.append(", ".join(row.notes), "octo.quiet")
    line.rstrip()
    return line


def render_bar(start: float, share: float) -> str:
    """Return a bar for a part of the whole; even the shortest shows."""
    first = min(int(start * BAR_WIDTH), BAR_WIDTH - 1)
    length = max(1, min(round(share * BAR_WIDTH), BAR_WIDTH - first))
    return "·" * first + "█" * length + "·" * (BAR_WIDTH - first - length)


def _format_duration(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.1f} ms"
    return f"{seconds:.2f} s" if seconds < 100 else f"{seconds:.0f} s"
