"""How services talk: HTTP/1.1 (RFC 9112), in TLS or plain text, with the HTTP client and the uvicorn server for it.

HTTP/2 (RFC 9113) is the business of a proxy in front of them: ``deploy/haproxy.cfg``.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import math
import socket
import ssl
from collections.abc import AsyncGenerator

import msgspec
import uvicorn
from starlette.types import ASGIApp

from octollm.concurrency import wait_for_event
from octollm.errors import OctoError, SettingError
from octollm.rpc.http1_client import Http1Client
from octollm.rpc.http1_server import Http1ServerProtocol
from octollm.rpc.http_client import HttpClient
from octollm.rpc.tls import TlsConfig
from octollm.rpc.websocket_server import WebSocketConnection


class TransportConfig(msgspec.Struct, frozen=True):
    """How services of an installation talk; the same for all of them."""

    tls: TlsConfig | None = None

    @property
    def scheme(self) -> str:
        """Return the URL scheme of their addresses."""
        return "http" if self.tls is None else "https"

    def create_client(self) -> HttpClient:
        """Return a client for calls among them."""
        return Http1Client(None if self.tls is None else self.tls.client_context())

    def server_tls(self) -> ssl.SSLContext | None:
        """Return the TLS context of a server; ``None`` without TLS."""
        return None if self.tls is None else self.tls.server_context()


PLAINTEXT = TransportConfig()


KEEP_ALIVE_SECONDS = 75
"""Longer than a client keeps an idle connection, so that the client closes it: a request on a closed one is lost."""


DATE_SECONDS = 1.0
"""How often the ``Date`` header is refreshed."""
DRAIN_POLL_SECONDS = 0.01


ABORT_SECONDS = 0.5
_ACCEPT_TURNS = 2
"""Turns of the event loop between ``accept`` and ``connection_made``: the transport's creation, then its start."""


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers and its polling.

    The process that hosts services owns the signals. uvicorn looks every 0.1 s whether it should end, and its shutdown
    pauses for as long: services that stop one after the other would take seconds.
    """

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        self.should_exit = True
        self._stopping.set()

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        yield

    async def main_loop(self) -> None:
        while not await self.on_tick(0):
            await wait_for_event(self._stopping, DATE_SECONDS, clear=False)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._finish_accepting()
        for listener in [*self.servers, *(sockets or [])]:
            listener.close()
        state = self.server_state
        for connection in list(state.connections):
            connection.shutdown()
        try:
            async with asyncio.timeout(self.config.timeout_graceful_shutdown):
                while state.connections or state.tasks:  # noqa: ASYNC110 - uvicorn has no event for it
                    await asyncio.sleep(DRAIN_POLL_SECONDS)
        except TimeoutError:
            for task in list(state.tasks):
                task.cancel()
            await self._abort_connections()

    async def _abort_connections(self) -> None:
        """Give cancelled calls a moment for their last bytes, then drop the connections that peers hold open."""
        connections = self.server_state.connections
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ABORT_SECONDS):
                while connections:  # noqa: ASYNC110 - uvicorn has no event for it
                    await asyncio.sleep(DRAIN_POLL_SECONDS)
        for connection in list(connections):
            connection.transport.abort()
        # asyncio closes the socket of an aborted transport in its next turn.
        await asyncio.sleep(0)

    async def _finish_accepting(self) -> None:
        """Take no further connection, and let asyncio attach those that it has accepted.

        asyncio attaches an accepted connection in a later turn of the loop. If the server is closed before that turn,
        the connection is lost without being closed, and its client waits for its own timeout.
        """
        loop = asyncio.get_running_loop()
        for listener in (listener for server in self.servers for listener in server.sockets):
            # The selector's readers. Other event loops attach a connection when they accept it.
            with contextlib.suppress(RuntimeError, NotImplementedError):
                loop.remove_reader(listener.fileno())
        for _ in range(_ACCEPT_TURNS):
            await asyncio.sleep(0)


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
            f" (`ss -ltnp 'sport = :{port}'` names it), or set OCTOLLM_PORT_OFFSET=100 to use other ports.",
            code="port_taken",
        ) from error
    bound.setblocking(False)
    return bound


@contextlib.asynccontextmanager
async def serve_app(
    app: ASGIApp, bound: socket.socket, *, shutdown_grace: float = 2.0, transport: TransportConfig = PLAINTEXT
) -> AsyncGenerator[None]:
    """Serve ``app`` on a bound socket for as long as the context is open; leaving drains and closes it.

    Draining takes no new connection and gives requests in flight ``shutdown_grace`` seconds to end, then cancels them.
    Raises ``unavailable`` if the server does not start in 10 s, and ``setting_invalid`` for unusable TLS files.
    """
    tls = transport.server_tls()
    config = uvicorn.Config(
        app,
        http=Http1ServerProtocol,
        ssl_context_factory=None if tls is None else lambda _config, _default: tls,
        ws=WebSocketConnection,
        ws_per_message_deflate=False,
        ws_max_size=64 * 1024,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=True,
        # The gateway decides by the peer's real address who is local, so no header may replace it.
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
        server.stop()
        try:
            async with asyncio.timeout(math.ceil(shutdown_grace) + 1):
                await asyncio.shield(running)
        except TimeoutError:
            server.force_exit = True
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running
        bound.close()
