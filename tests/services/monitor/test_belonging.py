from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from octollm.services.monitor.span_store import SpanOwnership, select_task_spans

ids = st.sampled_from(["a", "b", "c", "d", "e", "f"])
placed = st.builds(
    SpanOwnership, ids, st.just("") | ids, st.sampled_from(["", "t", "other"]), st.sampled_from(["", "k", "l"])
)


@given(st.lists(placed, max_size=12))
def test_nobody_elses_span_is_ever_shown(spans: list[SpanOwnership]) -> None:
    found = [spans[index] for index in select_task_spans(spans, "t", "k")]
    assert all(span.tenant in ("", "t") and span.task in ("", "k") for span in found)
    assert all(span in found for span in spans if (span.tenant, span.task) == ("t", "k"))
    if not any((span.tenant, span.task) == ("t", "k") for span in spans):
        assert found == []


def visible_ids(spans: list[SpanOwnership]) -> list[str]:
    return [spans[index].span_id for index in select_task_spans(spans, "t", "k")]


def test_what_is_above_is_shown_when_it_is_the_tenants_and_what_is_below_when_it_is_nobodys() -> None:
    spans = [
        SpanOwnership("gateway", "", "t"),
        SpanOwnership("submit", "gateway", "t", "k"),
        SpanOwnership("task", "submit", "t", "k"),
        SpanOwnership("reserve", "task", "", ""),
        SpanOwnership("deeper", "reserve", "t", "k"),
    ]
    assert visible_ids(spans) == ["gateway", "submit", "task", "reserve", "deeper"]


def test_a_shared_trace_shows_each_task_its_own() -> None:
    spans = [
        SpanOwnership("gateway", "", "t"),
        SpanOwnership("one", "gateway", "t", "k"),
        SpanOwnership("two", "gateway", "t", "l"),
        SpanOwnership("below two", "two", "", ""),
        SpanOwnership("beside", "gateway", "t", ""),
    ]
    assert visible_ids(spans) == ["gateway", "one"]


def test_naming_a_strangers_span_as_the_parent_shows_nothing_of_it() -> None:
    spans = [
        SpanOwnership("victim", "", "other", "l"),
        SpanOwnership("in its own name", "victim", "", ""),
        SpanOwnership("unnamed", "", "", ""),
        SpanOwnership("mine", "victim", "t", "k"),
        SpanOwnership("mine too", "unnamed", "t", "k"),
    ]
    assert visible_ids(spans) == ["mine", "mine too"]
