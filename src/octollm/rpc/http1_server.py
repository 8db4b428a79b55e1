"""The HTTP/1.1 server protocol of a connection, and ASGI for each of its requests.

It is a protocol class for ``uvicorn.Config(http=...)``: uvicorn accepts connections and drains, and serves what is
upgraded to WebSocket. Requests are parsed by :mod:`octollm.rpc.http1_parser`; here are time limits, flow control,
responses in one write, and the way to close a connection so that the client still reads its response.
"""

from __future__ import annotations

import asyncio
from typing import Any, Protocol, cast
from urllib.parse import unquote

import httptools
from starlette.types import ASGIApp, Scope

from octollm.errors import OctoError
from octollm.rpc.asgi_extension import EXTENSION, TRANSPORT
from octollm.rpc.http1_exchange import MAX_DISCARDED_BYTES, STATUS_LINES, Http1Exchange, problem_parts
from octollm.rpc.http1_parser import END, Headers, Http1Parser, RequestHead

HEADER_SECONDS = 10.0
"""How long the head of a request may take to arrive, and a new connection to begin one."""
SEND_SECONDS = 60.0
"""How long a client may leave no room for the next bytes of a response before its connection is closed."""
MAX_DISCARD_SECONDS = 10.0
"""How long the rest of a body is taken after its request was answered."""
_HIGH_WATER = 64 * 1024
"""Bytes that wait for the application before the connection is no longer read."""


class ServerConfig(Protocol):
    """What this protocol reads of a ``uvicorn.Config``."""

    loaded_app: Any
    timeout_keep_alive: int
    ws_protocol_class: Any


class ServerState(Protocol):
    """What all connections of one uvicorn server share."""

    connections: set[Any]
    """Those that are asked to shut down, and waited for."""
    tasks: set[asyncio.Task[None]]
    total_requests: int
    default_headers: Headers


def _connection_scope(transport: asyncio.BaseTransport) -> dict[str, Any]:
    """Return what the ASGI scopes of all requests of a connection have in common."""

    def address(name: str) -> tuple[str, int] | None:
        value = transport.get_extra_info(name)  # of IPv6 it has four parts
        return (str(value[0]), int(value[1])) if value else None

    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "server": address("sockname"),
        "client": address("peername"),
        "scheme": "http" if transport.get_extra_info("sslcontext") is None else "https",
        "root_path": "",
    }


