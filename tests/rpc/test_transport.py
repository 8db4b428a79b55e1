"""Starting and stopping the server of a service."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket

import pytest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from octollm.rpc.transport import listen, serve_app


@pytest.mark.parametrize("turns", range(6))
def test_a_connection_that_comes_while_the_server_stops_is_closed(turns: int) -> None:
    async def connect_and_stop() -> None:
        bound = listen("127.0.0.1", 0, "coder")
        address = bound.getsockname()
        async with serve_app(Response(), bound):
            # The kernel takes the connection at once; the loop accepts it and attaches it in one turn each.
            connection = socket.create_connection(address, timeout=5)
            for _ in range(turns):
                await asyncio.sleep(0)
        with contextlib.closing(connection):
            connection.settimeout(5)
            with contextlib.suppress(ConnectionResetError):
                assert await asyncio.to_thread(connection.recv, 1) == b""

    # A collection would close a connection that was lost, at some later time.
    gc.disable()
    try:
        # asyncio's own loop: its selector accepts a connection before it attaches it to the server.
        asyncio.run(connect_and_stop())
    finally:
        gc.enable()


def test_a_connection_that_its_peer_holds_open_is_dropped_after_the_grace() -> None:
    served, released = asyncio.Event(), asyncio.Event()

    async def slow(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        served.set()
        try:
            await asyncio.Event().wait()
        finally:
            await released.wait()

    async def hold() -> None:
        bound = listen("127.0.0.1", 0, "coder")
        address = bound.getsockname()
        async with serve_app(slow, bound, shutdown_grace=0.1):
            connection = socket.create_connection(address, timeout=5)
            connection.sendall(b"GET / HTTP/1.1\r\nHost: coder\r\n\r\n")
            await served.wait()
        with contextlib.closing(connection):
            connection.settimeout(5)
            with contextlib.suppress(ConnectionResetError):
                while await asyncio.to_thread(connection.recv, 1 << 20):
                    pass
        released.set()

    asyncio.run(hold())
