"""`octollm trace`: a task's spans as a tree, with self time per service, failures and tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from octollm.cli.output import output
from octollm.cli.runtime import EXIT_DONE, async_command, command_settings, open_client, print_json
from octollm.cli.tasks import TaskId
from octollm.contracts.observability import SpanView, TraceView

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
        bool, typer.Option("--all", help="Show the services' own bookkeeping too: budgets, keys, the directory.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the spans as JSON.")] = False,
) -> int:
    """Show where the time of a task went: every call of every service, as a tree with failures and tokens."""
    async with open_client(command_settings()) as client:
        view = await client.task(task_id).trace()
    if as_json:
        print_json(view)
    else:
        print_trace(view, output(), show_internal=show_internal)
    return EXIT_DONE


@dataclass(slots=True)
class SpanNode:
    """A span and its children, ordered by start."""

    span: SpanView
    children: list[SpanNode] = field(default_factory=list["SpanNode"])
    is_orphan: bool = False
    """The span of its caller is missing: that process died, or has not exported it yet."""

    @property
    def end(self) -> float:
        """Return when it ended, in seconds since the epoch."""
        return self.span.start + self.span.duration_ms / 1000


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


def build_tree(spans: Sequence[SpanView]) -> list[SpanNode]:
    """Return the roots, ordered by start; spans whose caller is missing hang below the first root."""
    nodes = [SpanNode(span) for span in sorted(spans, key=lambda span: (span.start, -span.duration_ms))]
    by_id: dict[str, SpanNode] = {}
    for node in nodes:
        by_id.setdefault(node.span.span_id, node)
    roots: list[SpanNode] = []
    for node in nodes:
        parent = by_id.get(node.span.parent_id)
        if parent is not None and parent is not node and not _is_below(parent, node):
            parent.children.append(node)
        else:
            node.is_orphan = bool(node.span.parent_id)
            roots.append(node)
    first, rest = roots[:1], roots[1:]
    for node in list(rest):
        if node.is_orphan:
            first[0].children.append(node)
            rest.remove(node)
    return first + rest


def _is_below(node: SpanNode, other: SpanNode) -> bool:
    return any(descendant is node for descendant in _walk(other))


def _walk(node: SpanNode) -> Iterator[SpanNode]:
    # A loop with a stack: a trace may be deeper than Python's recursion limit.
    stack = [node]
    while stack:
        current = stack.pop()
        yield current
        stack += current.children


def build_rows(roots: Sequence[SpanNode], *, show_internal: bool) -> tuple[list[TraceRow], int]:
    """Return the rows, and the number of bookkeeping calls between services that were left out.

    A client span and its server span share one row, as long as the client's. ``show_internal`` leaves nothing out.
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
        rows.append(_build_row(node, served_call, depth, zero))
        stack += [(child, depth + 1) for child in reversed(served_call.children)]
    return rows, hidden


def _build_row(node: SpanNode, served_call: SpanNode, depth: int, zero: float) -> TraceRow:
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
    return TraceRow(depth, server.service, server.name, span.start - zero, span.duration_ms / 1000, tuple(notes), why)


def self_time_by_place(roots: Sequence[SpanNode]) -> dict[str, float]:
    """Return the self time of each place in seconds, the largest first.

    A place is a service, a model, a sandbox, or ``on the way``: between a client span and its server span.
    """
    totals: dict[str, float] = defaultdict(float)
    for node in (descendant for root in roots for descendant in _walk(root)):
        totals[_place(node)] += _self_time(node)
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def _place(node: SpanNode) -> str:
    span = node.span
    if span.kind == "client":
        return span.name if "gen_ai.request.model" in span.attributes else "on the way"
    return "sandbox" if "octollm.sandbox" in span.attributes else span.service


def _self_time(node: SpanNode) -> float:
    """Return the seconds of a span during which none of its children was running."""
    seconds, reached = 0.0, node.span.start
    for child in sorted(node.children, key=lambda child: child.span.start):
        seconds += max(0.0, min(child.span.start, node.end) - reached)
        reached = max(reached, min(child.end, node.end))
    return seconds + max(0.0, node.end - reached)


def sum_usage(spans: Sequence[SpanView]) -> tuple[int, float]:
    """Return the tokens and US dollars of all model calls."""
    tokens, cost = 0, 0.0
    for span in spans:
        for kind in ("input", "output"):
            count = span.attributes.get(f"gen_ai.usage.{kind}_tokens", 0)
            tokens += count if isinstance(count, int) else 0
        price = span.attributes.get("octollm.cost_usd", 0.0)
        cost += price if isinstance(price, float) else 0.0
    return tokens, cost


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
    if hidden:
        console.print(Text(f"Left out: {hidden} calls of the services' own bookkeeping (--all)", "octo.quiet"))
    if not trace.complete:
        console.print(Text("There are more spans than one answer holds: only the first are shown.", "octo.warn"))


def _render_row(row: TraceRow, total_seconds: float) -> Text:
    indent = "  " * row.depth
    label = f"{indent}{row.service} "
    line = Text.assemble(label, (row.name, "octo.step"))
    line.truncate(_LABEL_WIDTH, overflow="ellipsis", pad=True)
    line.append(
        " " + render_bar(row.start / total_seconds, row.seconds / total_seconds),
        "octo.bad" if row.failure else "octo.title",
    )
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
