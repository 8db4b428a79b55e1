from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from octollm.cli.output import THEME
from octollm.cli.span_tree import build_tree, self_time_by_place, sum_usage
from octollm.cli.traces import (
    BAR_WIDTH,
    ORPHAN_NOTE,
    build_rows,
    print_trace,
    render_bar,
)
from octollm.contracts.observability import SpanView, TraceView


def span(name: str, parent: str, start: float, seconds: float, kind: str = "internal", **more: Any) -> SpanView:
    service = more.pop("service", "orchestrator")
    return SpanView("t", name, parent, service, name, kind, 100 + start, seconds * 1000, **more)


SPANS = (
    span("submit", "", 0, 0.1, "server"),
    span("task", "submit", 0.1, 4),
    span("coder.execute", "task", 0.2, 3, "client"),
    span("execute", "coder.execute", 0.3, 2.8, "server", service="coder"),
    span("reserve", "execute", 0.4, 0.2, "client", service="coder"),
    span("budget.reserve", "reserve", 0.4, 0.2, "server", attributes={"octollm.peer": "coder"}),
    span(
        "model small",
        "execute",
        1,
        2,
        "client",
        service="models",
        attributes={
            "gen_ai.request.model": "small",
            "gen_ai.usage.input_tokens": 20,
            "gen_ai.usage.output_tokens": 5,
            "octollm.cost_usd": 0.25,
            "octollm.first_token_ms": 40.5,
        },
    ),
    span("accept", "task", 3.3, 0.5, code="not_accepted", message="It does not run."),
)


def test_a_call_and_its_serving_are_one_line_and_bookkeeping_is_left_out() -> None:
    rows, hidden = build_rows(build_tree(SPANS), show_internal=False)
    assert [(row.depth, row.service, row.name) for row in rows] == [
        (0, "orchestrator", "submit"),
        (1, "orchestrator", "task"),
        (2, "coder", "execute"),
        (3, "models", "model small"),
        (2, "orchestrator", "accept"),
    ]
    assert hidden == 1
    assert rows[2].seconds == pytest.approx(3)
    assert rows[3].notes == ("20 + 5 tokens", "0.2500 USD", "first token after 40.5 ms")
    assert rows[4].failure == "not_accepted: It does not run."
    rows, hidden = build_rows(build_tree(SPANS), show_internal=True)
    assert (len(rows), hidden) == (6, 0)


def test_the_time_is_where_it_was_spent_and_not_where_it_was_waited_for() -> None:
    places = self_time_by_place(build_tree(SPANS))
    assert {command_line: round(seconds, 6) for command_line, seconds in places.items()} == {
        "model small": 2.0,
        "orchestrator": 0.1 + 0.5 + 0.5 + 0.2,
        "coder": 0.6,
        "on the way": 0.2,
    }
    assert sum_usage(SPANS) == (25, 0.25)


def test_what_lost_its_caller_is_shown_below_the_first() -> None:
    rows, _ = build_rows(build_tree([*SPANS, span("orphan", "gone", 1, 1)]), show_internal=False)
    [orphan] = [row for row in rows if row.name == "orphan"]
    assert (orphan.depth, orphan.notes) == (1, (ORPHAN_NOTE,))


ids = st.sampled_from(["a", "b", "c", "d"])


@given(st.lists(st.builds(span, ids, st.just("") | ids, st.floats(0, 9), st.floats(0, 9)), min_size=1, max_size=9))
def test_whatever_was_sent_every_span_is_shown_once(spans: list[SpanView]) -> None:
    roots = build_tree(spans)
    rows, hidden = build_rows(roots, show_internal=True)
    assert (len(rows), hidden) == (len(spans), 0)
    assert all(seconds >= 0 for seconds in self_time_by_place(roots).values())


@given(st.floats(0, 1), st.floats(0, 1))
def test_a_bar_always_shows_and_fits(start: float, share: float) -> None:
    bar = render_bar(start, share)
    assert len(bar) == BAR_WIDTH
    assert "█" in bar


def printed(trace: TraceView) -> str:
    console = Console(file=io.StringIO(), theme=THEME, width=200)
    print_trace(trace, console, show_internal=False)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_trace_is_printed() -> None:
    text = printed(TraceView("task-1", SPANS, complete=False))
    assert "Total    4.10 s, 25 tokens, 0.2500 USD" in text
    assert "not_accepted: It does not run." in text
    assert "Left out: 1 calls" in text
    assert "only the first" in text


def test_an_empty_trace_says_why_that_may_be() -> None:
    assert "not sampled" in printed(TraceView("task-1", ()))
