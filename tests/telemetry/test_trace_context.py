"""W3C Trace Context, level 2, and Baggage: what is read, what is passed on, and what is discarded."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octollm.context import (
    MAX_BAGGAGE,
    MAX_TRACESTATE,
    parse_baggage,
    parse_traceparent,
    parse_tracestate,
    start_trace,
)

pytestmark = pytest.mark.unit
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.mark.parametrize(
    "text",
    [
        f"00-{TRACE}-{SPAN}-01",
        f"01-{TRACE}-{SPAN}-01",  # a version that is not known yet
        f"cc-{TRACE}-{SPAN}-01-what-the-future-will-be-like",
        f"cc-{TRACE}-{SPAN}-01-",
        f"00-{TRACE}-{SPAN}-ff",  # flags that are not known yet
    ],
)
def test_a_traceparent_is_joined(text: str) -> None:
    found = parse_traceparent(text)
    assert found is not None
    assert (found.trace_id, found.span_id, found.sampled) == (TRACE, SPAN, True)


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01-what-the-future-will-be-like",
        f"cc-{TRACE}-{SPAN}-01.what-the-future-will-be-like",
        f"0-{TRACE}-{SPAN}-01",
        f"000-{TRACE}-{SPAN}-01",
        f".0-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE[1:]}-{SPAN}-01",
        f"00-{TRACE}0-{SPAN}-01",
        f"00-{TRACE}-{SPAN[1:]}-01",
        f"00-{TRACE}-{SPAN}-.0",
        f"00-{TRACE}-{SPAN}-1",
        f"00-{TRACE}-{SPAN}-001",
        f"00{TRACE}{SPAN}01",
    ],
)
def test_a_malformed_traceparent_is_none(text: str | None) -> None:
    assert parse_traceparent(text) is None


def test_the_flags_and_the_state_go_on_to_each_call() -> None:
    found = parse_traceparent(f"00-{TRACE}-{SPAN}-02", "vendor=1")
    assert found is not None
    child = found.child()
    assert (child.trace_id, child.sampled, child.random, child.state) == (TRACE, False, True, "vendor=1")
    assert child.traceparent == f"00-{TRACE}-{child.span_id}-02"
    assert start_trace(sampled=True).traceparent.endswith("-03"), "our own ids are random"


@pytest.mark.parametrize(
    ("values", "state"),
    [
        (["foo=1"], "foo=1"),
        (["foo=1,bar=2"], "foo=1,bar=2"),
        (["foo=1", "bar=2"], "foo=1,bar=2"),
        (["foo=1 \t , \t bar=2"], "foo=1,bar=2"),
        (["foo=1,,bar=2", ""], "foo=1,bar=2"),
        (["foo=1,foo=1"], "foo=1,foo=1"),
        (["f-_*/1=1", "0a@b=2"], "f-_*/1=1,0a@b=2"),
        (["z" * 256 + "=1"], "z" * 256 + "=1"),
        (["t" * 241 + "@" + "v" * 14 + "=1"], "t" * 241 + "@" + "v" * 14 + "=1"),
        (["foo= " + "v" * 255], "foo= " + "v" * 255),
        ([",".join(f"m{n}=1" for n in range(32))], ",".join(f"m{n}=1" for n in range(32))),
        (["a=" + "x" * 250, "b=" + "y" * 255], "a=" + "x" * 250 + ",b=" + "y" * 255),
    ],
)
def test_a_tracestate_is_passed_on(values: list[str], state: str) -> None:
    assert parse_tracestate(values) == state


@pytest.mark.parametrize(
    "value",
    [
        "foo",
        "foo=",
        "=1",
        "foo=1=2",
        "foo =1",
        "FOO=1",
        "foo.bar=1",
        "foo@=1",
        "@foo=1",
        "foo@@bar=1",
        "foo@bar@baz=1",
        "foo=\x7f",
        "foo=é",
        "z" * 257 + "=1",
        "t" * 242 + "@v=1",
        "t@" + "v" * 15 + "=1",
        "foo=" + "v" * 257,
        ",".join(f"m{n}=1" for n in range(33)),
        "foo=1,bar",
    ],
)
def test_a_malformed_tracestate_is_discarded(value: str) -> None:
    assert parse_tracestate([value]) == ""


def test_what_is_too_large_is_discarded() -> None:
    assert parse_tracestate([",".join(f"m{n}=" + "x" * 250 for n in range(20))]) == ""
    assert parse_baggage(["a=" + "x" * MAX_BAGGAGE]) == ""
    assert parse_baggage(["a=" + "x" * (MAX_BAGGAGE - 2)]) != ""


@given(st.lists(st.text()))
def test_nothing_that_could_end_a_header_is_passed_on(values: list[str]) -> None:
    for found in (parse_tracestate(values), parse_baggage(values)):
        assert found.isprintable() or "\t" in found
        assert not set(found) & {"\r", "\n", "\0"}
        assert len(found) <= max(MAX_TRACESTATE, MAX_BAGGAGE)
