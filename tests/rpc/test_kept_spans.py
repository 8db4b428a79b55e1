"""Which spans are kept: those of sampled traces, and of the others what failed or was slow."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from kit import CLOCK, served

from octollm.context import RequestContext, set_context, start_trace
from octollm.errors import OctoError, RemoteError
from octollm.rpc.call import IncomingCall, Operation
from octollm.telemetry import ExportBuffer, Span, Tracer
from octollm.telemetry import spans as spans_module


class NoContent(msgspec.Struct):
    pass


async def succeed(_call: IncomingCall, _body: NoContent) -> NoContent:
    return NoContent()


async def refused(_call: IncomingCall, _body: NoContent) -> NoContent:
    raise OctoError("No such file.", code="file_not_found")


async def unavailable(_call: IncomingCall, _body: NoContent) -> NoContent:
    raise OctoError("The database does not answer.", code="unavailable")


async def slow(_call: IncomingCall, _body: NoContent) -> NoContent:
    await asyncio.sleep(0.06)
    return NoContent()


def operation(handler: object, name: str = "work") -> Operation:
    return Operation(name, "POST", "/work", handler, auth="public", body=NoContent, response=NoContent)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("handler", "kept"), [(succeed, []), (refused, []), (unavailable, ["client", "server"]), (slow, ["server"])]
)
async def test_of_a_trace_that_is_not_sampled_failures_and_slow_calls_are_kept(monkeypatch, handler, kept):
    # A second would be a second of waiting.
    monkeypatch.setattr("octollm.rpc.server.SLOW_SECONDS", 0.05)
    async with served([operation(handler)]) as svc:
        buffer = svc.base.spans
        svc.caller._tracer = Tracer("tester", CLOCK, buffer)
        set_context(RequestContext("tester", trace=start_trace(sampled=False)))
        try:
            await svc.caller.call(svc.out(operation(handler)), NoContent)
        except RemoteError as error:
            assert error.code in ("file_not_found", "unavailable")
        found = sorted(buffer.take(9), key=lambda span: span.kind)
        assert [span.kind for span in found] == kept
        for span in found:
            assert not span.trace.sampled
            assert span.end_ns > span.start_ns
            assert span.attributes.get("http.route", "/work") == "/work"
        if kept == ["client", "server"]:
            client, server = found
            assert (client.code, server.code) == ("unavailable", "unavailable")
            assert (server.trace.trace_id, server.parent_id) == (client.trace.trace_id, client.trace.span_id)
            assert client.attributes["octollm.instance"] == svc.url


async def test_what_comes_every_few_seconds_is_never_kept():
    async with served([operation(unavailable, "traces.receive")]) as svc:
        svc.caller._tracer = Tracer("tester", CLOCK, svc.base.spans)
        set_context(RequestContext("tester", trace=start_trace(sampled=False)))
        with pytest.raises(RemoteError):
            await svc.caller.call(svc.out(operation(unavailable, "traces.receive")), NoContent)
        assert len(svc.base.spans) == 0


@pytest.mark.parametrize(
    ("share", "chance", "sampled"), [(0.01, 0.009, True), (0.01, 0.01, False), (0, 0, False), (1, 0.999, True)]
)
def test_a_share_of_the_calls_without_a_trace_begin_one(monkeypatch, share, chance, sampled):
    monkeypatch.setattr(spans_module.random, "random", lambda: chance)
    tracer = Tracer("svc", CLOCK, ExportBuffer[Span](), sample_ratio=share)
    assert tracer.receive("work", None, sampled=False).trace.sampled is sampled
    assert not tracer.receive("health", None, sampled=False).trace.sampled
    assert tracer.receive("work", None, sampled=True).trace.sampled
    caller = start_trace(sampled=False)
    assert not tracer.receive("work", caller, sampled=True).trace.sampled
