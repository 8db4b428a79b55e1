"""The spans of a trace as a tree, and what is summed up over it: self time, tokens and cost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from octollm.contracts.observability import SpanView


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
    return any(descendant is node for descendant in walk(other))


def walk(node: SpanNode) -> Iterator[SpanNode]:
    """Yield a span and all below it."""
    # A loop with a stack: a trace may be deeper than Python's recursion limit.
    stack = [node]
    while stack:
        current = stack.pop()
        yield current
        stack += current.children


def self_time_by_place(roots: Sequence[SpanNode]) -> dict[str, float]:
    """Return the self time of each place in seconds, the largest first.

    A place is a service, a model, a sandbox, or ``on the way``: between a client span and its server span.
    """
    totals: dict[str, float] = defaultdict(float)
    for node in (descendant for root in roots for descendant in walk(root)):
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
