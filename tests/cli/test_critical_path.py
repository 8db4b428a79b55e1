"""The critical path of a trace: what a task waited for."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octollm.cli.critical_path import TOLERANCE_SECONDS, CriticalPath, find_critical_path
from octollm.cli.span_tree import build_tree
from octollm.contracts.observability import SpanView


def span(name: str, parent: str, start: float, seconds: float, kind: str = "internal", **more: Any) -> SpanView:
    span_id = more.pop("span_id", name)
    service = more.pop("service", "orchestrator")
    return SpanView("t", span_id, parent, service, name, kind, 1000 + start, seconds * 1000, **more)


def path_of(*spans: SpanView) -> CriticalPath:
    return find_critical_path(build_tree(spans))


def parts(path: CriticalPath) -> list[tuple[str, str, float, float]]:
    return [(part.waited_for, part.name, part.start_ms / 1000, part.duration_ms / 1000) for part in path.path]


def run(start: float, seconds: float, number: int = 1, **attributes: Any) -> SpanView:
    return span(
        "task", "submit", start, seconds, span_id=f"r{number}", attributes={"octollm.run": number, **attributes}
    )


SUBMIT = span("submit", "", 0, 0.5, "server", service="reflex")
MODEL = {"gen_ai.request.model": "small"}


def test_each_part_of_a_task_is_named() -> None:
    path = path_of(
        SUBMIT,
        run(1, 9),
        span("plan", "r1", 1.5, 1),
        span("coder.execute", "r1", 3, 3, "client"),
        span("execute", "coder.execute", 3.5, 2, "server", service="coder"),
        span("model small", "execute", 4, 1, "client", service="models", attributes=MODEL),
        span("accept", "r1", 6, 1),
        span("sandbox python", "r1", 7, 2, service="executor", attributes={"octollm.sandbox": "bubblewrap"}),
        span("search", "r1", 9, 0.5, service="translator"),
    )
    assert parts(path) == [
        ("gateway", "submit", 0, 0.5),
        ("queue", "", 0.5, 0.5),
        ("orchestration", "task", 1, 0.5),
        ("planning", "plan", 1.5, 1),
        ("orchestration", "task", 2.5, 0.5),
        ("transport", "coder.execute", 3, 0.5),
        ("coder", "execute", 3.5, 0.5),
        ("model", "model small", 4, 1),
        ("coder", "execute", 5, 0.5),
        ("transport", "coder.execute", 5.5, 0.5),
        ("judge", "accept", 6, 1),
        ("sandbox", "sandbox python", 7, 2),
        ("arm translator", "search", 9, 0.5),
        ("orchestration", "task", 9.5, 0.5),
    ]
    first = path.waited_for[0]
    assert (first.waited_for, first.percent, first.mostly_in) == ("sandbox", 20.0, "executor sandbox python")
    assert path.duration_ms == 10_000


def test_of_parallel_steps_the_path_has_the_one_that_ended_last() -> None:
    path = path_of(
        run(0, 10),
        span("a", "r1", 1, 5),
        span("b", "r1", 1, 8),
        span("c", "r1", 2, 6.5),
        # After b, and so on the path although it is short.
        span("d", "r1", 9.2, 0.3),
    )
    assert [name for _, name, _, _ in parts(path)] == ["task", "b", "task", "d", "task"]


def test_a_diamond_goes_through_the_branch_that_was_waited_for() -> None:
    path = path_of(
        run(0, 10), span("s1", "r1", 0, 2), span("s2", "r1", 2, 3), span("s3", "r1", 2, 5), span("s4", "r1", 7, 3)
    )
    assert [name for _, name, _, _ in parts(path)] == ["s1", "s3", "s4"]


def test_the_wait_for_a_person_is_an_approval_and_a_lost_worker_is_unknown() -> None:
    waited = path_of(SUBMIT, run(0.5, 1, **{"octollm.waits_for": "approval"}), run(60, 1, 2))
    assert ("approval", "", 1.5, 58.5) in parts(waited)
    assert waited.waited_for[0].percent == pytest.approx(95.9)
    crashed = path_of(SUBMIT, run(60, 1, 2))
    assert parts(crashed)[1] == ("unknown", "", 0.5, 59.5)
    interrupted = path_of(SUBMIT, run(0.5, 1), run(60, 1, 2))
    assert ("unknown", "", 1.5, 58.5) in parts(interrupted)


def test_nothing_waits_for_what_outlives_its_caller() -> None:
    path = path_of(SUBMIT, run(0.5, 2), span("settle", "r1", 2, 9, "client"), span("webhook", "submit", 9, 9))
    assert path.duration_ms == 2500
    assert [name for _, name, _, _ in parts(path)] == ["submit", "task"]


def test_a_call_whose_callee_left_no_span_is_unknown_and_one_that_failed_is_transport() -> None:
    assert parts(path_of(span("call", "", 0, 1, "client")))[0][0] == "unknown"
    assert parts(path_of(span("call", "", 0, 1, "client", code="connect_failed")))[0][0] == "transport"


def test_no_spans_have_no_path() -> None:
    assert path_of() == CriticalPath()


IDS = st.sampled_from([f"s{number}" for number in range(8)])
SPANS = st.lists(
    st.builds(
        lambda span_id, parent, name, start, seconds, kind, number: span(
            name, parent, start, seconds, kind, span_id=span_id, attributes={"octollm.run": number}
        ),
        IDS,
        st.just("") | IDS,
        st.sampled_from(["task", "plan", "accept", "step s1", "execute"]),
        st.integers(0, 20).map(lambda tenths: tenths / 10),
        st.integers(0, 20).map(lambda tenths: tenths / 10),
        st.sampled_from(["client", "server", "internal"]),
        st.integers(1, 3),
    ),
    min_size=1,
    max_size=10,
)


@given(SPANS)
def test_a_path_is_whole_within_the_trace_and_sums_to_100(spans: list[SpanView]) -> None:
    path = path_of(*spans)
    first = min(each.start for each in spans)
    last = max(each.start + each.duration_ms / 1000 for each in spans)
    known = {each.span_id for each in spans}
    reached = 0.0
    for part in path.path:
        assert part.duration_ms > 0
        assert part.start_ms == pytest.approx(reached, abs=0.1), "there is no gap, and nothing is counted twice"
        assert part.span_id in known | {""}
        reached = part.start_ms + part.duration_ms
    assert reached <= (last - first) * 1000 + 0.1
    assert reached == pytest.approx(path.duration_ms, abs=0.1)
    assert all((one.waited_for, one.span_id) != (two.waited_for, two.span_id) for one, two in pairwise(path.path))
    if path.waited_for:
        assert round(sum(share.percent for share in path.waited_for), 1) == 100.0
        assert sum(share.duration_ms for share in path.waited_for) == pytest.approx(path.duration_ms, abs=0.1)


INTERVALS = st.lists(st.tuples(st.integers(0, 50), st.integers(1, 50)), min_size=1, max_size=8)


@given(INTERVALS)
def test_a_shorter_parallel_branch_is_never_on_the_path(intervals: list[tuple[int, int]]) -> None:
    steps = [span(f"b{n}", "r1", start, seconds) for n, (start, seconds) in enumerate(intervals)]
    path = path_of(run(0, 200), *steps)
    on_path = {part.name for part in path.path} - {"task"}
    by_name = {step.name: step for step in steps}
    ends = {step.name: step.start + step.duration_ms / 1000 for step in steps}
    assert max(ends.values()) in [ends[name] for name in on_path]
    for one in on_path:
        for other in on_path - {one}:
            apart = ends[one] <= by_name[other].start + TOLERANCE_SECONDS
            assert apart or ends[other] <= by_name[one].start + TOLERANCE_SECONDS, "no two of the path ran in parallel"


def test_a_deep_trace_is_no_recursion() -> None:
    spans = [span(f"s{depth}", f"s{depth - 1}" if depth else "", 0, 3) for depth in range(3000)]
    assert path_of(*spans).path[0].name == "s2999"
