from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any

import msgspec
import pytest
from kit import CLOCK, served
from wires import CURRENT, DIRECT

from octollm.contracts.stream import StreamEvent
from octollm.errors import OctoError, RemoteError
from octollm.resilience import RetryPolicy
from octollm.rpc import ndjson as stream_module
from octollm.rpc.call import IncomingCall, Operation, OperationResponse
from octollm.rpc.http_client import TransportError
from octollm.rpc.transport import listen
from octollm.testing import wait_until

pytestmark = pytest.mark.usefixtures("every_wire")


class Body(msgspec.Struct):
    number: int = 0


class Answer(msgspec.Struct):
    text: str


def post(handler: Any, **options: Any) -> Operation:
    return Operation("op", "POST", "/op", handler, auth="public", body=Body, response=Answer, **options)


async def echo(_call: IncomingCall, body: Body) -> Answer:
    return Answer(str(body.number))


async def test_one_answer_with_correlation_ids_echoed() -> None:
    async with served([post(echo)]) as svc, CURRENT.stock() as client:
        headers = {"X-Request-ID": "req-1", "X-Correlation-ID": "corr-1"}
        found = await client.post(svc.url + "/op", json={"number": 3, "later": True}, headers=headers)
        assert (found.status_code, found.json()) == (200, {"text": "3"})
        assert (found.headers["x-request-id"], found.headers["x-correlation-id"]) == ("req-1", "corr-1")
        bad = await client.post(svc.url + "/op", json={}, headers={"X-Request-ID": "no spaces please"})
        assert bad.headers["x-request-id"].startswith("req-")


async def test_what_every_service_answers() -> None:
    async with served([post(echo)]) as svc, CURRENT.stock() as client:
        assert (await client.get(svc.url + "/health")).json()["status"] == "ok"
        assert (await client.get(svc.url + "/ready")).json()["status"] == "ready"
        assert "octollm_requests_total" in (await client.get(svc.url + "/metrics")).text
        assert (await client.get(svc.url + "/.well-known/jwks.json")).json()["keys"][0]["kty"] == "OKP"
        api = (await client.get(svc.url + "/openapi.json")).json()
        assert api["openapi"] == "3.1.0"
        assert api["paths"]["/op"]["post"]["requestBody"]["content"]["application/json"]
        assert (await client.head(svc.url + "/health")).status_code == 200


async def test_a_stream_has_lines_then_one_result() -> None:
    async def work(call: IncomingCall, body: Body) -> Answer:
        await call.emit.progress(50, "half")
        await call.emit.token("ab")
        await call.emit.token("cd", reset=True)
        return Answer("end")

    seen: list[StreamEvent] = []

    async def on_line(line: StreamEvent) -> None:
        seen.append(line)

    operation = post(work)
    async with served([operation]) as svc:
        found = await svc.caller.call(svc.out(operation), Answer, on_event=on_line)
    assert found == Answer("end")
    assert [(line.type, line.text or line.progress, line.reset) for line in seen] == [
        ("progress", 50, False),
        ("token", "ab", False),
        ("token", "cd", True),
    ]


async def test_a_stream_that_fails_ends_with_the_problem() -> None:
    async def work(call: IncomingCall, body: Body) -> Answer:
        await call.emit.token("so far")
        raise OctoError("The budget is gone.", code="budget_exhausted")

    async def on_line(line: StreamEvent) -> None:
        del line

    operation = post(work)
    async with served([operation]) as svc:
        with pytest.raises(RemoteError) as caught:
            await svc.caller.call(svc.out(operation), Answer, on_event=on_line)
    assert (caught.value.code, caught.value.status) == ("budget_exhausted", 403)


