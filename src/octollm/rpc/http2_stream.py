"""One request of an HTTP/2 connection and its answer: an ASGI pair of ``receive`` and ``send``, and an exchange."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, Protocol

from starlette.types import ASGIApp, Scope

from octollm.telemetry import log_for

_OF_CONNECTIONS = frozenset((b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"))
"""Headers that HTTP/2 has no use for and forbids (RFC 9113 section 8.2.2)."""
SEND_SECONDS = 60.0
"""How long a peer may leave no room for the next bytes of an answer before its request is ended."""
Headers = list[tuple[bytes, bytes]]


class Wires(Protocol):
    """What a stream asks of its connection."""

    def head(self, stream: Stream, headers: Headers, *, last: bool) -> None:
        """Send the head of an answer; ``last`` says that no body follows."""
        ...

    def room(self, stream: Stream) -> int:
        """Return how many bytes of a body the peer takes now."""
        ...

    def data(self, stream: Stream, body: bytes, *, last: bool) -> None:
        """Send bytes for which there is room."""
        ...

    async def wait_for_room(self) -> None:
        """Wait until there may be more room, or the stream is over."""
        ...

    def taken(self, stream: Stream, size: int) -> None:
        """Let the peer send as many bytes of a body again."""
        ...

    def abort(self, stream: Stream) -> None:
        """End a request whose answer cannot be whole."""
        ...


class Stream:
    """A request: its body as it comes, and its answer as it goes."""

    __slots__ = (
        "_body", "_taken_later", "_told", "_wires", "ended", "finished", "gone", "id", "method", "news", "started",
        "when_gone",
    )  # fmt: skip

    def __init__(self, wires: Wires, stream_id: int, method: str) -> None:
        self._wires = wires
        self.id = stream_id
        self.method = method
        self._body = bytearray()
        self._taken_later = 0
        self._told = False
        self.news = asyncio.Event()
        self.ended = False
        """All of the request is here."""
        self.started = False
        self.finished = False
        """All of the answer is sent."""
        self.gone = False
        self.when_gone: Callable[[], None] | None = None

    # What the connection tells.

    def feed(self, data: bytes, flow_bytes: int) -> None:
        """Take bytes of the body; with padding they count for more (RFC 9113 section 6.9.1)."""
        self._body += data
        self._taken_later += flow_bytes
        self.news.set()

    def end(self) -> None:
        """Know that the request is whole."""
        self.ended = True
        self.news.set()

    def leave(self) -> None:
        """Know that nobody waits for the answer any more."""
        self.gone = True
        self.news.set()
        if self.when_gone is not None:
            self.when_gone()

    def _take(self) -> bytes:
        body = bytes(self._body)
        self._body.clear()
        if self._taken_later:
            self._wires.taken(self, self._taken_later)
            self._taken_later = 0
        return body

    # What an exchange is.

    def whole_body(self) -> bytes | None:
        """Return the body if all of it is here."""
        return self._take() if self.ended else None

    def answer(self, status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> bool:
        """Send a whole answer if the peer has room for it."""
        if self.started or self.gone or (body and self.method != "HEAD" and self._wires.room(self) < len(body)):
            return False
        bare = not body or self.method == "HEAD"
        self._head(status, headers, last=bare)
        if not bare:
            self._wires.data(self, body, last=True)
        self._finish()
        return True

    def tell_when_gone(self, callback: Callable[[], None] | None) -> None:
        """Have ``callback`` called once nobody waits any more."""
        self.when_gone = callback
        if self.gone and callback is not None:
            callback()

    # What ASGI asks.

    async def receive(self) -> dict[str, Any]:
        """Return the next part of the body, then that the peer is gone or has its answer."""
        while not (self.gone or self.finished):
            if not self._told and (self._body or self.ended):
                self._told = self.ended
                return {"type": "http.request", "body": self._take(), "more_body": not self.ended}
            self.news.clear()
            await self.news.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """Send the head or a part of the body of the answer."""
        if self.gone:
            return
        if message["type"] == "http.response.start":
            self._head(message["status"], message.get("headers", ()), last=self.method == "HEAD")
            if self.method == "HEAD":
                self._finish()
        if self.finished or message["type"] != "http.response.body":
            return
        more = message.get("more_body", False)
        rest = memoryview(message.get("body", b""))
        while rest:
            room = self._wires.room(self)
            if room > 0:
                self._wires.data(self, bytes(rest[:room]), last=not more and len(rest) <= room)
                rest = rest[room:]
            else:
                await self._wait_for_room()
            if self.gone:
                return
        if not more:
            if not message.get("body"):
                self._wires.data(self, b"", last=True)
            self._finish()

    async def _wait_for_room(self) -> None:
        try:
            async with asyncio.timeout(SEND_SECONDS):
                await self._wires.wait_for_room()
        except TimeoutError:
            self._wires.abort(self)

    def _finish(self) -> None:
        self.finished = True
        self.news.set()

    def _head(self, status: int, headers: Sequence[tuple[bytes, bytes]], *, last: bool) -> None:
        kept = [(name.lower(), value) for name, value in headers if name.lower() not in _OF_CONNECTIONS]
        if any(b"\n" in value or b"\r" in value or b"\0" in value for _, value in kept):
            raise ValueError("A header of the answer has a line break.")
        self.started = True
        self._wires.head(self, [(b":status", str(status).encode()), *kept], last=last)

    async def run(self, app: ASGIApp, scope: Scope) -> None:
        """Serve the request."""
        try:
            await app(scope, self.receive, self.send)
        except Exception as error:
            log_for("http").error("http.failed", error=error)
        finally:
            self.when_gone = None
            if not self.gone and not self.finished:
                self._wires.abort(self)
