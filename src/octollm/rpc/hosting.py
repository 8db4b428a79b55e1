"""Serving ASGI applications on sockets: one small file hides which server does it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import math
import socket
from collections.abc import AsyncGenerator

import uvicorn
from starlette.types import ASGIApp

from octollm.errors import OctoError, SettingError
from octollm.rpc.negotiation import NegotiatingProtocol
from octollm.rpc.protocol import Http1ServerProtocol
from octollm.rpc.wire import PLAINTEXT, TransportConfig

KEEP_ALIVE_SECONDS = 75
"""Longer than a client keeps an idle connection, so that it is the client who closes it."""


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: the process that hosts services owns the signals."""

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        yield


def listen(host: str, port: int, service: str) -> socket.socket:
    """Bind a socket for ``service``; raise ``port_taken`` or ``setting_invalid`` with what to do."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Connections take it from here. Without it an answer whose head and body are written apart waits for the peer's
    # delayed acknowledgement, 40 ms, on every connection that is used again.
    bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        bound.bind((host, port))
        bound.listen(1024)
    except OSError as error:
        bound.close()
        if error.errno != errno.EADDRINUSE:
            raise SettingError(
                f"{service} cannot listen on {host}, port {port} ({error.strerror}). OCTOLLM_HOST must be an address of"
                " this machine, and ports below 1024 need privileges."
            ) from error
        raise OctoError(
            f"Port {port} of {host}, which {service} needs, is taken ({error.strerror}). Stop what listens there"
            f" (`ss -ltnp 'sport = :{port}'` names it), or set OCTOLLM_PORT_SHIFT=100 to use other ports.",
            code="port_taken",
        ) from error
    bound.setblocking(False)
    return bound


@contextlib.asynccontextmanager
async def serve_app(
    app: ASGIApp, bound: socket.socket, *, shutdown_grace: float = 2.0, transport: TransportConfig = PLAINTEXT
) -> AsyncGenerator[None]:
    """Serve ``app`` on a bound socket for as long as the context is open; leaving drains and closes it.

    Draining takes no new connection and gives requests in flight ``drain`` seconds to end, then cancels them.
    ``wire`` is how it talks; HTTP/1.1 is understood in any case. Raises ``unavailable`` when the server does not start
    in 10 s, and ``setting_invalid`` for the files of TLS.
    """
    tls = transport.server_tls()
    config = uvicorn.Config(
        app,
        http=NegotiatingProtocol if transport.http_version == "2" else Http1ServerProtocol,
        ssl_context_factory=None if tls is None else lambda _config, _default: tls,
        ws="websockets-sansio",
        ws_per_message_deflate=False,
        ws_max_size=64 * 1024,
        ws_ping_interval=20.0,
        ws_ping_timeout=20.0,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=True,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=math.ceil(shutdown_grace),
    )
    server = _Server(config)
    running = asyncio.create_task(server.serve(sockets=[bound]))
    try:
        async with asyncio.timeout(10):
            while not server.started:
                if running.done():
                    running.result()
                    raise OctoError("The HTTP server stopped at its start.", code="unavailable")
                await asyncio.sleep(0.005)
        yield
    finally:
        server.should_exit = True
        try:
            async with asyncio.timeout(math.ceil(shutdown_grace) + 1):
                await asyncio.shield(running)
        except TimeoutError:
            server.force_exit = True
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running
        bound.close()