class Http1ServerProtocol(asyncio.Protocol):
    """One connection; its requests are served one after the other."""

    def __init__(
        self,
        config: ServerConfig,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self._config = config
        self._app = cast("ASGIApp", config.loaded_app)
        self._app_state = app_state
        self._state = server_state
        self._loop = _loop or asyncio.get_running_loop()
        self._parser = Http1Parser()
        self.transport: asyncio.Transport | None = None
        self._scope: dict[str, Any] = {}
        self._exchange: Http1Exchange | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._deadline: float | None = None
        self._discarded = 0
        self._awaits_head = True
        """The time limit of a head runs."""
        self._is_refusing = False
        """What else comes is not parsed."""
        self._is_shutting_down = False
        self._reading_paused = False
        self._writable: asyncio.Event | None = None
        """Made when the client first leaves no room."""

    # Called by the transport and the server.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the clock: a connection that never sends a head is closed."""
        self.transport = cast("asyncio.Transport", transport)
        self._state.connections.add(self)
        self._scope = _connection_scope(transport)
        self._set_deadline(HEADER_SECONDS)

    def data_received(self, data: bytes) -> None:
        """Parse bytes, and serve the request that they begin or complete."""
        if self._is_refusing:
            self._discard(len(data))
            return
        self._parser.receive_data(data)
        self._advance()
        exchange = self._exchange
        # A body that is not whole waits for the application, a request that was sent ahead for the one before it.
        # A whole body holds nothing up: the end of the connection has to be seen while its request is served.
        waiting = self._parser.buffered if exchange is None or exchange.ended else exchange.waiting
        if waiting > _HIGH_WATER and self.transport is not None and not self._reading_paused:
            self._reading_paused = True
            self.transport.pause_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the request that is being served."""
        del exc
        self._state.connections.discard(self)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._exchange is not None:
            self._exchange.disconnect()
        self.resume_writing()

    def pause_writing(self) -> None:
        """Have responses wait: the client does not read them."""
        if self._writable is None:
            self._writable = asyncio.Event()
        self._writable.clear()

    def resume_writing(self) -> None:
        """Let responses go on."""
        if self._writable is not None:
            self._writable.set()

    def shutdown(self) -> None:
        """Close the connection once the request that is being served has its response."""
        self._is_shutting_down = True
        if self._exchange is None or self._exchange.finished:
            self._close()

    # Requests.

    def _advance(self) -> None:
        """Take events until the parser needs more bytes, or the request at hand its response."""
        try:
            while (event := self._parser.next_event()) is not None:
                exchange = self._exchange
                if isinstance(event, RequestHead):
                    self._awaits_head = False
                    if event.upgrades_to_websocket and self._config.ws_protocol_class is not None:
                        self._upgrade(event)
                        return
                    self._serve(event)
                elif exchange is None:
                    return  # it was closed meanwhile
                elif event is END:
                    exchange.end()
                    if exchange.finished:
                        self._finish_request(exchange)
                elif exchange.finished:
                    self._discard(len(event))
                else:
                    exchange.feed(event)
        except OctoError as error:
            self._refuse(error)
            return
        if self._exchange is None and self._parser.buffered and not (self._awaits_head or self._is_refusing):
            # The first bytes of a head end the keep-alive time: from here on the time limit of a head counts.
            self._awaits_head = True
            self._set_deadline(HEADER_SECONDS)

    def _serve(self, head: RequestHead) -> None:
        self._deadline = None  # the operation has its own time limits, for the body too
        path, _, query = head.target.partition(b"?")
        if path.startswith(b"/"):
            path, query = path.partition(b"#")[0], query.partition(b"#")[0]
        else:  # RFC 9112 section 3.2: with a scheme and a host; or a host alone, or *, which no application serves
            try:
                url = httptools.parse_url(head.target)
                path, query = url.path or b"/", url.query or b""
            except httptools.HttpParserInvalidURLError:
                query = b""
        text = path.decode("ascii")
        exchange = self._exchange = Http1Exchange(self, head)
        scope: Scope = {
            **self._scope,
            "http_version": head.version,
            "method": head.method,
            "path": unquote(text) if "%" in text else text,
            "raw_path": path,
            "query_string": query,
            "headers": head.headers,
            "state": self._app_state.copy(),
            "extensions": {EXTENSION: exchange, TRANSPORT: self.transport},
        }
        task = self._loop.create_task(exchange.run(self._app, scope))
        self._state.tasks.add(task)
        task.add_done_callback(self._state.tasks.discard)

    def _upgrade(self, head: RequestHead) -> None:
        """Hand the connection to uvicorn's WebSocket protocol, which reads the head again."""
        transport = self.transport
        assert transport is not None
        # The WebSocket protocol registers itself for the shutdown.
        self._state.connections.discard(self)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        fields = b"".join([name + b": " + value + b"\r\n" for name, value in head.headers])
        protocol = self._config.ws_protocol_class(
            config=self._config, server_state=self._state, app_state=self._app_state
        )
        protocol.connection_made(transport)
        protocol.data_received(b"GET " + head.target + b" HTTP/1.1\r\n" + fields + b"\r\n" + self._parser.take_rest())
        transport.set_protocol(protocol)

    def _finish_request(self, exchange: Http1Exchange) -> None:
        """Go on to the next request, after the last byte of a request and of its response."""
        self._exchange = None
        self._state.total_requests += 1
        if self._is_shutting_down or not exchange.keep_alive:
            self._close()
            return
        self._discarded = 0
        self._parser.start_next()
        self._set_deadline(self._config.timeout_keep_alive)

    # Called by the exchange.

    @property
    def default_headers(self) -> Headers:
        """Return the headers of every response."""
        return self._state.default_headers

    @property
    def is_writable(self) -> bool:
        """Say whether the client has room for more of a response."""
        return self._writable is None or self._writable.is_set()

    @property
    def is_shutting_down(self) -> bool:
        """Say whether the connection takes no further request."""
        return self._is_shutting_down

    @property
    def body_remaining(self) -> int:
        """Return how many bytes of the body are known to be still to come."""
        return self._parser.remaining

    def write(self, data: bytes) -> None:
        """Send bytes."""
        if self.transport is not None:
            self.transport.write(data)

    async def drain(self) -> None:
        """Wait until the client has room for more; close a connection whose client takes nothing."""
        if self._writable is None:
            return
        try:
            async with asyncio.timeout(SEND_SECONDS):
                await self._writable.wait()
        except TimeoutError:
            self.abort()
            await self._writable.wait()  # until the connection is lost

    def resume_reading(self) -> None:
        """Read the connection again."""
        if self._reading_paused and self.transport is not None:
            self._reading_paused = False
            self.transport.resume_reading()

    def complete(self, exchange: Http1Exchange) -> None:
        """Go on after the last byte of a response."""
        if exchange.ended:
            self._finish_request(exchange)
            if not self._is_refusing:
                self._advance()
        else:
            self._linger(half_close=not exchange.keep_alive)
        self.resume_reading()

    def abort(self) -> None:
        """Close the connection at once: what was sent cannot become a whole response."""
        if self.transport is not None:
            self.transport.abort()

    # Closing.

    def _refuse(self, error: OctoError) -> None:
        """Answer a request that cannot be served, and take no other on this connection."""
        exchange, self._exchange = self._exchange, None
        self._is_refusing = True
        if exchange is not None:  # its body turned out to be wrong
            exchange.disconnect()
            # A second response would be read as a part of the body of the first.
            if exchange.started:
                self._close()
                return
        status, headers, body = problem_parts(error)
        fields = b"".join([name + b": " + value + b"\r\n" for name, value in (*self._state.default_headers, *headers)])
        self.write(STATUS_LINES[status] + fields + b"connection: close\r\n\r\n" + body)
        self._linger(half_close=True)
        self.resume_reading()

    def _linger(self, *, half_close: bool) -> None:
        """Take, within bounds, what the client still sends (RFC 9112 section 9.6).

        A socket that is closed with unread bytes resets the connection, and a client that sends all of its request
        before it reads would lose the response.
        """
        transport = self.transport
        if transport is None or transport.is_closing():
            return
        self._set_deadline(MAX_DISCARD_SECONDS)
        if half_close and transport.can_write_eof():
            transport.write_eof()

    def _discard(self, size: int) -> None:
        self._discarded += size
        if self._discarded > MAX_DISCARDED_BYTES:
            self._close()

    def _close(self) -> None:
        self._exchange = None
        self._is_refusing = True
        if self.transport is not None and not self.transport.is_closing():
            self.transport.close()

    def _set_deadline(self, seconds: float) -> None:
        """Have the connection end after ``seconds`` of what it waits for now.

        A timer that rings too early is wound up again, so that a request costs none.
        """
        self._deadline = deadline = self._loop.time() + seconds
        if self._timer is None or self._timer.when() > deadline:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_at(deadline, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        if self._deadline is None:
            return
        if self._deadline > self._loop.time():
            self._timer = self._loop.call_at(self._deadline, self._on_timer)
        # A client that has begun a head waits for an answer; an idle connection is closed without one.
        elif self._exchange is None and self._parser.buffered and not self._is_refusing:
            self._refuse(OctoError(f"The headers did not arrive in {HEADER_SECONDS:g} s.", code="request_timeout"))
        else:
            self._close()
