"""One request of an HTTP/1.1 connection and its response.

An exchange is an ASGI receive and send pair, and the whole-request extension.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, MutableMapping, Sequence
from http import HTTPStatus
from typing import Any, Protocol

import msgspec
from starlette.types import ASGIApp, Scope

from octollm.contracts.problems import to_problem
from octollm.errors import OctoError
from octollm.rpc.http1_parser import Headers, RequestHead
from octollm.telemetry import get_logger

MAX_DISCARDED_BYTES = 16 * 1024 * 1024
"""How much of a body is taken after its request was answered: many clients read the response only then."""

STATUS_LINES = {
    status: f"HTTP/1.1 {status} {HTTPStatus(status).phrase if status in set(HTTPStatus) else ''}\r\n".encode()
    for status in range(100, 600)
}
_HEADER_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")


class Http1Transport(Protocol):
    """What an exchange needs of its connection."""

    @property
    def default_headers(self) -> Headers:
        """Return the headers of every response."""
        ...

    @property
    def is_writable(self) -> bool:
        """Say whether the client has room for more of a response."""
        ...

    @property
    def is_shutting_down(self) -> bool:
        """Say whether the connection takes no further request."""
        ...

    @property
    def body_remaining(self) -> int:
        """Return how many bytes of the body are known to be still to come."""
        ...

    def write(self, data: bytes) -> None:
        """Send bytes."""
        ...

    async def drain(self) -> None:
        """Wait until the client has room for more."""
        ...

    def resume_reading(self) -> None:
        """Read the connection again."""
        ...

    def complete(self, exchange: Http1Exchange) -> None:
        """Go on after the last byte of a response."""
        ...

    def abort(self) -> None:
        """Close the connection at once: what was sent cannot become a whole response."""
        ...


def problem_parts(error: OctoError) -> tuple[int, Headers, bytes]:
    """Return status, headers and body of the response to a request that reaches no application."""
    problem = to_problem(error)
    body = msgspec.json.encode(problem)
    headers = [(b"content-type", b"application/problem+json"), (b"content-length", str(len(body)).encode())]
    return problem.status, headers, body


class Http1Exchange:
    """A request and its response: an ASGI receive and send pair, and the whole-request extension."""

    __slots__ = (
        "_body",
        "_body_delivered",
        "_changed",
        "_chunked",
        "_connection",
        "_disconnect_callback",
        "_expects_continue",
        "_length_left",
        "_method",
        "_version",
        "disconnected",
        "ended",
        "finished",
        "keep_alive",
        "started",
    )  # fmt: skip

    def __init__(self, connection: Http1Transport, head: RequestHead) -> None:
        self._connection = connection
        self._method = head.method
        self._version = head.version
        self._expects_continue = head.expects_continue
        self._body = b""
        self._body_delivered = False
        self._changed: asyncio.Event | None = None
        self._chunked = False
        self._length_left: int | None = None
        """What ``Content-Length`` of the response leaves to be sent."""
        self._disconnect_callback: Callable[[], None] | None = None
        self.keep_alive = head.keep_alive
        self.ended = False
        """All of the request is here."""
        self.started = False
        self.finished = False
        """All of the response is sent."""
        self.disconnected = False

    @property
    def waiting(self) -> int:
        """Return how many bytes of the body wait for the application."""
        return len(self._body)

    # Called by the connection.

    def feed(self, data: bytes) -> None:
        """Take a piece of the body."""
        self._body = self._body + data if self._body else data
        self._wake()

    def end(self) -> None:
        """Note that the request is whole."""
        self.ended = True
        self._wake()

    def disconnect(self) -> None:
        """Note that the client is gone, and say so to whoever works for it."""
        if self.finished or self.disconnected:
            return
        self.disconnected = True
        self._wake()
        if self._disconnect_callback is not None:
            self._disconnect_callback()

    async def run(self, app: ASGIApp, scope: Scope) -> None:
        """Serve the request."""
        try:
            await app(scope, self.receive, self.send)
            if not self.finished and not self.disconnected:
                raise RuntimeError("The application returned before its response was whole.")
        except asyncio.CancelledError:
            self._connection.abort()
            raise
        except Exception as error:
            get_logger("http").error("http.failed", error=error)
            if self.started:
                self._connection.abort()
            else:
                self.keep_alive = False
                status, headers, body = problem_parts(OctoError("The service failed; its log has the reason."))
                self._send_head(status, headers)
                self._send_body(body, more=False)
        finally:
            self._disconnect_callback = None

    # The whole-request extension.

    def whole_body(self) -> bytes | None:
        """Return the body if all of it is here."""
        return self._take() if self.ended else None

    def respond(self, status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> bool:
        """Send head and body in one write."""
        connection = self._connection
        if self.started or not connection.is_writable or self.disconnected or self._method == "HEAD":
            return False
        self._settle_keep_alive()
        parts = [STATUS_LINES[status]]
        for name, value in (*connection.default_headers, *headers):
            parts += (name, b": ", value, b"\r\n")
        if not self.keep_alive:
            parts += (b"connection", b": ", b"close", b"\r\n")
        parts.append(b"\r\n")
        head = b"".join(parts)
        # One line break for each line; any other would begin a header or a response (response splitting).
        lines = (len(parts) + 6) // 4
        if head.count(b"\n") != lines or head.count(b"\r") != lines or b"\0" in head:
            raise ValueError("A header of the answer has a line break.")
        self.started = True
        connection.write(head + body)
        self._finish()
        return True

    def set_disconnect_callback(self, callback: Callable[[], None] | None) -> None:
        """Have ``callback`` called once the connection is lost."""
        self._disconnect_callback = callback
        if self.disconnected and callback is not None:
            callback()

    # ASGI.

    async def receive(self) -> dict[str, Any]:
        """Return the next part of the body, then that the client is gone or has its response."""
        # Only now does the application ask for the body: a refusal before this spares the client the upload.
        if self._expects_continue and not self.ended and not self.started and not self.disconnected:
            self._expects_continue = False
            self._connection.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        while not (self.disconnected or self.finished):
            if not self._body_delivered and (self._body or self.ended):
                self._body_delivered = self.ended
                return {"type": "http.request", "body": self._take(), "more_body": not self.ended}
            if self._changed is None:
                self._changed = asyncio.Event()
            self._changed.clear()
            await self._changed.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """Send the head or a part of the body of the response."""
        await self._connection.drain()
        if self.disconnected:
            await asyncio.sleep(0)  # a stream without end has to let its cancellation through
            return
        if self.finished:
            raise RuntimeError("The response is whole already.")
        kind = message["type"]
        if kind != ("http.response.body" if self.started else "http.response.start"):
            raise RuntimeError(f"The application sent {kind} out of turn.")
        if kind == "http.response.start":
            self._send_head(message["status"], message.get("headers", ()))
        else:
            self._send_body(message.get("body", b""), more=message.get("more_body", False))

    def _send_head(self, status: int, headers: Sequence[tuple[bytes, bytes]]) -> None:
        self._settle_keep_alive()
        parts = [STATUS_LINES[status]]
        for name, value in (*self._connection.default_headers, *headers):
            if _HEADER_NAME.fullmatch(name) is None or _HEADER_VALUE.fullmatch(value) is None:
                raise ValueError(f"The header {name!r} of the response is not valid.")
            lower = name.lower()
            if lower == b"connection":
                self.keep_alive &= b"close" not in value.lower()
            elif lower == b"content-length":
                self._length_left = int(value)
            if lower not in (b"connection", b"transfer-encoding"):  # the framing is decided here
                parts += (lower, b": ", value, b"\r\n")
        if self._method == "HEAD" or status in (204, 304):
            self._length_left = 0
        elif self._length_left is None:
            # HTTP/1.0 knows no chunks (RFC 9112 section 7.1): there the end of the connection ends the body.
            self._chunked = self._version == "1.1"
            self.keep_alive &= self._chunked
        if self._chunked:
            parts.append(b"transfer-encoding: chunked\r\n")
        if not self.keep_alive:
            parts.append(b"connection: close\r\n")
        parts.append(b"\r\n")
        self.started = True
        self._connection.write(b"".join(parts))

    def _send_body(self, body: bytes, *, more: bool) -> None:
        bare = self._length_left == 0 and not self._chunked
        if bare and self._method != "HEAD" and body:
            raise RuntimeError("The response has more bytes than its Content-Length.")
        if self._chunked:
            data = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
            self._connection.write(data if more else data + b"0\r\n\r\n")
        elif body and not bare:
            if self._length_left is not None:
                self._length_left -= len(body)
                if self._length_left < 0:
                    raise RuntimeError("The response has more bytes than its Content-Length.")
            self._connection.write(bytes(body))
        if not more:
            if self._length_left:
                raise RuntimeError("The response has fewer bytes than its Content-Length.")
            self._finish()

    def _settle_keep_alive(self) -> None:
        """Decide, before the head is sent, whether another request can follow on this connection."""
        if self._connection.is_shutting_down:
            self.keep_alive = False
        elif not self.ended and self.keep_alive:
            # A client that waits for `100 Continue` may send the body or not: what it sends next is then in doubt.
            self.keep_alive = not self._expects_continue and self._connection.body_remaining <= MAX_DISCARDED_BYTES

    def _finish(self) -> None:
        self.finished = True
        self._body = b""
        self._wake()
        self._connection.complete(self)

    def _take(self) -> bytes:
        body, self._body = self._body, b""
        self._connection.resume_reading()
        return body

    def _wake(self) -> None:
        if self._changed is not None:
            self._changed.set()
