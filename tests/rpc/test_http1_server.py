"""The HTTP/1.1 server in its own bytes: cuts, bounds, refusals that a client gets to read, and connections that end."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import ssl
import urllib.error
import urllib.request

import msgspec
import pytest
import uvicorn
from kit import served
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send
from wires import CURRENT

from octollm.rpc.call import IncomingCall, Operation
from octollm.rpc.http1_server import Http1ServerProtocol
from octollm.rpc.tls import client_context
from octollm.testing import wait_until


class Text(msgspec.Struct):
    text: str


async def short(_call: IncomingCall, _body: object) -> Text:
    return Text("a")


async def echo(_call: IncomingCall, body: Text) -> Text:
    return body


SHORT = Operation("short", "GET", "/short", short, auth="public", max_body=0)
TAKE = Operation("take", "POST", "/take", echo, auth="public", body=Text, max_body=1000)


class FakeTransport(asyncio.Transport):
    """What a protocol writes, without a socket."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 5), "sockname": ("127.0.0.1", 80)})
        self.sent = b""
        self.closing = self.ended = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self.closing
        assert not self.ended
        self.sent += data

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.ended = True

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    def abort(self) -> None:
        self.closing = True

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


async def mirror(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with what the application was given."""
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body, more = body + message["body"], message["more_body"]
    seen = {
        "method": scope["method"],
        "path": scope["path"],
        "query": scope["query_string"].decode(),
        "headers": [[name.decode(), value.decode()] for name, value in scope["headers"]],
        "body": body.decode(),
    }
    await Response(json.dumps(seen))(scope, receive, send)


async def converse(pieces: list[bytes]) -> tuple[bytes, bool, bool]:
    """Return what is answered to a connection's bytes in ``pieces``, and whether it was ended and closed."""
    config = uvicorn.Config(mirror, http=Http1ServerProtocol, lifespan="off", log_config=None)
    config.load()
    state = uvicorn.Server(config).server_state
    protocol = Http1ServerProtocol(config, state, {})
    transport = FakeTransport()
    protocol.connection_made(transport)
    for piece in pieces:
        protocol.data_received(piece)
        for _ in range(4):
            await asyncio.sleep(0)
    for _ in range(40):
        await asyncio.sleep(0)
    result = transport.sent, transport.ended, transport.closing
    protocol.connection_lost(None)
    await asyncio.gather(*state.tasks)
    assert not state.connections
    return result


GET = b"GET /a%20b?c=1#d HTTP/1.1\r\nHost: a\r\nX-Blank:  b \t\r\n\r\n"
POST = b"POST /p HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello"
CHUNKS = b"POST /c HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX: y\r\n\r\n"
LAST = b"GET http://a?x HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize(
    "data", [GET, POST, CHUNKS, LAST, GET + POST + CHUNKS + LAST + GET, POST + b"GET /\nx", CHUNKS[:-5]]
)
async def test_every_cut_of_the_bytes_of_a_connection_gets_the_same_answers(data: bytes) -> None:
    whole = await converse([data])
    assert await converse([data[n : n + 1] for n in range(len(data))]) == whole
    for cut in range(1, len(data)):
        assert await converse([data[:cut], data[cut:]]) == whole


async def test_what_an_application_is_given() -> None:
    sent, ended, closed = await converse([GET + POST + LAST + GET])
    answers = [json.loads(part.partition(b"\r\n\r\n")[2]) for part in sent.split(b"HTTP/1.1 200 OK\r\n")[1:]]
    assert [(a["method"], a["path"], a["query"], a["body"]) for a in answers] == [
        ("GET", "/a b", "c=1", ""),
        ("POST", "/p", "", "hello"),
        ("GET", "/", "x", ""),
    ]
    assert ["x-blank", "b"] in answers[0]["headers"]
    assert (ended, closed) == (False, True)


async def test_what_is_no_http_is_told_so_and_ends_the_connection() -> None:
    sent, ended, closed = await converse([POST + b"GET / HTTP/1.1\r\n\r\n" + GET])
    head, _, body = sent[sent.index(b"HTTP/1.1 400") :].partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"\r\nconnection: close" in head
    assert json.loads(body)["code"] == "malformed_request"
    assert (ended, closed) == (True, False)  # it is read on for a while, so that the client sees the answer


