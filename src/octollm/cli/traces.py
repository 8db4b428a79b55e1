"""`octollm trace`: a task's spans as a tree, with self time per service, failures, tokens and the critical path."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from octollm.cli.critical_path import CriticalPath, find_critical_path
from octollm.cli.output import output
from octollm.cli.runtime import EXIT_DONE, async_command, command_settings, open_client, print_json
from octollm.cli.span_tree import SpanNode, build_tree, self_time_by_place, sum_usage
from octollm.cli.tasks import TaskId
from octollm.contracts.observability import TraceView

ORPHAN_NOTE = "its caller left no span"
BAR_WIDTH = 24
_LABEL_WIDTH = 44
_MAX_PLACES = 8

app = typer.Typer()


@app.command(rich_help_panel="Tasks")
@async_command
async def trace(
    task_id: TaskId,
    show_internal: Annotated[
        bool, typer.Option("--all", help="Also show the services' internal bookkeeping: budgets, keys, the directory.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the spans and the critical path as JSON.")] = False,
) -> int:
    """Show where the time of a task went: every call of every service, as a tree, and what the task waited for."""
    async with open_client(command_settings()) as client:
        view = await client.task(task_id).trace()
    if as_json:
        path = find_critical_path(build_tree(view.spans))
        print_json(TraceReport(view.task_id, view.spans, view.complete, path))
    else:
        print_trace(view, output(), show_internal=show_internal)
    return EXIT_DONE


class TraceReport(TraceView, frozen=True):
    """The JSON document of `octollm trace --json`: the spans of a task, and its critical path."""

    critical_path: CriticalPath = CriticalPath()


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One line: ``start`` is in seconds from the first span's, ``seconds`` how long it took."""

    depth: int
    service: str
    name: str
    start: float
    seconds: float
    notes: tuple[str, ...] = ()
    failure: str = ""
    is_critical: bool = False
    """Whether it is on the critical path."""


def build_rows(
    roots: Sequence[SpanNode], *, show_internal: bool, critical: Set[str] = frozenset()
) -> tuple[list[TraceRow], int]:
    """Return the rows, and the number of bookkeeping calls between services that were left out.

    ``critical`` has the ids of the spans on the critical path. A client span and its server span share one row, as long
    as the client's. ``show_internal`` leaves nothing out.
    """
    if not roots:
        return [], 0
    zero = min(root.span.start for root in roots)
    rows: list[TraceRow] = []
    hidden = 0
    stack = [(root, 0) for root in reversed(roots)]
    while stack:
        node, depth = stack.pop()
        served_call = node
        if node.span.kind == "client" and len(node.children) == 1 and node.children[0].span.kind == "server":
            [served_call] = node.children
        # Calls between services carry the caller's name; a failed one is shown in any case.
        if not show_internal and "octollm.peer" in served_call.span.attributes and not served_call.span.code:
            hidden += 1
            continue
        is_critical = bool({node.span.span_id, served_call.span.span_id} & critical)
        rows.append(_build_row(node, served_call, depth, zero, is_critical=is_critical))
        stack += [(child, depth + 1) for child in reversed(served_call.children)]
    return rows, hidden


