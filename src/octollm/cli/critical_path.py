"""The critical path of a trace: the chain of work and waiting that its end waited for, and what each part of it was.

From the end backwards, the predecessor is the child that ended last before the time that is reached. A child that ran
in parallel and ended earlier is not on the path: without it, the end would have come at the same time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from octollm.cli.span_tree import SpanNode, walk
from octollm.contracts.services import SERVICES

TOLERANCE_SECONDS = 0.001
"""How much later a predecessor may seem to end than its successor began: clocks differ, and times are rounded."""
UNKNOWN = "unknown"
"""What no span accounts for."""
TASK_SPAN = "task"
"""The span of one run of a task by a worker."""
WAITS_FOR = "octollm.waits_for"
"""The attribute of a run that ended because the task waits for something."""
_PLACES = {
    "reflex": "gateway",
    "orchestrator": "orchestration",
    "memory": "memory",
    "models": "model service",
    "planner": "planning",
    "judge": "judge",
}


class PathSegment(msgspec.Struct, frozen=True):
    """A part of the path: what the task waited for, in which span. ``start_ms`` counts from the start of the trace.

    ``span_id``, ``service`` and ``name`` are empty where no span accounts for the time.
    """

    waited_for: str
    start_ms: float
    duration_ms: float
    span_id: str = ""
    service: str = ""
    name: str = ""


class WaitShare(msgspec.Struct, frozen=True):
    """What the task waited for in all. The percentages of a path have one decimal and sum to 100."""

    waited_for: str
    percent: float
    duration_ms: float
    mostly_in: str = ""
    """The span that took the most of it."""


class CriticalPath(msgspec.Struct, frozen=True):
    """The path in order of time, without gaps, and the shares of what was waited for, the largest first."""

    duration_ms: float = 0.0
    waited_for: tuple[WaitShare, ...] = ()
    path: tuple[PathSegment, ...] = ()


def find_critical_path(roots: Sequence[SpanNode]) -> CriticalPath:
    """Return the critical path from the first start to the end of the task's last run, else of the last root."""
    if not roots:
        return CriticalPath()
    ends = _ends_with_task(roots)
    zero = min(node.span.start for root in roots for node in walk(root))
    segments = [
        PathSegment(
            waited_for=what,
            start_ms=round((start - zero) * 1000, 3),
            duration_ms=round((end - start) * 1000, 3),
            span_id=node.span.span_id if node is not None else "",
            service=node.span.service if node is not None else "",
            name=node.span.name if node is not None else "",
        )
        for what, start, end, node in _walk_back(roots, ends, zero)
    ]
    segments = [segment for segment in reversed(segments) if segment.duration_ms > 0]
    total = sum(segment.duration_ms for segment in segments)
    return CriticalPath(round(total, 3), _sum_shares(segments, total), tuple(_merge(segments)))


def _ends_with_task(roots: Sequence[SpanNode]) -> dict[int, float]:
    """Return the end of each node by its ``id``. The call that submitted a task ends with the task, which it started.

    Nothing waits for anything else that outlives its caller, such as bookkeeping in the background.
    """
    ends: dict[int, float] = {}
    of_task: dict[int, float] = {}
    # Children come after their parents: backwards, each is known before its parent needs it.
    for node in [node for root in roots for node in walk(root)][::-1]:
        below = [of_task[id(child)] for child in node.children if id(child) in of_task]
        if node.span.name == TASK_SPAN:
            below.append(node.end)
        if below:
            of_task[id(node)] = max(below)
        ends[id(node)] = max([node.end, *below])
    if of_task:
        # What came after the task is no part of it.
        last = max(of_task.values())
        ends = {key: min(end, last) if key in of_task else end for key, end in ends.items()}
    return ends


_Part = tuple[str, float, float, SpanNode | None]


def _walk_back(roots: Sequence[SpanNode], ends: dict[int, float], zero: float) -> Iterator[_Part]:
    """Yield the parts of the path, the last one first: what was waited for, from when until when, and in which span."""
    last = max(zero, *(ends[id(root)] for root in roots))
    # A loop with a stack: a trace may be deeper than Python's recursion limit.
    stack = [_Frame(None, roots, ends, zero, last)]
    while stack:
        frame = stack[-1]
        child = frame.next_predecessor(ends)
        until = frame.cursor
        if child is None:
            stack.pop()
            yield from _own_parts(frame, frame.start, until, None)
            continue
        end = min(ends[id(child)], until)
        yield from _own_parts(frame, end, until, child)
        start = min(max(child.span.start, frame.start), end)
        frame.cursor, frame.successor = start, child
        stack.append(_Frame(child, child.children, ends, start, end))