async def test_a_silent_stream_has_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "HEARTBEAT_SECONDS", 0.05)
    seen: list[str] = []
    enough = asyncio.Event()

    async def work(_call: IncomingCall, _body: Body) -> Answer:
        await enough.wait()
        return Answer("end")

    async def on_line(line: StreamEvent) -> None:
        seen.append(line.type)
        if len(seen) == 3:
            enough.set()

    operation = post(work)
    async with served([operation]) as svc:
        await svc.caller.call(svc.out(operation), Answer, on_event=on_line)
    assert seen[:3] == ["heartbeat"] * 3


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_caller_that_goes_away_cancels_the_work(streamed: bool) -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def work(_call: IncomingCall, _body: Body) -> Answer:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        raise AssertionError

    async def on_line(line: StreamEvent) -> None:
        del line

    operation = post(work)
    async with served([operation]) as svc:
        calling = asyncio.create_task(
            svc.caller.call(svc.out(operation), Answer, on_event=on_line if streamed else None)
        )
        await begun.wait()
        calling.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await calling
        async with asyncio.timeout(5):
            await ended.wait()


async def test_the_wait_for_a_place_counts_against_the_deadline() -> None:
    began, finish = asyncio.Event(), asyncio.Event()
    left: list[float] = []

    async def work(call: IncomingCall, _body: object) -> Answer:
        left.append(call.deadline.remaining())
        began.set()
        await finish.wait()
        return Answer("done")

    operation = post(work)
    async with served([operation], max_concurrent=1) as svc:
        first = asyncio.create_task(svc.caller.call(svc.out(operation), Answer))
        await began.wait()
        async with CURRENT.stock() as client:
            answer = await client.post(svc.url + "/op", json={}, headers={"X-Timeout-Ms": "200"})
            assert (answer.status_code, answer.json()["code"]) == (504, "deadline_exceeded")
            assert len(left) == 1, "the call that waited too long never began"
            waiting = asyncio.create_task(client.post(svc.url + "/op", json={}, headers={"X-Timeout-Ms": "9000"}))
            await wait_until(lambda: svc.base.metrics.requests.in_flight == 2, description="another call waits")
            since = CLOCK.monotonic()
            await wait_until(lambda: CLOCK.monotonic() - since > 0.3, description="it has waited for 0.3 s")
            finish.set()
            assert (await waiting).status_code == 200
        await first
    assert left[1] < 9 - 0.3


async def test_the_deadline_travels_and_ends_the_work() -> None:
    left: list[float] = []
    ended = asyncio.Event()

    async def work(call: IncomingCall, _body: Body) -> Answer:
        left.append(call.deadline.remaining())
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        raise AssertionError

    operation = post(work)
    async with served([operation]) as svc:
        with pytest.raises(OctoError) as caught:
            await svc.caller.call(svc.out(operation, seconds=0.3), Answer)
        assert caught.value.code == "deadline_exceeded"
        assert 0 < left[0] <= 0.3
        async with asyncio.timeout(5):
            await ended.wait()


async def test_a_fault_of_ours_is_answered_without_a_trace_of_it() -> None:
    async def work(_call: IncomingCall, _body: Body) -> Answer:
        raise ValueError("secret-detail")

    async with served([post(work)]) as svc, CURRENT.stock() as client:
        found = await client.post(svc.url + "/op", json={})
    assert (found.status_code, found.json()["code"]) == (500, "internal")
    assert "secret-detail" not in found.text
    assert "Traceback" not in found.text


async def test_past_its_bound_a_service_sheds_and_the_caller_waits_as_told() -> None:
    release = asyncio.Event()
    calls: list[int] = []

    async def work(_call: IncomingCall, body: Body) -> Answer:
        calls.append(body.number)
        if len(calls) == 1:
            raise OctoError("Shed.", code="overloaded", retry_after=1)
        release.set()
        return Answer("second try")

    operation = post(work)  # neither safe nor keyed: a shed call may be repeated all the same
    async with served([operation], retry=RetryPolicy(base_delay=0.01)) as svc:
        found = await svc.caller.call(svc.out(operation), Answer)
    assert (found.text, len(calls)) == ("second try", 2)


