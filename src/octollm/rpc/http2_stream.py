"""One request of an HTTP/2 connection and its response.

A stream is an ASGI receive and send pair, and the whole-request extension.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, Protocol

from starlette.types import ASGIApp, Scope

from octollm.rpc.http1_parser import Headers
from octollm.telemetry import get_logger

_CONNECTION_HEADERS = frozenset((b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"))
"""Headers that HTTP/2 has no use for and forbids (RFC 9113 section 8.2.2)."""
SEND_SECONDS = 60.0
"""How long a peer may leave no room for the next bytes of an answer before its request is ended."""


class Http2Connection(Protocol):
    """What a stream asks of its connection."""

    def send_head(self, stream: Http2Stream, headers: Headers, *, last: bool) -> None:
        """Send the head of an answer; ``last`` says that no body follows."""
        ...

    def send_window(self, stream: Http2Stream) -> int:
        """Return how many bytes of a body the peer takes now."""
        ...

    def send_data(self, stream: Http2Stream, body: bytes, *, last: bool) -> None:
        """Send bytes for which there is room."""
        ...

    async def wait_for_window(self) -> None:
        """Wait until there may be more room, or the stream is over."""
        ...

    def acknowledge(self, stream: Http2Stream, size: int) -> None:
        """Let the peer send as many bytes of a body again."""
        ...

    def abort(self, stream: Http2Stream) -> None:
        """End a request whose answer cannot be whole."""
        ...


class Http2Stream:
    """A request: its body as it comes, and its answer as it goes."""

    __slots__ = (
        "_body",
        "_body_delivered",
        "_connection",
        "_unacknowledged",
        "changed",
        "disconnect_callback",
        "disconnected",
        "ended",
        "finished",
        "id",
        "method",
        "started",
    )  # fmt: skip

    def __init__(self, connection: Http2Connection, stream_id: int, method: str) -> None:
        self._connection = connection
        self.id = stream_id
        self.method = method
        self._body = bytearray()
        self._unacknowledged = 0
        self._body_delivered = False
        self.changed = asyncio.Event()
        self.ended = False
        """All of the request is here."""
        self.started = False
        self.finished = False
        """All of the answer is sent."""
        self.disconnected = False
        self.disconnect_callback: Callable[[], None] | None = None

    # What the connection tells.

    def feed(self, data: bytes, flow_bytes: int) -> None:
        """Take bytes of the body; with padding they count for more (RFC 9113 section 6.9.1)."""
        self._body += data
        self._unacknowledged += flow_bytes
        self.changed.set()

    def end(self) -> None:
        """Know that the request is whole."""
        self.ended = True
        self.changed.set()

    def disconnect(self) -> None:
        """Know that nobody waits for the answer any more."""
        self.disconnected = True
        self.changed.set()
        if self.disconnect_callback is not None:
            self.disconnect_callback()

    def _take(self) -> bytes:
        body = bytes(self._body)
        self._body.clear()
        # Only bytes that the application took open the window again: a slow handler slows the peer.
        if self._unacknowledged:
            self._connection.acknowledge(self, self._unacknowledged)
            self._unacknowledged = 0
        return body

    # What an exchange is.

    def whole_body(self) -> bytes | None:
        """Return the body if all of it is here."""
        return self._take() if self.ended else None

    def respond(self, status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> bool:
        """Send a whole answer if the peer has room for it."""
        if (
            self.started
            or self.disconnected
            or (body and self.method != "HEAD" and self._connection.send_window(self) < len(body))
        ):
            return False
        bare = not body or self.method == "HEAD"
        self._send_head(status, headers, last=bare)
        if not bare:
            self._connection.send_data(self, body, last=True)
        self._finish()
        return True

    def set_disconnect_callback(self, callback: Callable[[], None] | None) -> None:
        """Have ``callback`` called once nobody waits any more."""
        self.disconnect_callback = callback
        if self.disconnected and callback is not None:
            callback()

    # What ASGI asks.

    async def receive(self) -> dict[str, Any]:
        """Return the next part of the body, then that the peer is gone or has its answer."""
        while not (self.disconnected or self.finished):
            if not self._body_delivered and (self._body or self.ended):
                self._body_delivered = self.ended
                return {"type": "http.request", "body": self._take(), "more_body": not self.ended}
            self.changed.clear()
            await self.changed.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """Send the head or a part of the body of the answer."""
        if self.disconnected:
            return
        if message["type"] == "http.response.start":
            self._send_head(message["status"], message.get("headers", ()), last=self.method == "HEAD")
            if self.method == "HEAD":
                self._finish()
        if self.finished or message["type"] != "http.response.body":
            return
        more = message.get("more_body", False)
        rest = memoryview(message.get("body", b""))
        while rest:
            room = self._connection.send_window(self)
            if room > 0:
                self._connection.send_data(self, bytes(rest[:room]), last=not more and len(rest) <= room)
                rest = rest[room:]
            else:
                # Room for any stream ends the wait, so the window of this one is asked for again.
                await self._wait_for_window()
            if self.disconnected:
                return
        if not more:
            if not message.get("body"):
                self._connection.send_data(self, b"", last=True)
            self._finish()

    async def _wait_for_window(self) -> None:
        try:
            async with asyncio.timeout(SEND_SECONDS):
                await self._connection.wait_for_window()
        except TimeoutError:
            self._connection.abort(self)

    def _finish(self) -> None:
        self.finished = True
        self.changed.set()

    def _send_head(self, status: int, headers: Sequence[tuple[bytes, bytes]], *, last: bool) -> None:
        kept = [(name.lower(), value) for name, value in headers if name.lower() not in _CONNECTION_HEADERS]
        if any(b"\n" in value or b"\r" in value or b"\0" in value for _, value in kept):
            raise ValueError("A header of the answer has a line break.")
        self.started = True
        self._connection.send_head(self, [(b":status", str(status).encode()), *kept], last=last)

    async def run(self, app: ASGIApp, scope: Scope) -> None:
        """Serve the request."""
        try:
            await app(scope, self.receive, self.send)
        except Exception as error:
            get_logger("http").error("http.failed", error=error)
        finally:
            self.disconnect_callback = None
            if not self.disconnected and not self.finished:
                self._connection.abort(self)
