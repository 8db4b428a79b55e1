"""uvicorn's HTTP/1.1 protocol with bounds on header bytes, URL length and header time, and responses in one write."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, cast
from urllib.parse import unquote

import httptools
import msgspec
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from octollm.contracts.problems import to_problem
from octollm.errors import OctoError
from octollm.rpc.asgi_extension import EXTENSION

MAX_HEADER_BYTES = 32 * 1024
MAX_URL_BYTES = 8 * 1024
"""Bytes of path and query. RFC 9110 section 4.1 asks for 8000 at least."""
HEADER_SECONDS = 10.0


class _Cycle(RequestResponseCycle):
    """One request and its answer: uvicorn's, and an :class:`octollm.rpc.asgi_extension.Exchange`."""

    protocol: Http1ServerProtocol

    def whole_body(self) -> bytes | None:
        """Return the body if all of it is here."""
        if self.more_body or self.waiting_for_100_continue:
            return None
        return bytes(self.body)

    def respond(self, status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> bool:
        """Send head and body in one write."""
        if self.response_started or self.flow.write_paused or self.disconnected or self.scope["method"] == "HEAD":
            return False
        parts = [STATUS_LINE[status]]
        for name, value in (*self.default_headers, *headers):
            parts += (name, b": ", value, b"\r\n")
        if not self.keep_alive:
            parts += (b"connection", b": ", b"close", b"\r\n")
        parts.append(b"\r\n")
        head = b"".join(parts)
        lines = (len(parts) + 6) // 4
        if head.count(b"\n") != lines or head.count(b"\r") != lines or b"\0" in head:
            raise ValueError("A header of the answer has a line break.")
        self.response_started = self.response_complete = True
        self.transport.write(head + body)
        self.message_event.set()
        if not self.keep_alive:
            self.transport.close()
        self.on_response()
        return True

    def set_disconnect_callback(self, callback: Callable[[], None] | None) -> None:
        """Have ``callback`` called once the connection is lost."""
        self.protocol.set_disconnect_callback(callback)


class Http1ServerProtocol(HttpToolsProtocol):
    """Refuses headers over 32 KiB (431), URLs over 8 KiB (414), and headers that take over 10 s (408)."""

    _disconnect_callback: Callable[[], None] | None = None
    _is_lost = False

    _header_bytes = 0
    _header_timer: asyncio.TimerHandle | None = None
    _in_headers = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock: an idle connection that never sends headers is closed too."""
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock, and tell whoever works for this caller."""
        self._stop_timer()
        super().connection_lost(exc)
        self._is_lost = True
        if self._disconnect_callback is not None:
            self._disconnect_callback()

    def data_received(self, data: bytes) -> None:
        """Count the bytes of headers before the parser keeps them."""
        if self._in_headers or self._header_timer is not None:
            self._header_bytes += len(data)
        super().data_received(data)
        if not self._in_headers:
            return
        if self._header_bytes > MAX_HEADER_BYTES:
            self._refuse_headers()
        elif self._header_timer is None:
            self._start_timer()

    def on_message_begin(self) -> None:
        """Begin to count."""
        super().on_message_begin()
        self._in_headers = True
        if self._header_timer is None:
            self._header_bytes = 0

    def on_headers_complete(self) -> None:
        """Stop counting, since what follows is the body, which the endpoint bounds; and have the request served."""
        self._in_headers = False
        self._header_bytes = 0
        self._stop_timer()
        if self.transport.is_closing():
            return
        if sum([len(name) + len(value) + 4 for name, value in self.headers]) > MAX_HEADER_BYTES:
            self._refuse_headers()  # they came in one piece
            return
        if len(self.url) > MAX_URL_BYTES:
            self._refuse("url_too_long", f"The URL may have at most {MAX_URL_BYTES} bytes.")
            return
        parser: Any = self.parser
        scope: Any = self.scope
        app: Any = cast("Any", self.app)  # pyright: ignore[reportUnknownMemberType]
        before = self.cycle
        version = parser.get_http_version()
        scope["method"] = parser.get_method().decode("ascii")
        scope["http_version"] = version
        if parser.should_upgrade() and self._should_upgrade():
            return
        url = httptools.parse_url(self.url)
        path = url.path.decode("ascii")
        scope["path"] = unquote(path) if "%" in path else path
        scope["raw_path"] = url.path
        scope["query_string"] = url.query or b""
        cycle = _Cycle(
            scope=scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=False,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=self.expect_100_continue,
            keep_alive=version != "1.0" and parser.should_keep_alive(),
            on_response=self.on_response_complete,
        )
        cycle.protocol = self
        scope["extensions"] = {EXTENSION: cycle}
        self.cycle = cycle
        if not before or before.response_complete:
            self._start_asgi_task(cycle, app)
        else:
            # It came before the one before it was answered (RFC 9112 section 9.3.2).
            self.flow.pause_reading()
            self.pipeline.appendleft((cycle, app))

    def set_disconnect_callback(self, callback: Callable[[], None] | None) -> None:
        """Have ``callback`` called once the connection is lost."""
        # Requests of one connection are served one after the other: there is one to tell at most.
        self._disconnect_callback = callback
        if self._is_lost and callback is not None:
            callback()

    def on_body(self, body: bytes) -> None:
        """Ignore the body of a refused request."""
        if not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Ignore the end of a refused request."""
        if not self.transport.is_closing():
            super().on_message_complete()

    def _start_timer(self) -> None:
        self._stop_timer()
        self._header_timer = self.loop.call_later(HEADER_SECONDS, self._on_header_timeout)

    def _stop_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _on_header_timeout(self) -> None:
        self._header_timer = None
        if self._in_headers:
            self._refuse("request_timeout", f"The headers did not arrive in {HEADER_SECONDS:g} s.")
        elif not self.transport.is_closing():
            self.transport.close()  # nothing was asked

    def _refuse_headers(self) -> None:
        self._refuse("header_too_large", f"The headers may have at most {MAX_HEADER_BYTES} bytes.")

    def _refuse(self, code: str, detail: str) -> None:
        """Answer a request that is not served, and close the connection."""
        self._in_headers = False
        if self.transport.is_closing():
            return
        problem = to_problem(OctoError(detail, code=code))
        body = msgspec.json.encode(problem)
        head = b"content-type: application/problem+json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[problem.status] + head + body)
        self.transport.close()
