"""What a WebSocket client may cost: one that vanished, reads nothing or too slowly, or sends too much."""

from __future__ import annotations

import asyncio
import struct

import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Receive, Scope, Send
from test_http1_server import FakeTransport
from uvicorn.server import ServerState
from websockets.frames import Frame, Opcode

from octollm.rpc import websocket_server
from octollm.rpc.websocket_server import WebSocketConnection, get_websocket_connection
from octollm.testing import wait_until

UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
PING = Frame(Opcode.PING, b"").serialize(mask=True)
EMPTY = Frame(Opcode.TEXT, b"").serialize(mask=True)


class Wire(FakeTransport):
    """A transport whose client takes nothing once it ``is_full``."""

    is_full = False
    waiting = 0
    aborted = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        super().write(data)
        self.waiting += len(data) if self.is_full else 0

    def get_write_buffer_size(self) -> int:
        return self.waiting

    def abort(self) -> None:
        self.aborted = True
        super().abort()


class Acknowledging:
    """A socket that says what its peer has acknowledged, and how many segments it has not."""

    acknowledged = unacknowledged = 0

    def getsockopt(self, _level: int, _name: int, size: int) -> bytes:
        info = bytearray(size)
        struct.pack_into("=I", info, 24, self.unacknowledged)
        struct.pack_into("=Q", info, 120, self.acknowledged)
        return bytes(info)


class Application:
    """Accepts, detaches, and keeps what the client says."""

    def __init__(self, *, detaches: bool = True) -> None:
        self.messages: list[str | None] = []
        self.is_lost = False
        self._detaches = detaches

    def receive_message(self, text: str | None) -> None:
        self.messages.append(text)

    def connection_lost(self) -> None:
        self.is_lost = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        if self._detaches:
            get_websocket_connection(scope).detach(self)
            return
        while (message := await receive())["type"] != "websocket.disconnect":
            self.messages.append(message.get("text"))
        self.is_lost = True


async def connect(application: Application) -> tuple[WebSocketConnection, Wire]:
    config = uvicorn.Config(application, ws=WebSocketConnection, ws_max_size=1000, lifespan="off", log_config=None)
    config.load()
    connection = WebSocketConnection(config=config, server_state=ServerState(), app_state={})
    wire = Wire()
    connection.connection_made(wire)
    connection.data_received(UPGRADE)
    await wait_until(lambda: connection.handshake_complete, description="the handshake")
    await asyncio.sleep(0)
    wire.sent = b""
    return connection, wire


def close_code(sent: bytes) -> int:
    start = sent.rindex(b"\x88")
    return int.from_bytes(sent[start + 2 : start + 4], "big")


@pytest.mark.parametrize("detaches", [True, False])
@pytest.mark.parametrize(
    "flood",
    [
        PING * 2000,
        EMPTY * 40_000,
        Frame(Opcode.TEXT, b"", fin=False).serialize(mask=True)
        + Frame(Opcode.CONT, b"", fin=False).serialize(mask=True) * 2000,
    ],
    ids=["pings", "messages", "fragments"],
)
async def test_a_flood_is_closed_and_hardly_read(flood: bytes, detaches: bool) -> None:
    application = Application(detaches=detaches)
    connection, wire = await connect(application)
    connection.data_received(flood)
    connection.data_received(flood)
    assert close_code(wire.sent) == 1008
    assert len(wire.sent) < 10_000
    assert len(application.messages) <= 512
    await wait_until(lambda: application.is_lost, description="the application knows")
    connection.connection_lost(None)


async def test_fragments_without_end_are_closed_however_slowly_they_come() -> None:
    connection, wire = await connect(Application())
    fragment = Frame(Opcode.TEXT, b"", fin=False).serialize(mask=True)
    for _ in range(600):
        connection.data_received(fragment)
        fragment = Frame(Opcode.CONT, b"", fin=False).serialize(mask=True)
        connection.send_keepalive_ping()
        connection.stop_keepalive()
        if connection.close_sent:
            break
    assert close_code(wire.sent) == 1008
    connection.connection_lost(None)


