"""uvicorn's HTTP protocol with bounds on the bytes of the headers and the time to send them."""

from __future__ import annotations

import asyncio

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from octollm.contracts.problems import problem_of
from octollm.errors import OctoError

MAX_HEADER_BYTES = 32 * 1024
HEADER_SECONDS = 10.0


class BoundedProtocol(HttpToolsProtocol):
    """Refuses headers over 32 KiB with 431, and closes connections whose headers take over 10 s."""

    _header_bytes = 0
    _header_timer: asyncio.TimerHandle | None = None
    _in_headers = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock: an idle connection that never sends headers is closed too."""
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count the bytes of headers before the parser keeps them."""
        if self._in_headers or self._header_timer is not None:
            self._header_bytes += len(data)
        super().data_received(data)
        if self._in_headers and self._header_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
            self._refuse()

    def on_message_begin(self) -> None:
        """Begin to count."""
        super().on_message_begin()
        self._in_headers = True
        if self._header_timer is None:
            self._header_bytes = 0
            self._start_timer()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Refuse a single large block of headers that came in one piece."""
        super().on_header(name, value)
        if sum(len(n) + len(v) + 4 for n, v in self.headers) > MAX_HEADER_BYTES:
            self._refuse()

    def on_headers_complete(self) -> None:
        """Stop counting: what follows is the body, which the endpoint bounds."""
        self._in_headers = False
        self._header_bytes = 0
        self._stop_timer()
        if not self.transport.is_closing():
            super().on_headers_complete()

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
        self._header_timer = self.loop.call_later(HEADER_SECONDS, self._give_up)

    def _stop_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _give_up(self) -> None:
        self._header_timer = None
        if not self.transport.is_closing():
            self.transport.close()

    def _refuse(self) -> None:
        self._in_headers = False
        if self.transport.is_closing():
            return
        error = OctoError(f"The headers may have at most {MAX_HEADER_BYTES} bytes.", code="header_too_large")
        body = msgspec.json.encode(problem_of(error))
        self.transport.write(
            b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/problem+json\r\n"
            b"connection: close\r\ncontent-length: " + str(len(body)).encode() + b"\r\n\r\n" + body
        )
        self.transport.close()
