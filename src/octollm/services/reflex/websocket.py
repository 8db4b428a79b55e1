"""``WS /ws/tasks/{task_id}``: a task's frames out, the messages of the client in, and the close codes of RFC 6455."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any
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
from octollm.rpc.websocket_server import get_websocket_connection
from octollm.services.reflex.client_messages import ClientMessageHandler, get_type, parse_message
from octollm.services.reflex.live import LiveConnections, SlowConsumerError
from octollm.telemetry import Logger

NORMAL_CLOSURE, POLICY_VIOLATION, INTERNAL_ERROR, SERVICE_RESTART, TRY_AGAIN_LATER = (1000, 1008, 1011, 1012, 1013)
"""Close codes of RFC 6455 section 7.4 and its registry; 4401, 4403 and 4404 are the statuses of HTTP."""
MAX_MALFORMED = 8
"""Malformed messages after which the socket is closed."""


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
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(connections.count_connection("websocket", credential, websocket))
            # Before accepting: no frame is sent on a socket that is then closed with 4401, 4403 or 4404.
            session = await connections.open_session(credential, websocket)
            connection = _TaskConnection(self, websocket, credential)
            reader = await stack.enter_async_context(
                connections.follow(credential, connection.task_id, connection.refuse)
            )
            await websocket.accept()
            connection.start(session, reader, stack.pop_all())

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
            await _close(websocket, TRY_AGAIN_LATER, "too slow")
        except (WebSocketDisconnect, ConnectionError):
            return
        except Exception as error:  # The outermost boundary of a socket: log and close.
            self.sockets.log.error("socket.crashed", error=error)
            await _close(websocket, INTERNAL_ERROR, "internal")


class _TaskConnection:
    """One WebSocket on a task.

    A sender of its own catches the client up. Then the task's broadcast writes to the connection, and no coroutine is
    there for this client: the connection calls it back. That is most of what a watcher would cost.
    """

    __slots__ = (
        "_broadcast",
        "_context",
        "_credential",
        "_handling",
        "_is_member",
        "_malformed",
        "_messages",
        "_reader",
        "_sender",
        "_session",
        "_socket",
        "_sockets",
        "_stack",
        "task_id",
    )

    def __init__(self, sockets: TaskWebSockets, websocket: WebSocket, credential: str) -> None:
        self.task_id = str(websocket.path_params["task_id"])
        self._sockets = sockets
        self._socket = get_websocket_connection(websocket.scope)
        self._credential = credential
        self._context = contextvars.copy_context()
        self._stack: contextlib.AsyncExitStack | None = None
        """What is given back at the end; ``None`` once that was done."""
        self._session: LiveSession | None = None
        self._sender: asyncio.Task[None] | None = None
        self._reader: FeedReader | None = None
        self._broadcast: TaskBroadcast | None = None
        self._is_member = False
        self._messages: tuple[str | None, ...] = ()
        self._handling: asyncio.Task[None] | None = None
        self._malformed = 0

    def start(self, session: LiveSession, reader: FeedReader, stack: contextlib.AsyncExitStack) -> None:
        """Send frames and handle messages from here on. The end closes ``stack``."""
        self._stack = stack
        self._reader = reader
        self._broadcast = self._sockets.get_broadcast(reader.feed)
        stack.enter_context(self._sockets.connections.close_on_drain(self._drain))
        self._start_sending(session.fork(reader, reader))
        self._socket.detach(self)

    # A member of the broadcast.

    @property
    def reader(self) -> FeedReader:
        """The feed of the task, as this client may read it."""
        assert self._reader is not None
        return self._reader

    @property
    def pending_bytes(self) -> int:
        """What the client has not taken yet."""
        return self._socket.pending_bytes

    def write(self, payload: bytes) -> None:
        """Write an encoded frame."""
        self._socket.write(payload)

    def leave(self, session: LiveSession | None, error: BaseException | None) -> None:
        """Go on by ``session``, or close the connection because of ``error`` or after the final frame."""
        self._is_member = False
        if session is None:
            self._close(error)
        elif self._stack is not None:
            self._start_sending(session)

    # The sender, while the client is no member.

    def _start_sending(self, session: LiveSession) -> None:
        self._session = session
        self._sender = self._create_task(self._send_frames(session), "websocket sender")

    async def _send_frames(self, session: LiveSession) -> None:
        assert self._broadcast is not None
        error: BaseException | None = None
        hint = Hint(events=True, text=True)
        try:
            while not session.has_ended:
                # A frame is made once there is room for it: what waits for a client is then what others have too.
                await self._sockets.connections.send_within_timeout(self._socket.drain())
                async with contextlib.aclosing(session.poll(hint, self.reader)) as frames:
                    async for frame in frames:
                        self._socket.write(_encode_frame(frame))
                        await self._sockets.connections.send_within_timeout(self._socket.drain())
                if self._broadcast.join(session, self):
                    # Nothing is kept of what the broadcast does from here on.
                    self._is_member, self._session, self._sender = True, None, None
                    return
                if not session.has_ended:
                    hint = await session.wait(self.reader)
        except Exception as failure:  # Reported by the close code, and a defect in the log as well.
            error = failure
        self._close(error)

    # Ending.

    def connection_lost(self) -> None:
        """Give back what the connection holds."""
        stack, self._stack = self._stack, None
        if stack is None:
            return
        if self._is_member and self._broadcast is not None:
            self._is_member = False
            self._broadcast.remove(self)
        for task in (self._sender, self._handling):
            if task is not None and task is not asyncio.current_task():
                task.cancel()
        self._sender = self._handling = None
        self._create_task(stack.aclose(), "websocket end")

    def refuse(self, error: OctoError) -> None:
        """Close because the client may not watch any more."""
        self._close(error)

    def _drain(self) -> None:
        self._close(OctoError("The service is shutting down.", code="draining", retry_after=1))

    def _close(self, error: BaseException | None) -> None:
        """Close the connection because of ``error``, or after the final frame."""
        if self._stack is None:
            return
        match error:
            case None:
                code, reason = NORMAL_CLOSURE, ""
            case CloseConnection():
                code, reason = error.code, error.reason
            case SlowConsumerError():
                code, reason = TRY_AGAIN_LATER, "too slow"
            case OctoError():
                code, reason = get_close_code(error), error.code
            case _:
                self._sockets.log.error("socket.crashed", error=error)
                code, reason = INTERNAL_ERROR, "internal"
        # Its place is free at once. A client that takes nothing may need a while to be closed.
        self.connection_lost()
        self._socket.close(code, reason)

    def _create_task(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        # In the context of the connection: another's broadcast or the transport may be the caller.
        return self._context.run(self._socket.create_task, work, name)

    # Messages of the client.

    def receive_message(self, text: str | None) -> None:
        """Handle a message after those before it."""
        if self._stack is None:
            return
        self._messages = (*self._messages, text)
        if self._handling is None:
            self._handling = self._create_task(self._handle_messages(), "websocket messages")

    async def _handle_messages(self) -> None:
        """Handle the messages that are there.

        The response to a message is the frame of its event, such as ``task.cancelled``. The response to a refused
        message is a ``status`` frame that repeats ``seq`` and ``progress``, with ``data.note`` = ``{type, code,
        detail}``; its ``type`` is ``message`` for one that is malformed.
        """
        try:
            while self._messages:
                text, *rest = self._messages
                self._messages = tuple(rest)
                await self._handle_message(text)
        except Exception as error:  # Reported by the close code, and a defect in the log as well.
            self._close(error)
        else:
            self._handling = None
            self._socket.resume_reading()

    async def _handle_message(self, text: str | None) -> None:
        connections = self._sockets.connections
        try:
            parsed = parse_message(text)
        except OctoError as error:
            self._malformed += 1
            if self._malformed > MAX_MALFORMED:
                raise CloseConnection(POLICY_VIOLATION, "messages not understood") from error
            self._add_note({"type": "message", "code": error.code, "detail": error.detail})
            return
        try:
            await connections.authenticator.check_rate_limit(self._credential)
            await self._sockets.messages.handle(self._credential, self.task_id, parsed)
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


async def _close(websocket: WebSocket, code: int, reason: str) -> None:
    """Close a socket with a code, for which it has to be accepted first."""
    with contextlib.suppress(RuntimeError, WebSocketDisconnect, ConnectionError):
        if websocket.application_state is WebSocketState.CONNECTING:
            await websocket.accept()
        await websocket.close(code, reason)