async def test_pings_of_a_client_that_reads_nothing_cost_no_memory() -> None:
    connection, wire = await connect(Application())
    wire.is_full = True
    ping = Frame(Opcode.PING, b"x" * 125).serialize(mask=True)
    for _ in range(20):
        connection.send_keepalive_ping()
        connection.stop_keepalive()
        connection.data_received(ping * 100)
    assert not connection.close_sent
    assert wire.waiting < 2 * websocket_server.MAX_PONG_BACKLOG
    connection.connection_lost(None)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (Frame(Opcode.TEXT, b"x" * 1001).serialize(mask=True), 1009),
        (Frame(Opcode.TEXT, b"\xff").serialize(mask=True), 1007),
        (Frame(Opcode.TEXT, b"x").serialize(mask=False), 1002),
        (b"\xf1\x80\x00\x00\x00\x00", 1002),
        (Frame(Opcode.CONT, b"x").serialize(mask=True), 1002),
    ],
    # A frame's mask is random, and so would be the name of its test.
    ids=["too long", "not UTF-8", "not masked", "reserved opcode", "no beginning"],
)
@pytest.mark.parametrize("detaches", [True, False])
async def test_bytes_that_are_no_message_close_with_their_code(data: bytes, code: int, detaches: bool) -> None:
    application = Application(detaches=detaches)
    connection, wire = await connect(application)
    connection.data_received(data)
    assert (close_code(wire.sent), wire.closing) == (code, True)
    await wait_until(lambda: application.is_lost, description="the application knows")
    connection.connection_lost(None)


async def test_a_client_that_answers_no_ping_is_closed_and_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert websocket_server.PING_SECONDS + websocket_server.PONG_SECONDS + websocket_server.ABORT_SECONDS < 15
    for name in ("PING_SECONDS", "PONG_SECONDS", "ABORT_SECONDS"):
        monkeypatch.setattr(websocket_server, name, 0.02)
    for detaches in (True, False):
        application = Application(detaches=detaches)
        connection, wire = await connect(application)
        wire.is_full, wire.waiting = True, 1
        await wait_until(lambda wire=wire: wire.aborted, description="the connection is cut off")
        await wait_until(lambda application=application: application.is_lost, description="the application knows")
        assert close_code(wire.sent) == 1013
        connection.connection_lost(None)


async def test_a_late_pong_is_waited_for_while_it_cannot_have_come() -> None:
    connection, wire = await connect(Application())
    peer = Acknowledging()
    wire._extra["socket"] = peer  # type: ignore[attr-defined]  # pyright: ignore
    connection.send_keepalive_ping()
    # The client takes what comes before the ping, but only so often.
    for _ in range(websocket_server.MAX_LATE_PONGS):
        peer.acknowledged, peer.unacknowledged = peer.acknowledged + 1000, 1
        connection.keepalive_timeout()
        assert not connection.close_sent
    # A message is being handled, and what comes after it is not read meanwhile.
    connection.data_received(EMPTY)
    connection.keepalive_timeout()
    assert not connection.close_sent
    connection.resume_reading()
    connection.keepalive_timeout()
    assert close_code(wire.sent) == 1013
    connection.connection_lost(None)


@given(st.lists(st.text(max_size=20), min_size=1, max_size=5), st.data())
def test_messages_are_the_same_however_their_bytes_are_cut(texts: list[str], data: st.DataObject) -> None:
    stream = b"".join(Frame(Opcode.TEXT, text.encode()).serialize(mask=True) for text in texts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))

    async def run() -> list[str | None]:
        application = Application()
        connection, _wire = await connect(application)
        for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
            connection.data_received(stream[start:end])
        connection.connection_lost(None)
        return application.messages

    assert asyncio.run(run()) == texts
