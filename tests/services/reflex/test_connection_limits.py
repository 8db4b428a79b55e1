"""How many live connections there may be, and that one who reads nothing costs the others nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path

import pytest
from gateway_kit import KEY, TASK, GatewayHarness, start_gateway
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from octollm.errors import OctoError
from octollm.services.reflex.throttle import ConnectionCounter, ConnectionLimits
from octollm.testing import wait_until


def refusal(counter: ConnectionCounter, credential: str, address: str) -> str:
    try:
        with counter.count(credential, address):
            return ""
    except OctoError as error:
        assert error.retry_after
        return error.code


def test_each_bound_holds_by_itself_and_is_given_back() -> None:
    counter = ConnectionCounter(ConnectionLimits(total=4, per_caller=2, per_address=3))
    with contextlib.ExitStack() as opened:
        for credential, address in (("a", "10.0.0.1"), ("a", "10.0.0.2"), ("b", "10.0.0.1")):
            opened.enter_context(counter.count(credential, address))
        assert refusal(counter, "a", "10.0.0.9") == "too_many_connections"
        assert refusal(counter, "b", "10.0.0.1") == ""
        with counter.count("c", "10.0.0.1"):
            assert refusal(counter, "d", "10.0.0.3") == "overloaded"
        assert refusal(counter, "a", "10.0.0.9") == "too_many_connections"
    assert refusal(counter, "a", "10.0.0.1") == ""
    assert not counter._counts  # pyright: ignore[reportPrivateUsage]


def test_one_client_of_ipv6_has_one_network() -> None:
    counter = ConnectionCounter(ConnectionLimits(per_address=1))
    with counter.count("a", "2001:db8::1"):
        assert refusal(counter, "b", "2001:db8::2") == "too_many_connections"
        assert refusal(counter, "b", "2001:db8:0:1::1") == ""
        assert refusal(counter, "b", "10.0.0.1") == ""
    with counter.count("a", "10.0.0.1"):
        assert refusal(counter, "b", "::ffff:10.0.0.1") == "too_many_connections"


async def reason(socket: ClientConnection) -> tuple[int, str]:
    with pytest.raises(ConnectionClosed) as closed:
        while True:
            await asyncio.wait_for(socket.recv(), 20)
    assert closed.value.rcvd is not None
    return closed.value.rcvd.code, closed.value.rcvd.reason


async def test_a_key_has_its_share_of_connections_of_every_kind(tmp_path: Path) -> None:
    async with start_gateway(tmp_path, max_watchers_per_key=2) as gateway:
        await gateway.script.emit("task.accepted", goal="a goal", progress=0)
        async with gateway.ws() as first, gateway.ws() as second:
            await first.recv()
            await second.recv()
            async with gateway.ws() as third:
                assert await reason(third) == (1013, "too_many_connections")
            stream = await gateway.client.get(f"/tasks/{TASK}/events")
            assert (stream.status_code, stream.json()["code"]) == (429, "too_many_connections")
            assert "retry-after" in stream.headers
            async with gateway.ws(key=KEY) as other:
                assert json.loads(await other.recv())["type"] == "status"
        async with gateway.ws() as socket:
            assert json.loads(await socket.recv())["type"] == "status"


async def test_those_who_read_nothing_cost_a_reader_nothing(tmp_path: Path) -> None:
    """Eight sockets read nothing; another gets every frame, and they are closed: with 1013, if they take so much."""
    async with start_gateway(tmp_path, patience=0.3) as gateway, contextlib.AsyncExitStack() as stack:
        await gateway.script.emit("task.accepted", goal="a goal", progress=0)
        await gateway.script.emit("step.started", step="a", title="A", arm="coder", attempt=1, run=1)
        stalled = [await stack.enter_async_context(gateway.ws(max_queue=1)) for _ in range(8)]
        async with gateway.ws() as reader:
            reading = asyncio.create_task(read_text(reader))
            text = 0
            while _open(gateway) > 1:
                await gateway.script.stream.append(
                    TASK, step="a", attempt=1, run=1, offset=text, text="x" * 60_000, reset=text == 0
                )
                await gateway.script.redis.publish([(f"octollm:watch:{TASK}", b"text")])  # type: ignore[union-attr]
                text += 60_000
                await asyncio.sleep(0.01)
                assert text < 60_000 * 4000, "they are not let go"
            await gateway.script.emit("task.completed", status="completed", duration_ms=1, progress=100)
            assert await reading == text
        for socket in stalled:
            with pytest.raises(ConnectionClosed) as closed:
                while True:
                    await asyncio.wait_for(socket.recv(), 20)
            assert closed.value.rcvd is None or closed.value.rcvd.code == 1013
    await wait_until(lambda: _open(gateway) == 0, description="all places are free")


def _open(gateway: GatewayHarness) -> float:
    registry = gateway.service.base.metrics.registry
    return registry.get_sample_value("octollm_live_connections", {"kind": "websocket"}) or 0.0


async def read_text(socket: ClientConnection) -> int:
    """Return the length of the text, read to the end."""
    length = 0
    try:
        while True:
            frame = json.loads(await asyncio.wait_for(socket.recv(), 20))
            if frame["type"] == "token":
                assert frame["offset"] == length
                length += len(frame["data"]["text"])
    except ConnectionClosed as closed:
        assert closed.rcvd is not None
        assert closed.rcvd.code == 1000
        return length
