"""HTTP/2 in its own frames: its bounds, its flow of bodies, and what a peer may not do."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
from collections.abc import AsyncGenerator

import h2.config
import h2.connection
import h2.events
import h2.settings
import msgspec
import pytest
from kit import base_for, served
from starlette.responses import Response
from wires import CURRENT, certificates, wire_named

from octollm.rpc.call import IncomingCall, Operation
from octollm.rpc.http2_client import Http2Client
from octollm.rpc.http_client import TransportError
from octollm.rpc.service import build_service
from octollm.rpc.tls import client_context
from octollm.rpc.transport import PLAINTEXT, TransportConfig, listen
from octollm.testing import wait_until


class Text(msgspec.Struct):
    text: str


async def echo(_call: IncomingCall, body: Text) -> Text:
    return body


async def large(_call: IncomingCall, _body: object) -> Response:
    return Response(b"x" * 1_000_000, media_type="application/octet-stream")


ECHO = Operation("echo", "POST", "/echo", echo, auth="public", body=Text, response=Text)
LARGE = Operation("large", "GET", "/large", large, auth="public", max_body=0)


class Peer:
    """A client in frames."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self.events: list[h2.events.Event] = []
        self.over = False

    def send(self) -> None:
        self._writer.write(self.h2.data_to_send())

    def ask(self, path: str, *more: tuple[str, str], method: str = "GET", end: bool = True) -> int:
        stream_id = self.h2.get_next_available_stream_id()
        head = [(":method", method), (":path", path), (":scheme", "http"), (":authority", "a"), *more]
        self.h2.send_headers(stream_id, head, end_stream=end)
        return stream_id

    async def read(self) -> None:
        try:
            data = await self._reader.read(65536)
        except ConnectionResetError:
            data = b""
        if not data:
            self.over = True
            return
        self.events += self.h2.receive_data(data)
        self.send()

    async def until(self, kind: type[h2.events.Event], stream_id: int | None = None) -> h2.events.Event:
        async with asyncio.timeout(10):
            while True:
                for event in self.events:
                    if isinstance(event, kind) and stream_id in (None, getattr(event, "stream_id", None)):
                        self.events.remove(event)
                        return event
                assert not self.over, f"the connection ended before {kind.__name__}"
                await self.read()

    async def closed(self) -> None:
        async with asyncio.timeout(10):
            while not self.over:
                await self.read()

    async def status(self, stream_id: int) -> int:
        found = await self.until(h2.events.ResponseReceived, stream_id)
        assert isinstance(found, h2.events.ResponseReceived)
        return int(dict(found.headers)[":status"])


@contextlib.asynccontextmanager
async def peer(port: int, tls: ssl.SSLContext | None = None, *, window: int | None = None) -> AsyncGenerator[Peer]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=tls)
    made = Peer(reader, writer)
    if window is not None:
        made.h2.local_settings = h2.settings.Settings(
            initial_values={h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window}
        )
    made.h2.initiate_connection()
    made.send()
    try:
        yield made
    finally:
        writer.close()


@pytest.fixture(autouse=True)
def http2() -> object:
    CURRENT.wire = wire_named("http2")
    yield
    CURRENT.wire = PLAINTEXT


async def test_bounds_of_headers_and_url_are_those_of_every_call() -> None:
    async with served([ECHO, LARGE]) as svc, peer(svc.port) as client:
        big = client.ask("/large", ("x-big", "a" * 40_000))
        long = client.ask("/large?" + "x" * 9_000)
        fits = client.ask("/health?" + "x" * 8_000)
        client.send()
        assert [await client.status(each) for each in (big, long, fits)] == [431, 414, 200]


async def test_headers_beyond_every_bound_end_the_connection() -> None:
    async with served([ECHO]) as svc, peer(svc.port) as client:
        for number in range(4):
            client.ask("/health", *((f"x-{number}-{n}", "b" * 900) for n in range(60 * (number + 1))))
        client.send()
        await client.closed()


async def test_an_answer_waits_for_room_and_a_body_for_its_reader() -> None:
    async with served([LARGE], max_concurrent=4) as svc, peer(svc.port, window=10_000) as client:
        stream = client.ask("/large")
        client.send()
        assert await client.status(stream) == 200
        size = 0
        while size < 1_000_000:
            data = await client.until(h2.events.DataReceived, stream)
            assert isinstance(data, h2.events.DataReceived)
            size += len(data.data or b"")
            client.h2.acknowledge_received_data(data.flow_controlled_length or 0, stream)
            client.send()
        await client.until(h2.events.StreamEnded, stream)


async def test_a_large_body_comes_whole_and_a_larger_one_is_refused() -> None:
    async with served([ECHO]) as svc, CURRENT.stock() as client:
        text = "y" * 3_000_000
        found = await client.post(svc.url + "/echo", json={"text": text})
        assert found.http_version == "HTTP/2"
        assert found.json() == {"text": text}
        found = await client.post(svc.url + "/echo", content=b"z" * 5_000_000)
        assert (found.status_code, found.json()["code"]) == (413, "body_too_large")