async def raw(port: int, request: bytes) -> tuple[bytes, bytes]:
    """Send bytes; return head and body of the answer, whose connection the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    async with asyncio.timeout(10):
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    return head, body


async def test_a_url_over_the_limit_is_refused() -> None:
    async with served([SHORT]) as svc:
        fits = b"GET /short?" + b"x" * 8000 + b" HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
        assert (await raw(svc.port, fits))[0].startswith(b"HTTP/1.1 200 ")
        head, body = await raw(svc.port, b"GET /short?" + b"x" * 9000 + b" HTTP/1.1\r\nHost: a\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 414 ")
        assert json.loads(body)["code"] == "url_too_long"


async def test_headers_and_bodies_that_come_too_slowly_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octollm.rpc.http1_server.HEADER_SECONDS", 0.2)
    monkeypatch.setattr("octollm.rpc.codec.BODY_SECONDS", 0.2)
    operation = Operation("take", "POST", "/take", short, auth="public", body=Text)
    async with served([operation]) as svc:
        head, body = await raw(svc.port, b"POST /take HTTP/1.1\r\nHost: a\r\nX-Slow")
        assert head.startswith(b"HTTP/1.1 408 ")
        assert (json.loads(body)["code"], json.loads(body)["retryable"]) == ("request_timeout", True)
        request = b"POST /take HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 20\r\n\r\n{"
        head, body = await raw(svc.port, request)
        assert head.startswith(b"HTTP/1.1 408 ")
        assert json.loads(body)["code"] == "request_timeout"


async def test_headers_over_the_limit_are_refused() -> None:
    async with served([SHORT]) as svc:
        for headers in (
            b"X-Big: " + b"a" * 40_000 + b"\r\n",
            b"".join(b"X-%d: %s\r\n" % (n, b"b" * 900) for n in range(50)),
        ):
            head, body = await raw(svc.port, b"GET /health HTTP/1.1\r\nHost: x\r\n" + headers + b"\r\n")
            assert head.startswith(b"HTTP/1.1 431 ")
            assert json.loads(body)["code"] == "header_too_large"


async def test_blanks_around_the_value_of_a_header_are_no_part_of_it() -> None:
    async def look(call: IncomingCall, _body: object) -> Text:
        return Text(call.request.headers["x-value"])

    operation = Operation("look", "GET", "/look", look, auth="public", max_body=0)
    async with served([operation]) as svc:
        request = (
            b"GET /look HTTP/1.1\r\nHost: a \r\nX-Value:\t b c \t \r\nConnection: close \r\nX-Request-ID: r1 \r\n\r\n"
        )
        head, body = await raw(svc.port, request)
    assert json.loads(body) == {"text": "b c"}
    assert b"\r\nx-request-id: r1\r\n" in head + b"\r\n"


@pytest.mark.usefixtures("every_wire")
async def test_of_two_traceparents_neither_is_believed() -> None:
    async def look(call: IncomingCall, _body: object) -> Text:
        return Text(call.trace.trace_id)

    operation = Operation("look", "GET", "/look", look, auth="public", max_body=0)
    one, other = (("traceparent", f"00-{digit * 32}-{digit * 16}-01") for digit in "ab")
    async with served([operation]) as svc, CURRENT.stock(base_url=svc.url) as client:
        assert (await client.get("/look", headers=[one])).json() == {"text": "a" * 32}
        assert (await client.get("/look", headers=[one, ("x-a", "1"), ("x-a", "2")])).json() == {"text": "a" * 32}
        for both in ([one, other], [other, one], [one, one]):
            assert (await client.get("/look", headers=both)).json()["text"] not in ("a" * 32, "b" * 32)


def stock_tls() -> ssl.SSLContext | None:
    tls = CURRENT.wire.tls
    return None if tls is None else client_context(tls.ca, tls.certificate, tls.key)


def http_client(port: int) -> http.client.HTTPConnection:
    context = stock_tls()
    if context is None:
        return http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    return http.client.HTTPSConnection("127.0.0.1", port, timeout=10, context=context)


@pytest.mark.usefixtures("every_wire")
async def test_urllib_sees_why_its_upload_is_refused() -> None:
    def upload(url: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(url, data=b"x" * 6_000_000, timeout=10, context=stock_tls()):
                raise AssertionError
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())["code"]

    async with served([TAKE]) as svc:
        for _ in range(5):
            assert await asyncio.to_thread(upload, svc.url + "/take") == (413, "body_too_large")
            assert await asyncio.to_thread(upload, svc.url + "/elsewhere") == (404, "not_found")


@pytest.mark.usefixtures("every_wire")
async def test_a_client_whose_upload_was_refused_goes_on_with_the_connection() -> None:
    def upload(port: int) -> list[tuple[int, bytes]]:
        client = http_client(port)
        found: list[tuple[int, bytes]] = []
        # The second is sent in chunks: its length is not known before it ends.
        for method, path, body in (
            ("POST", "/take", b"x" * 6_000_000),
            ("POST", "/take", iter([b"y" * 500_000] * 6)),
            ("POST", "/take", b'{"text":"a"}'),
        ):
            client.request(method, path, body)
            first = client.sock
            answer = client.getresponse()
            found.append((answer.status, answer.read()))
            assert client.sock is first
        client.close()
        return found

    async with served([TAKE]) as svc:
        refused, chunks, taken = await asyncio.to_thread(upload, svc.port)
    assert [(status, json.loads(body)["code"]) for status, body in (refused, chunks)] == [(413, "body_too_large")] * 2
    assert taken == (200, b'{"text":"a"}')


async def test_an_upload_is_not_drained_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("http1_exchange", "http1_server"):
        monkeypatch.setattr(f"octollm.rpc.{module}.MAX_DISCARDED_BYTES", 1_000_000)

    def upload(port: int, framing: bytes) -> tuple[bytes, int]:
        sent = 0
        with socket.create_connection(("127.0.0.1", port), 10) as client:
            client.sendall(b"POST /take HTTP/1.1\r\nHost: a\r\n" + framing + b"\r\n\r\n")
            head = b"" if b"chunked" in framing else client.recv(100)
            piece = b"10000\r\n" + b"x" * 65536 + b"\r\n"
            with contextlib.suppress(ConnectionError):
                while sent < 100_000_000:
                    client.sendall(piece)
                    sent += len(piece)
        return head, sent

    async with served([TAKE]) as svc:
        head, sent = await asyncio.to_thread(upload, svc.port, b"Content-Length: 100000000")
        assert head.startswith(b"HTTP/1.1 413 ")
        assert sent < 50_000_000  # what is beyond the bound fills the buffers of two sockets
        _, sent = await asyncio.to_thread(upload, svc.port, b"Transfer-Encoding: chunked")
        assert sent < 50_000_000


@pytest.mark.parametrize("more", [b"", b"Connection: close\r\n"])
async def test_an_upload_that_stalls_is_not_waited_for_without_end(
    more: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("octollm.rpc.http1_server.MAX_DISCARD_SECONDS", 0.2)
    async with served([TAKE]) as svc:
        reader, writer = await asyncio.open_connection("127.0.0.1", svc.port)
        writer.write(b"POST /take HTTP/1.1\r\nHost: a\r\n" + more + b"Content-Length: 5000\r\n\r\nx")
        async with asyncio.timeout(10):
            assert b" 413 " in await reader.read()
            with pytest.raises(ConnectionError):
                while True:
                    writer.write(b"x")
                    await writer.drain()
                    await asyncio.sleep(0)
        writer.close()


async def test_a_body_that_waits_for_leave_gets_it_only_if_it_is_wanted() -> None:
    start = b"POST /take HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: "
    async with served([TAKE]) as svc:
        head, _ = await raw(svc.port, start + b"5000\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 413 ")
        assert b"connection: close" in head  # nobody knows whether the body comes
        reader, writer = await asyncio.open_connection("127.0.0.1", svc.port)
        writer.write(start + b"12\r\n\r\n")
        async with asyncio.timeout(10):
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(b'{"text":"a"}')
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        writer.close()


async def test_a_stream_has_chunks_for_those_that_know_them() -> None:
    async def stream(_call: IncomingCall, _body: object) -> Response:
        async def parts():  # type: ignore[no-untyped-def]
            for part in (b"one", b"", b"two"):
                yield part

        return StreamingResponse(parts(), media_type="text/plain")

    operation = Operation("stream", "GET", "/stream", stream, auth="public", max_body=0)
    async with served([operation]) as svc:
        head, body = await raw(svc.port, b"GET /stream HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert b"transfer-encoding: chunked" in head
        assert body == b"3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n"
        head, body = await raw(svc.port, b"GET /stream HTTP/1.0\r\n\r\n")
        assert b"transfer-encoding" not in head
        assert body == b"onetwo"
        head, body = await raw(svc.port, b"HEAD /stream HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert (head[:13], body) == (b"HTTP/1.1 200 ", b"")


async def test_a_client_that_takes_nothing_does_not_hold_its_answer_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octollm.rpc.http1_server.SEND_SECONDS", 0.2)
    began = asyncio.Event()

    async def stream(_call: IncomingCall, _body: object) -> Response:
        async def parts():  # type: ignore[no-untyped-def]
            while True:
                yield b"x" * 100_000
                began.set()

        return StreamingResponse(parts(), media_type="text/plain")

    operation = Operation("stream", "GET", "/stream", stream, auth="public", max_body=0, limited=False)
    async with served([operation]) as svc:
        _, writer = await asyncio.open_connection("127.0.0.1", svc.port, limit=1000)
        writer.write(b"GET /stream HTTP/1.1\r\nHost: a\r\n\r\n")
        await began.wait()
        await wait_until(lambda: svc.base.metrics.requests.in_flight == 0, description="the stream is given up")
        writer.transport.abort()


async def test_a_client_that_sent_ahead_and_leaves_is_noticed() -> None:
    began, ended = asyncio.Event(), asyncio.Event()

    async def work(_call: IncomingCall, _body: object) -> Text:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        raise AssertionError

    operation = Operation("work", "GET", "/work", work, auth="public", max_body=0)
    async with served([operation]) as svc:
        _, writer = await asyncio.open_connection("127.0.0.1", svc.port)
        writer.write(b"GET /work HTTP/1.1\r\nHost: a\r\n\r\nGET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        await began.wait()
        writer.close()
        await wait_until(ended.is_set, description="the work is cancelled")
