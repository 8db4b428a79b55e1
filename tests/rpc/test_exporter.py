from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
import pytest
from kit import CLOCK, served

from octollm.config import read_settings
from octollm.context import RequestContext, TraceContext, current_context, set_context
from octollm.errors import OctoError, SettingError
from octollm.rpc import exporter as exporting
from octollm.rpc.call import IncomingCall, Operation
from octollm.rpc.exporter import BatchExporter
from octollm.rpc.http1_client import Http1Client
from octollm.services.monitor.service import build_collector_sender, run_span_export
from octollm.telemetry import ExportBuffer, Metrics, Span, Tracer
from octollm.testing import wait_until
from octollm.testing.harness import start_harness


class BatchSink:
    """Takes batches, or refuses them with ``error``; ``lines`` is what the log says."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.tries = 0
        self.error: OctoError | None = None
        self.gate: asyncio.Event | None = None
        self.sampled: set[bool] = set()
        self.lines: list[str] = []
        self.metrics = Metrics("svc")

    async def send(self, batch: list[int]) -> None:
        self.tries += 1
        context = current_context()
        assert context.trace is not None
        self.sampled.add(context.trace.sampled)
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error
        self.batches += batch

    def exporter(self, buffer: ExportBuffer[int]) -> BatchExporter[int]:
        return BatchExporter(buffer, self.send, name="monitor", log=Recorder(self.lines), metrics=self.metrics)  # type: ignore[arg-type]

    def count(self, outcome: str) -> float:
        return self.metrics.registry.get_sample_value("octollm_spans_total", {"to": "monitor", "outcome": outcome}) or 0


@pytest.fixture
def sink(monkeypatch: pytest.MonkeyPatch) -> BatchSink:
    monkeypatch.setattr(exporting, "EXPORT_SECONDS", 0.01)
    monkeypatch.setattr(exporting, "LONGEST_PAUSE", 0.02)
    return BatchSink()


async def test_what_waits_is_sent_in_order_and_leaves_no_trace_of_its_own(sink: BatchSink) -> None:
    buffer: ExportBuffer[int] = ExportBuffer(2000)
    async with sink.exporter(buffer).run():
        for number in range(1200):
            buffer.put(number)
        await wait_until(lambda: len(sink.batches) == 1200, description="all were sent")
    assert sink.batches == list(range(1200))
    assert sink.tries == 3
    assert sink.sampled == {False}
    assert sink.count("exported") == 1200


async def test_while_nobody_takes_it_the_newest_are_kept_and_it_is_told_once(sink: BatchSink) -> None:
    buffer: ExportBuffer[int] = ExportBuffer(10)
    exporter = sink.exporter(buffer)
    sink.error = OctoError("monitor could not be reached.", code="connect_failed")
    async with exporter.run():
        for number in range(4):
            buffer.put(number)
        await wait_until(lambda: sink.tries > 3, description="it was tried again")
        state = await exporter.check_readiness()
        assert (state.ok, state.required, state.detail) == (
            False,
            False,
            "monitor does not accept spans: monitor could not be reached.",
        )
        for number in range(4, 25):
            buffer.put(number)
        sink.error = None
        await wait_until(lambda: len(buffer) == 0, description="it was taken")
        await wait_until(lambda: not exporter.failure, description="it is told that all is well")
    assert sink.batches == list(range(15, 25))
    assert sink.count("dropped") == 15
    assert sink.lines == ["loop.failing", "loop.recovered"]


async def test_a_batch_that_is_refused_for_good_does_not_stop_the_next(sink: BatchSink) -> None:
    buffer: ExportBuffer[int] = ExportBuffer(10)
    sink.error = OctoError("It does not fit.", code="invalid_body")
    async with sink.exporter(buffer).run():
        buffer.put(1)
        await wait_until(lambda: sink.tries == 1, description="it was tried")
        sink.error = None
        buffer.put(2)
        await wait_until(lambda: sink.batches == [2], description="the next was taken")
    assert sink.count("dropped") == 1


async def test_the_last_are_sent_when_the_service_ends(sink: BatchSink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "EXPORT_SECONDS", 60)
    buffer: ExportBuffer[int] = ExportBuffer(10)
    async with sink.exporter(buffer).run():
        buffer.put(1)
    assert sink.batches == [1]


async def test_ending_waits_for_nobody_for_long(sink: BatchSink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "FLUSH_SECONDS", 0.05)
    buffer: ExportBuffer[int] = ExportBuffer(10)
    sink.gate = asyncio.Event()
    async with asyncio.timeout(5), sink.exporter(buffer).run():
        buffer.put(1)
        await wait_until(lambda: sink.tries == 1, description="it is being sent")
    assert (sink.batches, len(buffer)) == ([], 1)
    assert sink.lines == ["spans.lost"]


async def test_an_error_of_our_own_ends_the_export_and_is_told(sink: BatchSink) -> None:
    buffer: ExportBuffer[int] = ExportBuffer(10)
    exporter = sink.exporter(buffer)

    async def broken(_batch: list[int]) -> None:
        raise ZeroDivisionError

    exporter._send = broken
    with contextlib.suppress(ZeroDivisionError):
        async with exporter.run():
            buffer.put(1)
            await wait_until(lambda: exporter.failure, description="it is told")
            buffer.take(1)
    assert "stopped: ZeroDivisionError" in exporter.failure
    assert sink.lines == ["loop.crashed"]


class Recorder:
    def __init__(self, lines: list[str]) -> None:
        self.lines = lines

    def error(self, event: str, **_members: object) -> None:
        self.lines.append(event)

    debug = info = warning = error


async def nothing(_call: IncomingCall, _body: object) -> dict[str, str]:
    return {}


async def test_a_call_and_its_serving_are_one_trace_and_the_flag_is_honoured() -> None:
    operation = Operation("op", "POST", "/op", nothing, auth="public", body=bytes)
    async with served([operation]) as svc:
        buffer: ExportBuffer[Span] = ExportBuffer()
        caller = svc.caller
        caller._tracer = Tracer("tester", CLOCK, buffer)
        await caller.send(svc.out(operation))
        assert (len(buffer), len(svc.base.spans)) == (0, 0)
        set_context(RequestContext("tester", trace=TraceContext("a" * 32, "b" * 16)))
        await caller.send(svc.out(operation))
        [client] = buffer.take(9)
        [server] = svc.base.spans.take(9)
    assert (client.kind, client.name, client.parent_id) == ("client", "svc.op", "b" * 16)
    assert (server.kind, server.name, server.parent_id) == ("server", "op", client.trace.span_id)
    assert client.trace.trace_id == server.trace.trace_id == "a" * 32
    assert client.attributes == {"octollm.attempts": 1, "octollm.instance": svc.url}
    assert server.attributes["http.response.status_code"] == 200
    assert client.start_ns <= server.start_ns


@contextlib.asynccontextmanager
async def collector(seen: list[Any], answers: list[int]) -> AsyncGenerator[str]:
    async def take(call: IncomingCall, body: bytes) -> dict[str, str]:
        seen.append((call.request.headers.get("x-scope"), msgspec.json.decode(body)))
        if answers and answers.pop(0) != 200:
            raise OctoError("Not now.", code="unavailable")
        return {}

    operation = Operation("take", "POST", "/v1/traces", take, auth="public", body=bytes)
    async with served([operation]) as svc:
        yield svc.url


async def test_a_collector_outside_gets_every_span_with_its_headers(sink: BatchSink) -> None:
    del sink
    seen: list[Any] = []
    span = Span("coder", "execute", "server", TraceContext("a" * 32, "b" * 16), "", 1, 2)
    async with collector(seen, [503, 200]) as url, start_harness() as harness:
        environment = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": url,
            "OTEL_EXPORTER_OTLP_HEADERS": "X-Scope=team-1, Authorization=Basic abc=",
        }
        async with run_span_export(harness.base("monitor"), read_settings(environment, ())) as outside:
            assert outside is not None
            outside.buffer.put(span)
            await wait_until(lambda: len(seen) == 2, description="the batch was sent again")

            async def is_accepted() -> bool:
                return (await outside.check()).ok

            # Only then: a batch whose response is still under way would be sent once more on leaving.
            await wait_until(is_accepted, description="the second response arrived")
    assert [scope for scope, _ in seen] == ["team-1", "team-1"]
    [resource] = seen[1][1]["resourceSpans"]
    assert resource["resource"]["attributes"] == [{"key": "service.name", "value": {"stringValue": "coder"}}]


async def test_a_collector_that_refuses_is_told_with_what_to_look_at() -> None:
    async with served([]) as svc, Http1Client() as http:
        with pytest.raises(OctoError, match="returns 404; see OTEL_EXPORTER_OTLP_ENDPOINT") as caught:
            await build_collector_sender(http, svc.url, ())([])
    assert caught.value.code == "peer_protocol"


@pytest.mark.parametrize("value", ["nothing", "=x", "a b=x", "a=", "a=x\ny"])
def test_wrong_headers_are_refused_without_showing_them(value: str) -> None:
    with pytest.raises(SettingError) as caught:
        read_settings({"OTEL_EXPORTER_OTLP_HEADERS": value}, ())
    assert "***" in caught.value.detail
    assert value not in caught.value.detail.replace("NAME=VALUE", "")
