"""The HTTP client against a server that says exactly what the test wants, right or wrong."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octollm.errors import OctoError
from octollm.rpc import http1_connection, http_client
from octollm.rpc.http1_client import Http1Client
from octollm.rpc.http_client import MAX_KEEPALIVE, HttpClient, TransportError
from octollm.testing import wait_until

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
Says = Callable[[asyncio.StreamWriter], Awaitable[None]] | bytes


@dataclass
class Peer:
    """A server that answers each request by what ``says`` holds for it, the last for all that follow."""

    says: list[Says]
    url: str = ""
    heads: list[bytes] = field(default_factory=list[bytes])
    connections: int = 0
    open: int = 0

    def next(self) -> Says:
        return self.says.pop(0) if len(self.says) > 1 else self.says[0]


@contextlib.asynccontextmanager
async def peer(*says: Says) -> AsyncGenerator[Peer]:
    found = Peer(list(says))
    serving: set[asyncio.Task[None] | None] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.add(asyncio.current_task())
        found.connections += 1
        found.open += 1
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                while True:
                    head = await reader.readuntil(b"\r\n\r\n")
                    found.heads.append(head)
                    length = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
                    if length:
                        await reader.readexactly(int(length[0].split(b":")[1]))
                    answer = found.next()
                    if isinstance(answer, bytes):
                        writer.write(answer)
                        await writer.drain()
                    else:
                        await answer(writer)
                    if b"close" in head or (isinstance(answer, bytes) and b"HTTP/1.0" in answer):
                        break
        finally:
            found.open -= 1
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    found.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        yield found
        for task in serving:
            if task is not None:
                task.cancel()
        await asyncio.gather(*(task for task in serving if task is not None), return_exceptions=True)


@pytest.fixture
async def http() -> AsyncGenerator[HttpClient]:
    async with Http1Client() as client:
        yield client


def get(client: HttpClient, url: str, method: str = "GET", seconds: float = 5) -> Awaitable[object]:
    return client.send(method, url + "/", {}, None, seconds=seconds)


@pytest.mark.parametrize(
    ("answer", "status", "body"),
    [
        (OK, 200, b"ok"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n", 200, b"abcde"),
        (b"HTTP/1.0 200 OK\r\n\r\nuntil the end", 200, b"until the end"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", 204, b""),
        (b'HTTP/1.1 304 Not Modified\r\netag: "a"\r\n\r\n', 304, b""),
        (b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n" + OK, 200, b"ok"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + OK, 200, b"ok"),
        (b"HTTP/1.1 500 Oh\r\ncontent-length: 0\r\n\r\n", 500, b""),
    ],
)
async def test_an_answer_is_read_however_it_is_delimited(
    http: HttpClient, answer: bytes, status: int, body: bytes
) -> None:
    async with peer(answer) as server:
        found = await http.send("GET", server.url + "/", {}, None, seconds=5)
        assert (found.status, found.body) == (status, body)
        assert "link" not in found.headers


async def test_a_connection_is_used_again_for_as_long_as_both_sides_keep_it(http: HttpClient) -> None:
    async with peer(OK, OK, OK.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"), OK) as server:
        for _ in range(3):
            await get(http, server.url)
        assert server.connections == 1
        await get(http, server.url)
        assert server.connections == 2


async def test_headers_are_sent_as_given_and_read_in_lower_case(http: HttpClient) -> None:
    async with peer(OK.replace(b"\r\n\r\n", b'\r\nX-Odd: a\r\nETag: "b"\r\n\r\n')) as server:
        found = await http.send("POST", server.url + "/a?b=c", {"X-Request-ID": "req-1"}, b"body", seconds=5)
    head = server.heads[0].lower()
    assert head.startswith(b"post /a?b=c http/1.1\r\n")
    assert b"x-request-id: req-1\r\n" in head
    assert b"content-length: 4\r\n" in head
    assert (found.headers["x-odd"], found.headers["etag"]) == ("a", '"b"')


async def test_head_has_no_body_whatever_its_headers_say(http: HttpClient) -> None:
    async with peer(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n", OK) as server:
        found = await http.send("HEAD", server.url + "/", {}, None, seconds=5)
        assert (found.status, found.body, found.headers["content-length"]) == (200, b"", "5")
        assert (await http.send("GET", server.url + "/", {}, None, seconds=5)).body == b"ok"


def _reset(writer: asyncio.StreamWriter) -> None:
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def _broken_off(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf")
    await writer.drain()
    writer.close()


async def _reset_mid_body(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n")
    await writer.drain()
    _reset(writer)


async def _closed(writer: asyncio.StreamWriter) -> None:
    writer.close()


@pytest.mark.parametrize("says", [_broken_off, _reset_mid_body, _closed])
async def test_an_answer_that_is_not_whole_is_a_lost_connection(http: HttpClient, says: Says) -> None:
    async with peer(says) as server:
        with pytest.raises(TransportError) as caught:
            await get(http, server.url)
    assert (caught.value.code, caught.value.request_sent) == ("connection_lost", True)


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"x-pad: " + b"a" * 70_000 + b"\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n",
    ],
)
async def test_what_is_no_http_is_told_as_such(answer: bytes) -> None:
    async with peer(answer) as server, Http1Client() as client:
        with pytest.raises(OctoError) as caught:
            await get(client, server.url)
        assert caught.value.code == "peer_protocol"
        await wait_until(lambda: server.open == 0, description="the connection is closed")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=40) | st.sampled_from([b"HTTP/1.1 200 OK\r\n", b"content-length: 3\r\n", b"\r\n"])))
def test_any_bytes_end_the_call_one_way_or_the_other(pieces: list[bytes]) -> None:
    class Pipe(asyncio.Transport):
        def abort(self) -> None:
            pass

        def write(self, data: bytes | bytearray | memoryview) -> None:
            pass

    async def call() -> None:
        connection = http1_connection.Http1Connection("peer")
        connection.connection_made(Pipe())
        connection.write(b"GET / HTTP/1.1\r\n\r\n", head=False)
        reading = asyncio.create_task(connection.read_body())
        for piece in pieces:
            connection.data_received(piece)
        connection.connection_lost(None)
        with contextlib.suppress(OctoError):
            async with asyncio.timeout(5):
                await reading
        assert not connection.release() or connection.status

    asyncio.run(call())


async def test_bytes_that_nobody_asked_for_are_no_answer_to_the_next_request() -> None:
    async with peer(OK + b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil", OK) as server, Http1Client() as client:
        assert (await client.send("GET", server.url + "/", {}, None, seconds=5)).body == b"ok"
        assert (await client.send("GET", server.url + "/", {}, None, seconds=5)).body == b"ok"
        assert server.connections == 2


async def _read_only(writer: asyncio.StreamWriter) -> None:
    del writer
    await asyncio.sleep(30)


async def _hang(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf")
    await asyncio.sleep(30)


@pytest.mark.parametrize("says", [_read_only, _hang])
async def test_the_deadline_holds_whatever_the_peer_does(http: HttpClient, says: Says) -> None:
    async with peer(says) as server:
        with pytest.raises(OctoError) as caught:
            await get(http, server.url, seconds=0.2)
        assert caught.value.code == "deadline_exceeded"


@pytest.mark.parametrize("says", [_read_only, _hang])
async def test_a_peer_that_falls_silent_is_given_up(monkeypatch: pytest.MonkeyPatch, says: Says) -> None:
    monkeypatch.setattr(http1_connection, "READ_SECONDS", 0.2)
    async with peer(says) as server, Http1Client() as client:
        with pytest.raises(TransportError) as caught:
            await get(client, server.url, seconds=20)
        assert (caught.value.code, caught.value.request_sent) == ("read_timeout", True)


async def test_a_peer_that_takes_no_bytes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http1_connection, "WRITE_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as bound:
        url = f"http://127.0.0.1:{bound.getsockname()[1]}/"
        async with Http1Client() as client:
            with pytest.raises(TransportError) as caught:
                await client.send("POST", url, {}, b"x" * 32_000_000, seconds=20)
    assert caught.value.code == "write_timeout"


async def test_a_cancelled_call_closes_its_connection(http: HttpClient) -> None:
    async with peer(_read_only) as server:
        call = asyncio.ensure_future(get(http, server.url))
        await wait_until(lambda: server.heads, description="the request is there")
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        async with asyncio.timeout(5):
            await get_again(http, server)


async def get_again(client: HttpClient, server: Peer) -> None:
    server.says[:] = [OK]
    await get(client, server.url)
    assert server.connections == 2  # the first was not kept


async def test_a_stream_that_is_left_closes_its_connection() -> None:
    gone = asyncio.Event()

    async def endless(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        try:
            while True:
                writer.write(b"4\r\nmore\r\n")
                await writer.drain()
                await asyncio.sleep(0.01)
        finally:
            gone.set()

    async with peer(endless) as server, Http1Client() as client:
        async with client.stream("GET", server.url + "/", {}, None, seconds=10) as streamed:
            async for chunk in streamed.chunks:
                assert chunk.startswith(b"more")
                break
        async with asyncio.timeout(5):
            await gone.wait()


async def test_a_slow_reader_slows_the_peer() -> None:
    written = 0

    async def much(writer: asyncio.StreamWriter) -> None:
        nonlocal written
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 50000000\r\n\r\n")
        for _ in range(50):
            writer.write(b"x" * 1_000_000)
            await writer.drain()
            written += 1_000_000

    async with (
        peer(much) as server,
        Http1Client() as client,
        client.stream("GET", server.url + "/", {}, None, seconds=30) as streamed,
    ):
        before = -1
        while before != written:  # until the peer makes no headway
            before = written
            await asyncio.sleep(0.2)
        assert written < 40_000_000
        assert sum([len(chunk) async for chunk in streamed.chunks]) == 50_000_000


async def test_a_pool_that_is_exhausted_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "MAX_CONNECTIONS", 2)
    monkeypatch.setattr(http_client, "POOL_SECONDS", 0.2)
    async with peer(_read_only) as server, Http1Client() as client:
        calls = [asyncio.ensure_future(get(client, server.url, seconds=20)) for _ in range(2)]
        await wait_until(lambda: len(server.heads) == 2, description="two calls are under way")
        with pytest.raises(TransportError) as caught:
            await get(client, server.url, seconds=20)
        assert (caught.value.code, caught.value.request_sent) == ("pool_timeout", False)
        # A place that comes free goes to who waits for it, and one who stopped waiting takes none.
        server.says[:] = [OK]
        waiting = asyncio.ensure_future(get(client, server.url, seconds=20))
        leaving = asyncio.ensure_future(get(client, server.url, seconds=20))
        await asyncio.sleep(0)
        leaving.cancel()
        calls[0].cancel()
        assert await waiting
        calls[1].cancel()
        await asyncio.gather(*calls, leaving, return_exceptions=True)
        for _ in range(5):
            await get(client, server.url)


async def test_many_calls_at_once_leave_few_connections() -> None:
    async with peer(OK) as server, Http1Client() as client:
        await asyncio.gather(*(get(client, server.url) for _ in range(60)))
        assert server.connections == 60
        await wait_until(lambda: server.open <= MAX_KEEPALIVE, description="only so many are kept")
        await client.aclose()
        await wait_until(lambda: server.open == 0, description="all are closed")


@pytest.mark.parametrize("value", ["a\r\nX-Evil: 1", "a\nb", "a\0b", "a\rb"])
async def test_a_header_cannot_bring_another(value: str) -> None:
    async with peer(OK) as server, Http1Client() as client:
        with pytest.raises(OctoError) as caught:
            await client.send("GET", server.url + "/", {"X-Odd": value}, None, seconds=5)
        assert caught.value.code == "invalid_header"
        assert not server.heads


@pytest.mark.parametrize("path", ["/a b", "/a\r\nX: 1", "/ü", "/a\tb"])
async def test_a_path_that_is_not_encoded_is_not_sent(path: str) -> None:
    async with peer(OK) as server, Http1Client() as client:
        with pytest.raises(ValueError, match="percent-encoded"):
            await client.send("GET", server.url + path, {}, None, seconds=5)
        assert not server.heads