async def test_what_may_have_begun_is_not_repeated_without_a_key() -> None:
    calls: list[int] = []

    async def work(_call: IncomingCall, body: Body) -> Answer:
        calls.append(body.number)
        raise OctoError("Gone.", code="connection_lost")

    once = post(work, kind="at_most_once")
    async with served([once], retry=RetryPolicy(base_delay=0.01)) as svc:
        with pytest.raises(OctoError):
            await svc.caller.call(svc.out(once), Answer)
    assert len(calls) == 1


@pytest.mark.parametrize("every_wire", DIRECT, indirect=True)
async def test_a_dead_peer_is_named_and_its_breaker_opens() -> None:
    operation = post(echo)
    async with served([operation]) as svc:
        pass
    codes: list[str] = []
    async with served([operation]) as other:
        other.caller._discovery = svc.base.discovery  # pyright: ignore[reportPrivateUsage]
        for _ in range(6):
            with pytest.raises(OctoError) as caught:
                await other.caller.call(other.out(operation), Answer)
            codes.append(caught.value.code)
            assert isinstance(caught.value, TransportError) is (caught.value.code == "connect_failed")
    assert codes == ["connect_failed"] * 5 + ["unavailable"]


async def test_a_draining_service_refuses_new_calls() -> None:
    operation = post(echo)
    async with served([operation]) as svc, CURRENT.stock() as client:
        svc.stop()
        found = await client.post(svc.url + "/op", json={})
    assert (found.status_code, found.json()["code"]) == (503, "draining")
    assert found.headers["retry-after"] == "1"


@pytest.mark.parametrize("length", [True, False])
async def test_a_body_over_the_limit_is_refused(length: bool) -> None:
    async def chunks() -> Any:
        for _ in range(20):
            yield b"x" * 100

    async with served([post(echo, max_body=1000)]) as svc, CURRENT.stock() as client:
        found = await client.post(svc.url + "/op", content=b"x" * 1001 if length else chunks())
    assert (found.status_code, found.json()["code"]) == (413, "body_too_large")


async def test_a_reply_may_have_a_status_and_headers() -> None:
    async def work(_call: IncomingCall, _body: Body) -> OperationResponse:
        return OperationResponse(Answer("made"), 201, {"Location": "/op/1"})

    async with served([post(work)]) as svc, CURRENT.stock() as client:
        found = await client.post(svc.url + "/op", json={})
    assert (found.status_code, found.headers["location"]) == (201, "/op/1")


@pytest.mark.parametrize("value", ["abc", "-5", "0.5", "99999999999"])
async def test_a_malformed_timeout_is_refused(value: str) -> None:
    async with served([post(echo)]) as svc, CURRENT.stock() as client:
        found = await client.post(svc.url + "/op", json={}, headers={"X-Timeout-Ms": value})
    assert (found.status_code, found.json()["code"]) == (400, "invalid_header")


async def test_connections_are_pooled() -> None:
    peers: set[Any] = set()

    async def work(call: IncomingCall, _body: Body) -> Answer:
        peers.add(call.request.client)
        return Answer("")

    operation = post(work)
    async with served([operation]) as svc:
        for _ in range(20):
            await svc.caller.call(svc.out(operation), Answer)
    assert len(peers) < 5


async def test_proxies_of_the_environment_stay_out_of_internal_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    operation = post(echo)
    async with served([operation]) as svc:
        assert (await svc.caller.call(svc.out(operation), Answer)).text == "0"


async def test_many_calls_at_once_are_bounded() -> None:
    running = most = 0

    async def work(_call: IncomingCall, _body: Body) -> Answer:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.005)
        running -= 1
        return Answer("")

    operation = post(work)
    async with served([operation], max_concurrent=4) as svc:
        await asyncio.gather(*(svc.caller.call(svc.out(operation), Answer) for _ in range(40)))
        await wait_until(lambda: running == 0, description="all calls ended")
    assert most == 4


def test_an_accepted_connection_does_not_wait_to_fill_a_packet() -> None:
    with listen("127.0.0.1", 0, "svc") as bound, socket.create_connection(bound.getsockname(), 5):
        bound.settimeout(5)
        accepted, _ = bound.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
