"""``WS /ws/tasks/{task_id}``: a task's frames out, the messages of the client in, and the close codes of RFC 6455."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import msgspec
from starlette.routing import WebSocketRoute
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState
from websockets.frames import Frame as WebSocketFrame
from websockets.frames import Opcode

from octollm.clock import IdGenerator
from octollm.context import REQUEST_ID, RequestContext, parse_traceparent, parse_tracestate, set_context, start_trace
from octollm.contracts.problems import to_problem
from octollm.errors import OctoError
from octollm.events import Hint
from octollm.live import FeedReader, LiveFrame, LiveSession, TaskBroadcast, TaskFeed
from octollm.rpc.asgi_extension import get_websocket_transport
from octollm.services.reflex.client_messages import ClientMessageHandler, get_type, parse_message
from octollm.services.reflex.live import LiveConnections, SlowConsumerError
from octollm.telemetry import Logger

NORMAL_CLOSURE, POLICY_VIOLATION, INTERNAL_ERROR, SERVICE_RESTART, TRY_AGAIN_LATER = (1000, 1008, 1011, 1012, 1013)
"""Close codes of RFC 6455 section 7.4 and its registry; 4401, 4403 and 4404 are the statuses of HTTP."""
MAX_MALFORMED = 8
"""Malformed messages after which the socket is closed."""
CLOSE_SECONDS = 5.0
"""How long a client may take to accept the close frame."""


def get_close_code(error: OctoError) -> int:
    """Return the close code for ``error``."""
    status = to_problem(error).status
    if status in (401, 403, 404):
        return 4000 + status
    if status in (429, 502, 503, 504):
        return SERVICE_RESTART if error.code == "draining" else TRY_AGAIN_LATER
    return POLICY_VIOLATION if 400 <= status < 500 else INTERNAL_ERROR


class CloseConnection(Exception):  # noqa: N818  (it carries a close code, which need not mean an error)
    """Ends a connection with a close code of RFC 6455."""

    def __init__(self, code: int, reason: str = "") -> None:
        super().__init__(code)
        self.code = code
        self.reason = reason


@dataclass(frozen=True, slots=True)
class TaskWebSockets:
    """The WebSocket routes of the gateway."""

    connections: LiveConnections
    messages: ClientMessageHandler
    serve_dashboard: Callable[[WebSocket], Awaitable[None]]
    ids: IdGenerator
    log: Logger
    _broadcasts: WeakKeyDictionary[TaskFeed, TaskBroadcast] = field(
        default_factory=WeakKeyDictionary["TaskFeed", "TaskBroadcast"]
    )

    def routes(self) -> list[WebSocketRoute]:
        """Return the routes; a path that is none of them is accepted and closed with 4404."""
        return [
            WebSocketRoute("/ws/tasks/{task_id}", _Endpoint(self, self._serve_task)),
            WebSocketRoute("/ws/dashboard", _Endpoint(self, self.serve_dashboard)),
            WebSocketRoute("/{path:path}", _Endpoint(self, self._reject_unknown_path)),
        ]

    async def _reject_unknown_path(self, websocket: WebSocket) -> None:
        del websocket
        raise OctoError("There is no WebSocket at this path.", code="not_found")

    async def _serve_task(self, websocket: WebSocket) -> None:
        connections = self.connections
        credential = await connections.authenticator.authenticate(websocket)
        with contextlib.ExitStack() as counted:
            counted.enter_context(connections.count_connection("websocket", credential, websocket))
            # Before accepting: no frame is sent on a socket that is then closed with 4401, 4403 or 4404.
            connection = _TaskConnection(self, websocket, credential, counted)
            await connection.open()
            await connection.serve()

    def get_broadcast(self, feed: TaskFeed) -> TaskBroadcast:
        """Return the broadcast of a feed."""
        broadcast = self._broadcasts.get(feed)
        if broadcast is None:
            broadcast = self._broadcasts[feed] = TaskBroadcast(feed, _encode_frame)
        return broadcast

    def set_request_context(self, websocket: WebSocket) -> None:
        """Give the connection its ids and its place in a trace."""
        header = websocket.headers.get("x-correlation-id", "")
        correlation_id = header if REQUEST_ID.fullmatch(header) else "corr-" + self.ids.hex()
        parents = websocket.headers.getlist("traceparent")
        state = parse_tracestate(websocket.headers.getlist("tracestate"))
        # Of two, neither is to be believed (W3C Trace Context section 3.2.1).
        trace = (parse_traceparent(parents[0], state) if len(parents) == 1 else None) or start_trace()
        set_context(RequestContext("reflex", "req-" + self.ids.hex(), correlation_id, trace))


@dataclass(frozen=True, slots=True)
class _Endpoint:
    """The outermost boundary of a connection: whatever fails becomes a close code.

    An ASGI application, because Starlette holds some more coroutines for each connection of a function.
    """

    sockets: TaskWebSockets
    serve: Callable[[WebSocket], Awaitable[None]]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        websocket = WebSocket(scope, receive, send)
        self.sockets.set_request_context(websocket)
        try:
            await self.serve(websocket)
        except CloseConnection as closed:
            await _close(websocket, closed.code, closed.reason)
        except OctoError as error:
            await _close(websocket, get_close_code(error), error.code)
        except SlowConsumerError:
            transport = get_websocket_transport(scope)
            if not await _close(websocket, TRY_AGAIN_LATER, "too slow") and transport is not None:
                transport.abort()
        except (WebSocketDisconnect, ConnectionError):
            return
        except Exception as error:  # The outermost boundary of a socket: log and close.
            self.sockets.log.error("socket.crashed", error=error)
            await _close(websocket, INTERNAL_ERROR, "internal")


class _TaskConnection:
    """One WebSocket on a task.

    A sender of its own catches the client up. Then the task's broadcast writes to the transport, and no coroutine
    waits for this client but the one that receives its messages.
    """

    def __init__(
        self, sockets: TaskWebSockets, websocket: WebSocket, credential: str, counted: contextlib.ExitStack
    ) -> None:
        self._sockets = sockets
        self._counted = counted
        self._connections = sockets.connections
        self._websocket = websocket
        self._credential = credential
        self._task_id = str(websocket.path_params["task_id"])
        self._transport = get_websocket_transport(websocket.scope)
        self._session: LiveSession | None = None
        self._sender: asyncio.Task[None] | None = None
        self._reader: FeedReader | None = None
        self._broadcast: TaskBroadcast | None = None
        self._is_member = False

    async def open(self) -> None:
        """Accept the connection. Raises what refuses the client."""
        self._session = await self._connections.open_session(self._credential, self._websocket)
        await self._websocket.accept()

    async def serve(self) -> None:
        """Send frames and handle messages until the connection is closed."""
        assert self._session is not None
        async with self._connections.follow(self._credential, self._task_id, self._refuse) as reader:
            self._reader = reader
            self._broadcast = self._sockets.get_broadcast(reader.feed)
            with self._connections.close_on_drain(self._drain):
                self._start_sending(self._session.fork(reader, reader))
                try:
                    await self._receive_messages()
                finally:
                    await self._stop_sending()

    # A member of the broadcast.

    @property
    def reader(self) -> FeedReader:
        """The feed of the task, as this client may read it."""
        assert self._reader is not None
        return self._reader

    @property
    def pending_bytes(self) -> int:
        """What the client has not taken yet."""
        return 0 if self._transport is None else self._transport.get_write_buffer_size()

    def write(self, payload: bytes) -> None:
        """Write an encoded frame."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(payload)

    def leave(self, session: LiveSession | None, error: BaseException | None) -> None:
        """Go on by ``session``, or close the connection because of ``error`` or after the final frame."""
        self._is_member = False
        if session is not None:
            self._start_sending(session)
        else:
            self._close_soon(error)

    # The sender, while the client is no member.

    def _start_sending(self, session: LiveSession) -> None:
        self._session = session
        self._sender = asyncio.create_task(self._send_frames(session), name="websocket sender")

    async def _stop_sending(self) -> None:
        if self._is_member and self._broadcast is not None:
            self._is_member = False
            self._broadcast.remove(self)
        if self._sender is not None:
            self._sender.cancel()
            await asyncio.wait({self._sender})

    async def _send_frames(self, session: LiveSession) -> None:
        assert self._broadcast is not None
        error: BaseException | None = None
        hint = Hint(events=True, text=True)
        try:
            while not session.has_ended:
                async with contextlib.aclosing(session.poll(hint, self.reader)) as frames:
                    async for frame in frames:
                        text = msgspec.json.encode(frame).decode()
                        await self._connections.send_within_timeout(self._websocket.send_text(text))
                if self._transport is not None and self._broadcast.join(session, self):
                    # Nothing is kept of what the broadcast does from here on.
                    self._is_member, self._session, self._sender = True, None, None
                    return
                if not session.has_ended:
                    hint = await session.wait(self.reader)
        except Exception as failure:  # Reported by the close code, and a defect in the log as well.
            error = failure
        await self._close(error)

    # Ending.

    def _refuse(self, error: OctoError) -> None:
        """End because the client may not watch any more."""
        if self._is_member and self._broadcast is not None:
            self._broadcast.remove(self)
            self.leave(None, error)
        else:
            self.reader.refuse(error)

    def _drain(self) -> None:
        if self._is_member and self._broadcast is not None:
            self._broadcast.remove(self)
            self._is_member = False
        elif self._sender is not None:
            self._sender.cancel()
        self._close_soon(OctoError("The service is shutting down.", code="draining", retry_after=1))

    def _close_soon(self, error: BaseException | None) -> None:
        self._sender = asyncio.create_task(self._close(error), name="websocket close")

    async def _close(self, error: BaseException | None) -> None:
        """Close the connection; then the coroutine that receives ends as well."""
        # Its place is free now. A client that takes nothing may need a while to be closed.
        self._counted.close()
        match error:
            case None:
                code, reason = NORMAL_CLOSURE, ""
            case SlowConsumerError():
                code, reason = TRY_AGAIN_LATER, "too slow"
            case OctoError():
                code, reason = get_close_code(error), error.code
            case WebSocketDisconnect() | ConnectionError() | RuntimeError() if self._is_gone:
                return
            case _:
                self._sockets.log.error("socket.crashed", error=error)
                code, reason = INTERNAL_ERROR, "internal"
        if not await _close(self._websocket, code, reason) and self._transport is not None:
            # The client takes nothing, not even the close frame.
            self._transport.abort()

    @property
    def _is_gone(self) -> bool:
        return self._transport is None or self._transport.is_closing()

    # Messages of the client.

    async def _receive_messages(self) -> None:
        """Handle the client's messages until it disconnects.

        The response to a message is the frame of its event, such as ``task.cancelled``. The response to a refused
        message is a ``status`` frame that repeats ``seq`` and ``progress``, with ``data.note`` = ``{type, code,
        detail}``; its ``type`` is ``message`` for one that is malformed.
        """
        malformed = 0
        while True:
            message = await self._websocket.receive()
            if message["type"] == "websocket.disconnect":
                return
            try:
                parsed = parse_message(message.get("text"))
            except OctoError as error:
                malformed += 1
                if malformed > MAX_MALFORMED:
                    raise CloseConnection(POLICY_VIOLATION, "messages not understood") from error
                self._add_note({"type": "message", "code": error.code, "detail": error.detail})
                continue
            try:
                await self._connections.authenticator.check_rate_limit(self._credential)
                await self._sockets.messages.handle(self._credential, self._task_id, parsed)
            except OctoError as error:
                self._add_note({"type": get_type(parsed), "code": error.code, "detail": error.detail})
            else:
                # Its event is there now. Without Redis, the next look at the events would come later.
                self.reader.feed.refresh()

    def _add_note(self, note: dict[str, object]) -> None:
        if self._is_member and self._broadcast is not None:
            self.write(self._broadcast.build_note(note))
        elif self._session is not None:
            self._session.add_note(note)
            self.reader.notify(events=False, text=False)


def _encode_frame(frame: LiveFrame) -> bytes:
    """Return a frame as an unmasked text frame of RFC 6455, ready for the transport."""
    return WebSocketFrame(Opcode.TEXT, msgspec.json.encode(frame)).serialize(mask=False)


async def _close(websocket: WebSocket, code: int, reason: str) -> bool:
    """Close a socket with a code, for which it has to be accepted first; return whether the client took it."""
    try:
        async with asyncio.timeout(CLOSE_SECONDS):
            if websocket.application_state is WebSocketState.CONNECTING:
                await websocket.accept()
            await websocket.close(code, reason)
    except TimeoutError:
        return False
    except (RuntimeError, WebSocketDisconnect, ConnectionError):
        pass
    return True