async def test_many_calls_share_one_connection_and_one_that_leaves_disturbs_no_other() -> None:
    began, ended = 0, 0

    async def work(_call: IncomingCall, body: Text) -> Text:
        nonlocal began, ended
        if body.text != "forever":
            return body
        began += 1
        try:
            await asyncio.Event().wait()
        finally:
            ended += 1
        raise AssertionError

    operation = Operation("work", "POST", "/work", work, auth="public", body=Text, response=Text)
    async with served([operation]) as svc, peer(svc.port) as client:
        streams = [client.ask("/work", method="POST", end=False) for _ in range(6)]
        for number, stream in enumerate(streams):
            client.h2.send_data(
                stream, json.dumps({"text": "forever" if number < 3 else "a"}).encode(), end_stream=True
            )
        client.send()
        assert [await client.status(stream) for stream in streams[3:]] == [200] * 3
        await wait_until(lambda: began == 3, description="three work for ever")
        client.h2.reset_stream(streams[0])
        client.send()
        await wait_until(lambda: ended == 1, description="the work of the one that left is cancelled")
        again = client.ask("/health")
        client.send()
        assert await client.status(again) == 200
        assert ended == 1


async def test_who_asks_and_leaves_without_end_is_told_to_calm_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octollm.rpc.http2_server.MAX_RESETS", 20)
    async with served([ECHO]) as svc, peer(svc.port) as client:
        for _ in range(40):
            client.h2.reset_stream(client.ask("/echo", method="POST", end=False))
        client.send()
        ended = await client.until(h2.events.ConnectionTerminated)
        assert isinstance(ended, h2.events.ConnectionTerminated)
        assert ended.error_code == h2.connection.ErrorCodes.ENHANCE_YOUR_CALM


async def test_what_is_no_frame_ends_the_connection() -> None:
    async with served([ECHO]) as svc, peer(svc.port) as client:
        client._writer.write(b"\x00\x00\x04\x08\x00\x00\x00\x00\x00\x00\x00\x00\x00")  # an empty window update
        await client.until(h2.events.ConnectionTerminated)
        await client.closed()


async def test_a_connection_that_asks_nothing_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("http2_server", "transport"):
        monkeypatch.setattr(f"octollm.rpc.{module}.HEADER_SECONDS", 0.2)
    async with served([ECHO]) as svc:
        async with peer(svc.port) as client:
            await client.closed()
        with socket.create_connection(("127.0.0.1", svc.port)) as silent:
            silent.sendall(b"PRI * ")
            assert await asyncio.to_thread(silent.recv, 1) == b""


async def test_draining_answers_what_is_under_way_and_takes_no_more() -> None:
    going = asyncio.Event()

    async def work(_call: IncomingCall, body: Text) -> Text:
        going.set()
        await asyncio.sleep(0.3)
        return body

    operation = Operation("work", "POST", "/work", work, auth="public", body=Text, response=Text)
    bound = listen("127.0.0.1", 0, "svc")
    port = bound.getsockname()[1]
    async with Http2Client() as http:
        service = build_service(base_for(http, {"svc": (CURRENT.url(port),)}), [operation])
        serving = service.serve(bound, shutdown_grace=5)
        await serving.__aenter__()
        async with peer(port) as client:
            stream = client.ask("/work", method="POST", end=False)
            client.h2.send_data(stream, b'{"text":"a"}', end_stream=True)
            client.send()
            await going.wait()
            leaving = asyncio.create_task(serving.__aexit__(None, None, None))
            await client.until(h2.events.ConnectionTerminated)
            assert client.h2.state_machine is not None
            # The library of this peer hears no more after a GOAWAY; its bytes do.
            rest = b""
            while piece := await client._reader.read(65536):
                rest += piece
            assert b'{"text":"a"}' in rest
            await leaving


async def test_http1_is_understood_on_the_same_port() -> None:
    async with served([ECHO]) as svc:
        reader, writer = await asyncio.open_connection("127.0.0.1", svc.port)
        writer.write(b"P")
        await writer.drain()
        writer.write(b'OST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 12\r\nConnection: close\r\n\r\n{"text":"a"}')
        assert (await reader.read()).endswith(b'{"text":"a"}')
        writer.close()


async def test_in_tls_the_version_is_agreed_on() -> None:
    tls = certificates()
    for offered, expected in ((["h2", "http/1.1"], "h2"), (["http/1.1"], "http/1.1")):
        CURRENT.wire = wire_named("tls-http2")
        context = client_context(tls.ca, tls.certificate, tls.key)
        context.set_alpn_protocols(offered)
        async with served([ECHO]) as svc:
            _, writer = await asyncio.open_connection("127.0.0.1", svc.port, ssl=context)
            assert writer.get_extra_info("ssl_object").selected_alpn_protocol() == expected
            writer.close()


async def test_who_shows_no_certificate_or_one_of_another_authority_is_not_served() -> None:
    tls = certificates()
    CURRENT.wire = wire_named("tls-http2")
    async with served([ECHO]) as svc:
        for wire in (TransportConfig("2"), TransportConfig("1.1")):
            async with wire.create_client() as http:
                with pytest.raises(TransportError) as caught:
                    await http.send("GET", svc.url + "/health", {}, None, seconds=5)
                assert caught.value.code in ("connect_failed", "connection_lost")
        context = client_context(tls.ca)  # believes the server, and shows nothing
        reader, writer = await asyncio.open_connection("127.0.0.1", svc.port, ssl=context)
        writer.write(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        with contextlib.suppress(OSError):
            assert await reader.read() == b""
        writer.close()
        async with CURRENT.client() as http:
            answer = await http.send("GET", svc.url + "/health", {}, None, seconds=5)
    assert answer.status == 200
