"""How many live connections there may be, and that one who reads nothing costs the others nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import tracemalloc
from pathlib import Path

import msgspec
import pytest
from gateway_kit import KEY, TASK, GatewayHarness, json_answer, start_gateway
from starlette.types import Scope
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed
from websockets.frames import Frame, Opcode

from octollm.contracts.dashboard import Changes
from octollm.errors import OctoError
from octollm.rpc import asgi_extension
from octollm.services.reflex import dashboard, live
from octollm.services.reflex.throttle import ConnectionCounter, ConnectionLimits
from octollm.testing import wait_until

KEEPIDLE, KEEPINTVL, USER_TIMEOUT = socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_USER_TIMEOUT


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


def _open(gateway: GatewayHarness) -> float:
    registry = gateway.service.base.metrics.registry
    return registry.get_sample_value("octollm_live_connections", {"kind": "websocket"}) or 0.0


async def read_text(socket: ClientConnection, length: int = 0) -> int:
    """Return the length of the text, read to the end."""
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


async def test_three_hundred_that_read_nothing_do_not_delay_a_reader(tmp_path: Path) -> None:
    """The reader has each piece of text before the next is written; the others are closed, and no memory stays."""
    path = f"/ws/tasks/{TASK}"
    head = (
        f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    async with (
        start_gateway(tmp_path, patience=0.5, rate_limit="10000/second") as gateway,
        contextlib.AsyncExitStack() as stack,
    ):
        await gateway.script.emit("task.accepted", goal="a goal", progress=0)
        await gateway.script.emit("step.started", step="a", title="A", arm="coder", attempt=1, run=1)
        stalled = [stack.enter_context(socket.socket()) for _ in range(300)]
        for each in stalled:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            each.setblocking(False)
            await asyncio.get_running_loop().sock_connect(each, ("127.0.0.1", gateway.port))
            each.send(head.replace("PORT", str(gateway.port)).encode())
        async with gateway.ws(max_size=None) as reader:
            await wait_until(lambda: _open(gateway) == 301, description="all are watched", timeout=30)
            tracemalloc.start()
            text, is_first = 0, True
            while _open(gateway) > 1:
                piece = "x" * 60_000
                await gateway.script.stream.append(
                    TASK, step="a", attempt=1, run=1, offset=text, text=piece, reset=is_first
                )
                await gateway.script.redis.publish([(f"octollm:watch:{TASK}", b"text")])  # type: ignore[union-attr]
                is_first = False
                while piece:
                    frame = json.loads(await asyncio.wait_for(reader.recv(), 20))
                    if frame["type"] == "token":
                        assert frame["offset"] == text
                        text += len(frame["data"]["text"])
                        piece = piece[len(frame["data"]["text"]) :]
                assert text < 60_000 * 4000, "they are not let go"
            _now, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            # What waits for them is shared. A megabyte for each would be 300 MB.
            assert peak < 40_000_000
            await gateway.script.emit("task.completed", status="completed", duration_ms=1, progress=100)
            assert await read_text(reader, text) == text


@pytest.mark.parametrize("path", [f"/ws/tasks/{TASK}", "/ws/dashboard"])
async def test_what_no_client_may_send_closes_with_its_code(gateway: GatewayHarness, path: str) -> None:
    gateway.script.keys[KEY] = "tasks:read"
    now = Changes("", ("tasks",), 0)
    gateway.script.answers["GET", "/dashboard/changes"] = json_answer(msgspec.to_builtins(now))
    await gateway.script.emit("task.accepted", goal="a goal", progress=0)

    def text(payload: bytes, *, mask: bool = True) -> bytes:
        return Frame(Opcode.TEXT, payload).serialize(mask=mask)

    for sent, code in (
        (text(b"x" * 70_000), 1009),
        (text(b"\xff"), 1007),
        (text(b"{}", mask=False), 1002),
        (Frame(Opcode.BINARY, b"\x00").serialize(mask=True) * 65, 1008),
        (text(b"") * 5000, 1008),
    ):
        async with gateway.ws(path, key=KEY) as watcher:
            await watcher.recv()
            watcher.transport.write(sent)
            assert (await reason(watcher))[0] == code
    await wait_until(lambda: _open(gateway) == 0, description="all places are free")


@pytest.mark.parametrize("path", [f"/tasks/{TASK}/events", "/dashboard/events"])
async def test_the_kernel_ends_a_stream_whose_client_vanished(
    gateway: GatewayHarness, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packets are not dropped here: it is shown that the connection of the stream has the time limits."""
    gateway.script.keys[KEY] = "tasks:read"
    now = Changes("", ("tasks",), 0)
    gateway.script.answers["GET", "/dashboard/changes"] = json_answer(msgspec.to_builtins(now))
    await gateway.script.emit("task.accepted", goal="a goal", progress=0)
    found: dict[int, int] = {}
    limit = asgi_extension.disconnect_silent_client

    def observe(scope: Scope) -> None:
        limit(scope)
        peer = scope["extensions"][asgi_extension.TRANSPORT].get_extra_info("socket")
        found.update({each: peer.getsockopt(socket.IPPROTO_TCP, each) for each in (KEEPIDLE, KEEPINTVL, USER_TIMEOUT)})
        found[socket.SO_KEEPALIVE] = peer.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)

    for module in (live, dashboard):
        monkeypatch.setattr(module, "disconnect_silent_client", observe)
    async with gateway.client.stream("GET", path, headers={"Authorization": f"Bearer {KEY}"}) as response:
        assert response.status_code == 200
        await anext(response.aiter_lines())
    assert found[socket.SO_KEEPALIVE] == 1
    # The first probe, and those after it, until nothing was acknowledged for this long.
    assert found[KEEPIDLE] + 3 * found[KEEPINTVL] < 15
    assert found[USER_TIMEOUT] < 15_000
