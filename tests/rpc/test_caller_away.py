"""A caller whose service is away: another instance is tried, patience waits, and text that is told twice is voided."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import msgspec
import pytest
from kit import CLOCK, IDS, base_for
from ports import free_port
from wires import CURRENT, DIRECT

from octollm.contracts.stream import StreamEvent
from octollm.errors import OctoError
from octollm.resilience import Deadline, OutageRetry, RetryPolicy
from octollm.rpc.call import IncomingCall, Operation
from octollm.rpc.client import CallTarget, OutgoingCall, ServiceClient
from octollm.rpc.http_client import HttpClient, TransportError
from octollm.rpc.service import build_service
from octollm.rpc.transport import listen

NONE = OutageRetry()
FAST = RetryPolicy(max_attempts=3, base_delay=0.001)


class Answer(msgspec.Struct):
    port: int


def url(port: int) -> str:
    return CURRENT.url(port)


@asynccontextmanager
async def calling(*ports: int, retry: RetryPolicy = FAST) -> AsyncGenerator[tuple[ServiceClient, HttpClient]]:
    async with CURRENT.client() as http:
        base = base_for(http, {"svc": tuple(url(port) for port in ports)})
        yield (
            ServiceClient("tester", http, base.discovery, clock=CLOCK, ids=IDS, metrics=base.metrics, retry=retry),
            http,
        )


@asynccontextmanager
async def instance(http: HttpClient, port: int, operation: Operation) -> AsyncGenerator[None]:
    service = build_service(base_for(http, {"svc": (url(port),)}), [operation])
    async with service.serve(listen("127.0.0.1", port, "svc"), shutdown_grace=0):
        yield


def outgoing(kind: str = "read_only", *, key: str | None = None, patience: OutageRetry = NONE) -> OutgoingCall:
    target = CallTarget("svc", "work", "POST", "/work", kind)  # type: ignore[arg-type]
    return OutgoingCall(target, "none", Deadline.after(CLOCK, 20), b"{}", key, outage_retry=patience)


def work(handler) -> Operation:
    return Operation("work", "POST", "/work", handler, auth="public", response=Answer)


@pytest.mark.parametrize("every_wire", DIRECT, indirect=True)
@pytest.mark.usefixtures("every_wire")
async def test_a_dead_instance_costs_nothing_but_a_try():
    dead, alive = free_port(), free_port()

    async def answer(_call: IncomingCall, _body: object) -> Answer:
        return Answer(alive)

    async with calling(dead, alive) as (caller, http), instance(http, alive, work(answer)):
        for _ in range(20):
            assert (await caller.call(outgoing("at_most_once"), Answer)).port == alive


async def test_patience_outlasts_a_restart():
    port = free_port()

    async def answer(_call: IncomingCall, _body: object) -> Answer:
        return Answer(port)

    async with calling(port) as (caller, http):
        impatient = asyncio.create_task(caller.call(outgoing(), Answer))
        patient = asyncio.create_task(caller.call(outgoing(patience=OutageRetry(20, interval=0.05)), Answer))
        with pytest.raises(OctoError) as caught:
            await impatient
        assert caught.value.code in ("connect_failed", "unavailable")
        assert not patient.done()
        async with instance(http, port, work(answer)):
            assert (await patient).port == port


@pytest.mark.usefixtures("every_wire")
async def test_patience_ends():
    async with calling(free_port()) as (caller, _http):
        began = CLOCK.monotonic()
        with pytest.raises(OctoError):
            await caller.call(outgoing(patience=OutageRetry(0.3, interval=0.05)), Answer)
        assert CLOCK.monotonic() - began >= 0.2


@pytest.mark.usefixtures("every_wire")
async def test_a_call_that_may_not_be_repeated_is_not_once_it_began():
    port = free_port()
    calls = 0

    async def cut(call: IncomingCall, _body: object) -> Answer:
        nonlocal calls
        calls += 1
        raise OctoError("What it needs is away.", code="unavailable")

    async with calling(port) as (caller, http), instance(http, port, work(cut)):
        with pytest.raises(OctoError):
            await caller.call(outgoing("at_most_once", patience=OutageRetry(5, interval=0.01)), Answer)
        assert calls == 1
        with pytest.raises(OctoError):
            await caller.call(outgoing("idempotent", key="k", patience=OutageRetry(0.2, interval=0.01)), Answer)
        assert calls > 3


@pytest.mark.usefixtures("every_wire")
async def test_text_that_comes_again_voids_what_was_told():
    port = free_port()
    calls = 0

    async def writes(call: IncomingCall, _body: object) -> Answer:
        nonlocal calls
        calls += 1
        await call.emit.token("one ")
        await call.emit.token("two")
        if calls == 1:
            raise OctoError("What it needs is away.", code="unavailable")
        return Answer(port)

    lines: list[StreamEvent] = []

    async def on_line(line: StreamEvent) -> None:
        lines.append(line)

    async with calling(port) as (caller, http), instance(http, port, work(writes)):
        await caller.call(outgoing(), Answer, on_event=on_line)
    assert calls == 2
    text = ""
    for line in lines:
        text = line.text if line.reset else text + line.text
    assert text == "one two"
    assert [line.reset for line in lines if line.type == "token"].count(True) == 1


@pytest.mark.parametrize("every_wire", DIRECT, indirect=True)
@pytest.mark.usefixtures("every_wire")
async def test_a_failure_tells_what_was_tried():
    port = free_port()
    async with calling(port) as (caller, _http):
        with pytest.raises(TransportError) as caught:
            await caller.call(outgoing(), Answer)
    tried = caught.value.call_attempts
    assert tried is not None
    assert (tried.service, tried.operation, tried.instance, tried.attempts) == ("svc", "work", url(port), 3)
    assert 0 <= tried.seconds < 10
