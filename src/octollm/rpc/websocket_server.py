"""The WebSocket protocol of our server: uvicorn's, with bounds on what a client may cost, and without a coroutine.

uvicorn keeps an ASGI call for as long as a connection is open. Nearly all of its memory is the stack of that call: an
application that only sends can return from it with :meth:`WebSocketConnection.detach` and be called back instead.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Coroutine
from typing import Any, Protocol, cast

from starlette.types import Scope
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame

from octollm.telemetry import get_logger

EXTENSION = "octollm.websocket"
PING_SECONDS = 6.0
PONG_SECONDS = 6.0
"""A client that answers no ping for this long is closed, so one that vanished is noticed after twice six seconds."""
MAX_LATE_PONGS = 3
"""How often the time for a pong starts again because the client takes what comes before the ping, slowly."""
ABORT_SECONDS = 2.0
"""How long a client that was closed for taking nothing may still take what waits for it."""
CLOSE_SECONDS = 10.0
"""How long another may take to receive what waits for it and to answer the close frame."""
MAX_FRAMES = 512
"""Frames of a client between two pings of the server; pings, pongs and fragments count too."""
MAX_PONG_BACKLOG = 64 * 1024
"""Bytes that may wait for a client while its pings are answered. RFC 6455 section 5.5.3 allows to leave some out."""
SEND_BUFFER = 128 * 1024
"""Bytes that the kernel keeps for a client. By itself it would keep up to 4 MB for each one that reads nothing."""
_SLICE = 4096
"""Bytes that are parsed at a time: 700 empty frames, after which the bound on their number is looked at."""
POLICY_VIOLATION, TRY_AGAIN_LATER = 1008, 1013


class WebSocketHandler(Protocol):
    """Is called for a connection that was detached from its ASGI call."""

    def receive_message(self, text: str | None) -> None:
        """Take a message; ``None`` for a binary one. The next is read after ``resume_reading``."""
        ...

    def connection_lost(self) -> None:
        """Take note that the connection ends: nothing can be sent. May be called more than once."""
        ...


class _LazyEvent:
    """An ``asyncio.Event`` for one waiter, which takes memory only while somebody waits."""

    __slots__ = ("_is_open", "_waiter")

    def __init__(self) -> None:
        self._is_open = True
        self._waiter: asyncio.Future[None] | None = None

    def is_set(self) -> bool:
        return self._is_open

    def set(self) -> None:
        self._is_open = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def clear(self) -> None:
        self._is_open = False

    async def wait(self) -> None:
        while not self._is_open:
            if self._waiter is None or self._waiter.done():
                self._waiter = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._waiter)


class _HandlerQueue:
    """Stands where uvicorn puts the messages of the ASGI call."""

    __slots__ = ("_handler",)

    def __init__(self, handler: WebSocketHandler) -> None:
        self._handler = handler

    def put_nowait(self, message: dict[str, Any]) -> None:
        if message["type"] == "websocket.receive":
            self._handler.receive_message(message.get("text"))
        else:
            self._handler.connection_lost()

    def empty(self) -> bool:
        return True


class WebSocketConnection(WebSocketsSansIOProtocol):
    """One WebSocket connection. The application finds it by :func:`get_websocket_connection`."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.writable = cast("asyncio.Event", _LazyEvent())
        self._is_detached = False
        self._frames_left = MAX_FRAMES
        self._acknowledged = 0
        self._late_pongs = 0
        self.ping_interval, self.ping_timeout = PING_SECONDS, PONG_SECONDS

    # For the application.

    def detach(self, handler: WebSocketHandler) -> None:
        """Leave the connection open when the ASGI call returns, and call ``handler`` from here on."""
        waiting = self.queue
        self.queue = cast("asyncio.Queue[Any]", _HandlerQueue(handler))
        self._is_detached = True
        # What only the ASGI call reads. The parser keeps the request itself.
        self.request.headers.clear()
        del self.scope, self.request, self.response
        self.app_state = {}
        while not waiting.empty():
            self.queue.put_nowait(waiting.get_nowait())

    @property
    def pending_bytes(self) -> int:
        """What the client has not taken yet."""
        return self.transport.get_write_buffer_size()

    def write(self, data: bytes) -> None:
        """Write encoded frames, without waiting. Nothing is written once the connection ends."""
        if not (self.close_sent or self.transport.is_closing()):
            self.transport.write(data)

    async def drain(self) -> None:
        """Wait until the client has room for more."""
        await self.writable.wait()

    def close(self, code: int, reason: str = "") -> None:
        """Write the close frame behind what waits for the client, and end the connection in a bounded time."""
        if self.close_sent or self.transport.is_closing():
            return
        self.conn.send_close(code, reason)
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = True
        self.resume_reading()
        seconds = ABORT_SECONDS if code == TRY_AGAIN_LATER else CLOSE_SECONDS
        self.close_timer = self.loop.call_later(seconds, self.transport.abort)

    def resume_reading(self) -> None:
        """Read the client's next message."""
        if self.read_paused:
            self.read_paused = False
            self.transport.resume_reading()

    def create_task(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Start ``work`` for this connection; a drain of the server waits for it."""
        task = self.loop.create_task(work, name=name)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    # What uvicorn does, with bounds.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Bound what the kernel keeps."""
        super().connection_made(transport)
        peer = transport.get_extra_info("socket")
        if peer is not None:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)

    def handle_connect(self, event: Any) -> None:
        """Begin the ASGI call, which can find this connection in its scope."""
        super().handle_connect(event)
        if not self.close_sent:
            cast("Scope", self.scope)["extensions"][EXTENSION] = self

    async def run_asgi(self) -> None:
        """Make the ASGI call, after which the connection is closed unless it was detached."""
        try:
            await cast("Any", self).app(self.scope, self.receive, self.send)
        except ClientDisconnected:
            pass
        except Exception as error:
            get_logger("http").error("http.failed", error=error)
            self.send_500_response()
        if not self._is_detached and self.close_timer is None:
            self.transport.close()

    async def send(self, message: Any) -> None:
        """Send a message of the ASGI call. A client that takes nothing cannot hold up the end."""
        if message["type"] == "websocket.close" and self.handshake_complete and not self.disconnected:
            self.close(message.get("code", 1000), message.get("reason") or "")
        else:
            await super().send(message)

    def data_received(self, data: bytes) -> None:
        """Parse bytes, unless the client has sent too many frames."""
        for start in range(0, len(data), _SLICE):
            if self._frames_left < 0:
                return
            super().data_received(data if len(data) <= _SLICE else data[start : start + _SLICE])

    def handle_events(self) -> None:
        """Take the frames that were parsed."""
        self._frames_left -= len(self.conn.events)
        if len(self.frames) > MAX_FRAMES:
            self._frames_left = -1
        if self._frames_left < 0:
            self.conn.events.clear()
            self._end(POLICY_VIOLATION, "too many frames")
        else:
            super().handle_events()

    def handle_ping(self) -> None:
        """Answer a ping, unless the client takes none of the answers."""
        if self.pending_bytes > MAX_PONG_BACKLOG:
            self.conn.data_to_send()
        else:
            super().handle_ping()

    def handle_close(self, event: Frame) -> None:
        """Answer the close frame of the client, or take its answer to ours."""
        super().handle_close(event)
        self._abort_later()

    def handle_parser_exception(self) -> None:
        """Close because of bytes that are no WebSocket."""
        super().handle_parser_exception()
        self._abort_later()

    def send_keepalive_ping(self) -> None:
        """Ask whether the client is there."""
        self._frames_left = MAX_FRAMES
        self._acknowledged = self._read_acknowledged()[0]
        self._late_pongs = 0
        super().send_keepalive_ping()

    def keepalive_timeout(self) -> None:
        """Close a connection whose client is gone or does not read."""
        self.pong_timer = None
        if self.close_sent or self.transport.is_closing():
            return
        acknowledged, has_unsent = self._read_acknowledged()
        self._late_pongs += 1
        # The pong may wait here, while a message is handled. Or the ping may wait, behind what a slow client takes.
        is_slow = has_unsent and acknowledged > self._acknowledged and self._late_pongs <= MAX_LATE_PONGS
        if self.read_paused or is_slow:
            self._acknowledged = acknowledged
            self.pong_timer = self.loop.call_later(PONG_SECONDS, self.keepalive_timeout)
            return
        self._end(TRY_AGAIN_LATER, "no answer to a ping")

    def connection_lost(self, exc: Exception | None) -> None:
        """Release the connection."""
        super().connection_lost(exc)
        if self._is_detached:
            self.queue = cast("asyncio.Queue[Any]", None)

    def _end(self, code: int, reason: str) -> None:
        """Close by ourselves, and tell the application."""
        if self.close_sent:
            self.transport.abort()
            return
        self.close(code, reason)
        if self.close_timer is not None:
            self.close_timer.cancel()
        self.close_timer = self.loop.call_later(ABORT_SECONDS, self.transport.abort)
        self.disconnected = True
        self.queue.put_nowait({"type": "websocket.disconnect", "code": code, "reason": reason})

    def _abort_later(self) -> None:
        """Bound the time that a closing transport waits for its client."""
        if self.close_timer is None and self.pending_bytes:
            self.close_timer = self.loop.call_later(ABORT_SECONDS, self.transport.abort)

    def _read_acknowledged(self) -> tuple[int, bool]:
        """Return how many bytes the client's host has acknowledged, and whether others wait for that."""
        peer = self.transport.get_extra_info("socket")
        if peer is None or not hasattr(socket, "TCP_INFO") or self.transport.is_closing():
            return 0, False
        info = peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 148)
        if len(info) < 148:
            return 0, False
        (unacknowledged,) = struct.unpack_from("=I", info, 24)
        (acknowledged,) = struct.unpack_from("=Q", info, 120)
        (unsent,) = struct.unpack_from("=I", info, 144)
        return acknowledged, bool(self.pending_bytes or unacknowledged or unsent)


def get_websocket_connection(scope: Scope) -> WebSocketConnection:
    """Return the connection of an ASGI call. Raises ``KeyError`` if another server makes the call."""
    return cast("WebSocketConnection", scope["extensions"][EXTENSION])
