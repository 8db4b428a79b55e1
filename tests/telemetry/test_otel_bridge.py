"""Spans of OpenTelemetry's own SDK in an arm: they are part of the call's trace, and reach the monitor with it."""

from __future__ import annotations

import asyncio
import sys

import pytest
from opentelemetry import propagate, trace
from opentelemetry.sdk.trace import TracerProvider

from octollm import Arm, Context
from octollm.clock import SystemClock
from octollm.context import RequestContext, current_context, set_context, start_trace
from octollm.telemetry import ExportBuffer, Span, Tracer
from octollm.telemetry.otel_bridge import OpenTelemetryBridge
from octollm.testing import ArmTestClient, wait_until

SERVICE = "translator"


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> TracerProvider:
    # The real one can be set once in a process.
    provider = TracerProvider()
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    return provider


def bridge_with_buffer() -> tuple[OpenTelemetryBridge, ExportBuffer[Span]]:
    buffer = ExportBuffer[Span]()
    return OpenTelemetryBridge(Tracer(SERVICE, SystemClock(), buffer), SERVICE), buffer


async def test_spans_of_a_library_are_below_the_call_and_are_exported(provider: TracerProvider) -> None:
    bridge, buffer = bridge_with_buffer()
    call = start_trace(sampled=True)
    set_context(RequestContext(SERVICE, trace=call))
    library = provider.get_tracer("library")

    def in_a_thread() -> None:
        with library.start_as_current_span("read", attributes={"authorization": "Bearer abcdef", "rows": [1, 2]}):
            pass

    with bridge.attached(call), library.start_as_current_span("GET", kind=trace.SpanKind.CLIENT) as outer:
        await asyncio.to_thread(in_a_thread)
        outer.set_status(trace.StatusCode.ERROR, "No route.")
    await wait_until(lambda: len(buffer) == 2, description="both spans are exported")
    inner, outer_span = buffer.take(2)
    assert {span.trace.trace_id for span in (inner, outer_span)} == {call.trace_id}
    assert (outer_span.parent_id, inner.parent_id) == (call.span_id, outer_span.trace.span_id)
    assert (outer_span.service, outer_span.name, outer_span.kind) == (SERVICE, "GET", "client")
    assert (outer_span.code, outer_span.message, inner.code) == ("error", "No route.", "")
    assert inner.attributes == {"authorization": "***", "rows": ("1", "2")}
    assert inner.start_ns <= inner.end_ns


async def test_other_work_of_the_process_and_unsampled_calls_are_not_exported(provider: TracerProvider) -> None:
    bridge, buffer = bridge_with_buffer()
    library = provider.get_tracer("library")
    for sampled in (True, False):
        call = start_trace(sampled=sampled)
        set_context(RequestContext(SERVICE, trace=call))
        with bridge.attached(call):
            assert library.start_span("in the call").is_recording() is sampled
        with library.start_as_current_span("after the call") as after:
            assert after.get_span_context().trace_id != int(call.trace_id, 16)
        set_context(RequestContext("another", trace=call))
        with bridge.attached(call), library.start_as_current_span("of another service"):
            pass
    await asyncio.sleep(0)
    assert len(buffer) == 0


async def test_an_arm_passes_its_trace_on_with_the_api_alone() -> None:
    arm = Arm(SERVICE, description="Translates")

    @arm.operation
    async def translate(_body: str, _ctx: Context) -> str:
        carrier: dict[str, str] = {}
        propagate.inject(carrier)
        own = current_context().trace
        assert own is not None
        return "joined" if carrier["traceparent"][:52] == own.traceparent[:52] else f"{carrier} {own}"

    async with ArmTestClient(arm) as client:
        assert await client.call("translate", "Hello") == "joined"


async def test_nothing_happens_where_nobody_has_imported_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "opentelemetry.trace")
    bridge, buffer = bridge_with_buffer()
    with bridge.attached(start_trace(sampled=True)):
        assert len(buffer) == 0
