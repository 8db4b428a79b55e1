from __future__ import annotations

import asyncio
import json
import re

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octollm.clock import SystemClock
from octollm.context import RequestContext, TraceContext, current_context, set_context, start_trace
from octollm.errors import OctoError
from octollm.rpc.codec import decode
from octollm.telemetry.otlp import ExportRequest, decode_spans, encode_spans
from octollm.telemetry.spans import TASK_ATTRIBUTE, TENANT_ATTRIBUTE, ExportBuffer, Span, Tracer

hexes = st.text("0123456789abcdef", min_size=16, max_size=16).filter(lambda text: set(text) != {"0"})
traces = st.builds(lambda one, two, span: TraceContext(one + two, span), hexes, hexes, hexes)
words = st.text(st.characters(codec="utf-8"), max_size=40)
values = st.one_of(
    words,
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.lists(words, max_size=5).map(tuple),
)
names = words.filter(lambda name: name != "error.type")
codes = st.sampled_from(["", "internal", "budget_exhausted", "cancelled"])


@st.composite
def spans(draw: st.DrawFn) -> Span:
    start = draw(st.integers(0, 10**18))
    code = draw(codes)
    return Span(
        draw(st.sampled_from(["coder", "judge"])),
        draw(words),
        draw(st.sampled_from(["internal", "server", "client", "producer", "consumer"])),
        draw(traces),
        draw(st.just("") | hexes),
        start,
        start + draw(st.integers(0, 10**12)),
        draw(st.dictionaries(names, values, max_size=6)),
        code,
        draw(st.sampled_from(["", "It failed."])) if code else "",
    )


@given(st.lists(spans(), max_size=5))
def test_what_is_encoded_is_read_again(sent: list[Span]) -> None:
    for service in ("coder", "judge"):
        own = [span for span in sent if span.service == service]
        request = decode(encode_spans(own, "1.0"), ExportRequest)
        assert decode_spans(request, service) == own


def test_the_members_are_those_of_the_protocol() -> None:
    span = Span(
        "coder", "execute", "server", TraceContext("a" * 32, "b" * 16), "c" * 16, 1_700_000_000_000_000_001, 2 * 10**18
    )
    span.attributes |= {"text": "x", "flag": True, "count": 3, "share": 0.5, "several": ("y",)}
    span.code, span.message = "not_accepted", "The result was refused."
    assert json.loads(encode_spans([span], "1.0")) == {
        "resourceSpans": [
            {
                "resource": {"attributes": [{"key": "service.name", "value": {"stringValue": "coder"}}]},
                "scopeSpans": [
                    {
                        "scope": {"name": "octollm", "version": "1.0"},
                        "spans": [
                            {
                                "traceId": "a" * 32,
                                "spanId": "b" * 16,
                                "parentSpanId": "c" * 16,
                                "flags": 1,
                                "name": "execute",
                                "kind": 2,
                                "startTimeUnixNano": "1700000000000000001",
                                "endTimeUnixNano": "2000000000000000000",
                                "attributes": [
                                    {"key": "text", "value": {"stringValue": "x"}},
                                    {"key": "flag", "value": {"boolValue": True}},
                                    {"key": "count", "value": {"intValue": "3"}},
                                    {"key": "share", "value": {"doubleValue": 0.5}},
                                    {"key": "several", "value": {"arrayValue": {"values": [{"stringValue": "y"}]}}},
                                    {"key": "error.type", "value": {"stringValue": "not_accepted"}},
                                ],
                                "status": {"code": 2, "message": "The result was refused."},
                            }
                        ],
                    }
                ],
            }
        ]
    }


def test_another_sdks_request_is_read() -> None:
    """As the specification's own example: numbers for text, upper-case ids, members that we do not know."""
    body = {
        "resourceSpans": [
            {
                "resource": {"attributes": [], "droppedAttributesCount": 0},
                "scopeSpans": [
                    {
                        "scope": {"name": "my.library", "version": "1.0.0", "attributes": []},
                        "spans": [
                            {
                                "traceId": "5B8EFFF798038103D269B633813FC60C",
                                "spanId": "EEE19B7EC3C1B174",
                                "parentSpanId": "EEE19B7EC3C1B173",
                                "name": "I'm a server span",
                                "startTimeUnixNano": 1544712660000000000,
                                "endTimeUnixNano": "1544712661000000000",
                                "kind": 2,
                                "attributes": [
                                    {"key": "my.int", "value": {"intValue": 7}},
                                    {"key": "my.map", "value": {"kvlistValue": {"values": []}}},
                                    {"key": "my.bytes", "value": {"bytesValue": "AAA="}},
                                ],
                                "events": [{"name": "passed over"}],
                                "links": [],
                            }
                        ],
                    }
                ],
                "schemaUrl": "https://opentelemetry.io/schemas/1.24.0",
            }
        ]
    }
    [span] = decode_spans(decode(msgspec.json.encode(body), ExportRequest), "translator")
    assert (span.service, span.kind, span.name) == ("translator", "server", "I'm a server span")
    assert span.trace == TraceContext("5b8efff798038103d269b633813fc60c", "eee19b7ec3c1b174")
    assert (span.parent_id, span.end_ns - span.start_ns) == ("eee19b7ec3c1b173", 10**9)
    assert span.attributes == {"my.int": 7}


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("traceId", "0" * 32),
        ("traceId", "a" * 31),
        ("spanId", "g" * 16),
        ("parentSpanId", "a"),
        ("startTimeUnixNano", "-1"),
        ("endTimeUnixNano", "9" * 20),
        ("kind", 6),
        ("name", "x" * 256),
        ("attributes", [{"key": "k", "value": {"intValue": "1e3"}}]),
        ("attributes", [{"key": "k"}] * 129),
    ],
)
def test_a_malformed_span_is_refused_with_its_place(member: str, value: object) -> None:
    span = {"traceId": "a" * 32, "spanId": "b" * 16, "name": "x", "startTimeUnixNano": "1", "endTimeUnixNano": "2"}
    body = {"resourceSpans": [{"scopeSpans": [{"spans": [{**span, member: value}]}]}]}
    with pytest.raises(OctoError) as caught:
        decode(msgspec.json.encode(body), ExportRequest)
    assert caught.value.code == "invalid_body"
    assert re.match(rf"/resourceSpans/.+/scopeSpans/.+/spans/.+/{member}", caught.value.field_errors[0].pointer)