def _build_row(node: SpanNode, served_call: SpanNode, depth: int, zero: float, *, is_critical: bool) -> TraceRow:
    span, server = node.span, served_call.span
    attributes = {**span.attributes, **server.attributes}
    notes: list[str] = []
    tokens = [attributes.get(f"gen_ai.usage.{kind}_tokens") for kind in ("input", "output")]
    if None not in tokens:
        notes.append(f"{tokens[0]} + {tokens[1]} tokens")
    cost = attributes.get("octollm.cost_usd")
    if isinstance(cost, float) and cost:
        notes.append(f"{cost:.4f} USD")
    if "octollm.first_token_ms" in attributes:
        notes.append(f"first token after {attributes['octollm.first_token_ms']} ms")
    attempts = attributes.get("octollm.attempts")
    if isinstance(attempts, int) and attempts > 1:
        notes.append(f"{attempts} tries")
    if "octollm.replayed" in attributes:
        notes.append("answered from the journal")
    if attributes.get("process.exit.code"):
        notes.append(f"exit code {attributes['process.exit.code']}")
    if attributes.get("octollm.limit"):
        notes.append(f"stopped by {attributes['octollm.limit']}")
    if node.is_orphan:
        notes.append(ORPHAN_NOTE)
    failed = server if server.code else span
    why = f"{failed.code}: {failed.message}" if failed.message else failed.code
    start, seconds = span.start - zero, span.duration_ms / 1000
    return TraceRow(depth, server.service, server.name, start, seconds, tuple(notes), why, is_critical)


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
    path = find_critical_path(roots)
    critical = {segment.span_id for segment in path.path} - {""}
    rows, hidden = build_rows(roots, show_internal=show_internal, critical=critical)
    total_seconds = max([1e-6, *(row.start + row.seconds for row in rows)])
    for row in rows:
        console.print(_render_row(row, total_seconds), no_wrap=True, overflow="ellipsis", crop=console.is_terminal)
    tokens, cost = sum_usage(trace.spans)
    console.print()
    console.print(
        Text.assemble(
            ("Total    ", "octo.title"), f"{_format_duration(total_seconds)}, {tokens:,} tokens, {cost:.4f} USD"
        )
    )
    places = self_time_by_place(roots)
    place_seconds = sum(places.values()) or 1.0
    for number, (place, seconds) in enumerate(list(places.items())[:_MAX_PLACES]):
        title = "Time in  " if number == 0 else " " * 9
        console.print(
            Text.assemble(
                (title, "octo.title"), f"{place:<28}{_format_duration(seconds):>9} {seconds / place_seconds:>5.0%}"
            )
        )
    _print_critical_path(path, console)
    if hidden:
        console.print(Text(f"Left out: {hidden} calls of the services' own bookkeeping (--all)", "octo.quiet"))
    if not trace.complete:
        console.print(Text("There are more spans than one answer holds: only the first are shown.", "octo.warn"))


def _print_critical_path(path: CriticalPath, console: Console) -> None:
    for number, share in enumerate(path.waited_for):
        title = "Waited   " if number == 0 else " " * 9
        duration = _format_duration(share.duration_ms / 1000)
        line = Text.assemble((title, "octo.title"), f"{share.waited_for:<28}{duration:>9} {share.percent:>5.1f}%")
        if share.mostly_in:
            line.append(f"  mostly in {share.mostly_in}", "octo.quiet")
        console.print(line)


def _render_row(row: TraceRow, total_seconds: float) -> Text:
    indent = "  " * row.depth
    label = f"{indent}{row.service} "
    line = Text.assemble(label, (row.name, "octo.step"))
    line.truncate(_LABEL_WIDTH, overflow="ellipsis", pad=True)
    line.append(
        " " + render_bar(row.start / total_seconds, row.seconds / total_seconds, "█" if row.is_critical else "▒"),
        "octo.bad" if row.failure else "octo.title",
    )
    line.append(f" {_format_duration(row.seconds):>8}  ")
    if row.failure:
        line.append(" ".join(row.failure.split())[:160] + "  ", "octo.bad")
    line.append(", ".join(row.notes), "octo.quiet")
    line.rstrip()
    return line


def render_bar(start: float, share: float, fill: str = "█") -> str:
    """Return a bar for a part of the whole; even the shortest shows."""
    first = min(int(start * BAR_WIDTH), BAR_WIDTH - 1)
    length = max(1, min(round(share * BAR_WIDTH), BAR_WIDTH - first))
    return "·" * first + fill * length + "·" * (BAR_WIDTH - first - length)


def _format_duration(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.1f} ms"
    return f"{seconds:.2f} s" if seconds < 100 else f"{seconds:.0f} s"