class _Frame:
    """A span whose part of the path, from ``start`` to ``cursor``, is not known yet."""

    def __init__(
        self, node: SpanNode | None, children: Sequence[SpanNode], ends: dict[int, float], start: float, end: float
    ) -> None:
        self.node = node
        self.start = start
        self.cursor = end
        self.successor: SpanNode | None = None
        """The child that follows in time."""
        self._candidates = sorted(children, key=lambda child: (ends[id(child)], child.span.start))

    def next_predecessor(self, ends: dict[int, float]) -> SpanNode | None:
        """Return the child that ended last before the cursor; ``None`` if there is none after the start."""
        while self._candidates and self.cursor > self.start:
            child = self._candidates.pop()
            end = ends[id(child)]
            if self.start < end <= self.cursor + TOLERANCE_SECONDS and child.span.start < self.cursor:
                return child
        return None


def _own_parts(frame: _Frame, start: float, end: float, before: SpanNode | None) -> Iterator[_Part]:
    """Yield the time of a span without its children, and after its own end the gap, the later part first."""
    node = frame.node
    own_end = start if node is None else min(max(node.end, start), end)
    if end > own_end:
        yield _name_gap(before, frame.successor), own_end, end, None
    if own_end > start:
        assert node is not None
        yield _name_own_time(node), start, own_end, node


def _name_gap(before: SpanNode | None, after: SpanNode | None) -> str:
    """Say what a gap was: only the time before a run of the task is known to be a wait."""
    if after is None or after.span.name != TASK_SPAN:
        return UNKNOWN
    if before is not None and before.span.name == TASK_SPAN:
        return str(before.span.attributes.get(WAITS_FOR, UNKNOWN))
    return "queue" if after.span.attributes.get("octollm.run") == 1 else UNKNOWN


def _name_own_time(node: SpanNode) -> str:
    span = node.span
    if "octollm.sandbox" in span.attributes:
        return "sandbox"
    if span.kind == "client":
        if "gen_ai.request.model" in span.attributes:
            return "model"
        # A call that was never served failed on the way. Of one that was, the callee's span may have been lost.
        return "transport" if node.children or span.code else UNKNOWN
    if span.name == "plan":
        return "planning"
    if span.name == "accept":
        return "judge"
    return _PLACES.get(span.service, f"arm {span.service}" if span.service not in SERVICES else span.service)


def _sum_shares(segments: Sequence[PathSegment], total: float) -> tuple[WaitShare, ...]:
    sums: dict[str, float] = {}
    spans: dict[str, dict[str, float]] = {}
    for segment in segments:
        sums[segment.waited_for] = sums.get(segment.waited_for, 0.0) + segment.duration_ms
        places = spans.setdefault(segment.waited_for, {})
        place = f"{segment.service} {segment.name}".strip()
        places[place] = places.get(place, 0.0) + segment.duration_ms
    if total <= 0:
        return ()
    names = sorted(sums, key=lambda name: -sums[name])
    return tuple(
        WaitShare(name, tenths / 10, round(sums[name], 3), max(spans[name], key=lambda place: spans[name][place]))
        for name, tenths in zip(names, _apportion([sums[name] / total * 1000 for name in names], 1000), strict=True)
    )


def _apportion(shares: Sequence[float], whole: int) -> list[int]:
    """Round ``shares`` so that they sum to ``whole``: those with the largest remainders are rounded up."""
    rounded = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda index: rounded[index] - shares[index])
    for index in by_remainder[: max(0, whole - sum(rounded))]:
        rounded[index] += 1
    return rounded


def _merge(segments: Sequence[PathSegment]) -> Iterator[PathSegment]:
    """Join neighbours that are parts of the same wait."""
    merged: list[PathSegment] = []
    for segment in segments:
        last = merged[-1] if merged else None
        if last is not None and (last.waited_for, last.span_id) == (segment.waited_for, segment.span_id):
            merged[-1] = msgspec.structs.replace(last, duration_ms=round(last.duration_ms + segment.duration_ms, 3))
        else:
            merged.append(segment)
    yield from merged