@given(st.lists(st.integers(0, 3)), st.integers(1, 5))
def test_a_buffer_is_bounded_keeps_the_newest_in_order_and_counts_the_rest(actions: list[int], limit: int) -> None:
    buffer: ExportBuffer[int] = ExportBuffer(limit)
    expected: list[int] = []
    taken: list[int] = []
    number = dropped = 0
    for action in actions:
        if action < 2:
            buffer.put(number)
            expected.append(number)
            number += 1
        elif action == 2 and not taken:
            taken = buffer.take(2)
            assert taken == expected[:2]
            expected = expected[2:]
        else:
            buffer.requeue(taken)
            expected, taken = taken + expected, []
        if len(expected) > limit:
            dropped += len(expected) - limit
            expected = expected[len(expected) - limit :]
        assert (len(buffer), buffer.dropped, buffer.has_items.is_set()) == (len(expected), dropped, bool(expected))
    assert buffer.take(100) == expected


@pytest.fixture
def buffer() -> ExportBuffer[Span]:
    return ExportBuffer()


@pytest.fixture
def tracer(buffer: ExportBuffer[Span]) -> Tracer:
    return Tracer("coder", SystemClock(), buffer)


async def test_spans_nest_and_know_whose_work_they_are(buffer: ExportBuffer[Span], tracer: Tracer) -> None:
    root = start_trace(sampled=True)
    context = RequestContext("coder", trace=root, task_id="task-1", tenant="t1")
    set_context(context)
    with tracer.span("outer") as outer, tracer.span("inner", "client"):
        pass
    assert current_context() is context
    ended_inner, ended_outer = buffer.take(9)
    assert ended_outer is outer
    assert (outer.parent_id, ended_inner.parent_id) == (root.span_id, outer.trace.span_id)
    assert {outer.trace.trace_id, ended_inner.trace.trace_id} == {root.trace_id}
    assert outer.attributes == ended_inner.attributes == {TENANT_ATTRIBUTE: "t1", TASK_ATTRIBUTE: "task-1"}
    assert outer.start_ns <= ended_inner.start_ns
    assert ended_inner.end_ns - ended_inner.start_ns <= outer.end_ns - outer.start_ns


async def test_what_is_not_sampled_leaves_nothing_but_has_its_place(buffer: ExportBuffer[Span], tracer: Tracer) -> None:
    set_context(RequestContext("coder", trace=start_trace()))
    with tracer.span("outer") as outer:
        assert not outer.trace.sampled
    caller = TraceContext("a" * 32, "b" * 16, sampled=False)
    served = tracer.receive("op", caller, sampled=True)
    tracer.end(served)
    assert (served.trace.trace_id, served.parent_id, served.trace.sampled) == ("a" * 32, "b" * 16, False)
    assert len(buffer) == 0
    begun = tracer.receive("op", None, sampled=True)
    assert (begun.parent_id, begun.trace.sampled) == ("", True)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OctoError("No tokens left.", code="budget_exhausted"), "budget_exhausted", "No tokens left."),
        (asyncio.CancelledError(), "cancelled", ""),
        (ValueError("secret"), "internal", "ValueError"),
    ],
)
async def test_a_span_says_why_it_failed_and_no_more(
    buffer: ExportBuffer[Span], tracer: Tracer, error: BaseException, code: str, message: str
) -> None:
    set_context(RequestContext("coder", trace=start_trace(sampled=True)))
    with pytest.raises(type(error)), tracer.span("work"):
        raise error
    [span] = buffer.take(1)
    assert (span.code, span.message) == (code, message)


def test_a_secret_in_a_message_is_masked_on_its_way_out() -> None:
    span = Span(
        "coder", "x", "internal", TraceContext("a" * 32, "b" * 16), code="internal", message="Bearer eyJabcdef.eyJx.y"
    )
    assert b"eyJ" not in encode_spans([span], "1")
