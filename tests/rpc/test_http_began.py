"""Whether a request that failed may have been seen: what decides if a call that must happen once is repeated."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncGenerator
from dataclasses import dataclass

import pytest
from ports import free_port

from octollm.rpc.http1_client import Http1Client
from octollm.rpc.http_client import TransportError


@dataclass
class Peer:
    """A server of the test's. ``breaks`` is what it does with a request instead of answering it."""

    url: str = ""
    breaks: str = ""
    seen: int = 0


@contextlib.asynccontextmanager
async def peer() -> AsyncGenerator[Peer]:
    found = Peer()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(2)
                found.seen += 1
                if found.breaks == "reset":
                    # Closing with a linger of 0 s sends RST instead of FIN.
                    writer.get_extra_info("socket").setsockopt(
                        socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                    )
                if found.breaks:
                    writer.transport.abort() if found.breaks == "reset" else writer.close()
                    return
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
                await writer.drain()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    found.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    async with server:
        yield found


@pytest.mark.parametrize("reused", [True, False], ids=["reused", "fresh"])
@pytest.mark.parametrize("breaks", ["reset", "close"])
async def test_a_request_that_was_sent_may_have_been_seen(breaks: str, reused: bool) -> None:
    async with peer() as server, Http1Client() as http:
        if reused:
            assert (await http.send("POST", server.url, {}, b"hi", seconds=5)).status == 200
        server.breaks, before = breaks, server.seen
        with pytest.raises(TransportError) as caught:
            await http.send("POST", server.url, {}, b"hi", seconds=5)
        assert (caught.value.code, caught.value.request_sent) == ("connection_lost", True)
        # The library underneath does not repeat it in silence either.
        assert server.seen - before == 1


async def test_a_refused_connection_was_surely_not_seen() -> None:
    url = f"http://127.0.0.1:{free_port()}/"
    async with Http1Client() as http:
        with pytest.raises(TransportError) as caught:
            await http.send("POST", url, {}, b"hi", seconds=5)
    assert (caught.value.code, caught.value.request_sent) == ("connect_failed", False)
