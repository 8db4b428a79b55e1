"""``WS /ws/tasks/{task_id}``: a task's frames out, cancellations and approvals in, and the close codes of RFC 6455."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import msgspec
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from octollm.clock import IdGenerator
from octollm.concurrency import run_until_first
from octollm.context import REQUEST_ID, RequestContext, parse_traceparent, set_context, start_trace
from octollm.contracts.problems import to_problem
from octollm.errors import OctoError
from octollm.events import TaskSubscription
from octollm.live import LiveSession
from octollm.services.reflex.live import LiveConnections, SlowConsumerError
from octollm.telemetry import Logger

NORMAL_CLOSURE, GOING_AWAY, POLICY_VIOLATION, INTERNAL_ERROR, SERVICE_RESTART, TRY_AGAIN_LATER = (
    1000,
    1001,
    1008,
    1011,
    1012,
    1013,
)
"""Close codes of RFC 6455 section 7.4 and its registry; 4401, 4403 and 4404 are the statuses of HTTP."""
MAX_MALFORMED = 8
"""Malformed messages after which the socket is closed."""
CLOSE_SECONDS = 5.0
"""How long a client may take to accept the close frame."""


class _ClientMessage(msgspec.Struct):
    """A message of the client: ``{"type": "cancel"}`` or ``{"type": "approval", …}``."""

    type: str


def get_close_code(error: OctoError) -> int:
    """Return the close code for ``error``."""
    status = to_problem(error).status
    if status in (401, 403, 404):
        return 4000 + status
    if status in (429, 502, 503, 504):
        return SERVICE_RESTART if error.code == "draining" else TRY_AGAIN_LATER
    return POLICY_VIOLATION if 400 <= status < 500 else INTERNAL_ERROR


class _CloseConnection(Exception):  # noqa: N818  (it carries a close code, which need not mean an error)
    def __init__(self, code: int, reason: str = "") -> None:
        super().__init__(code)
        self.code = code
        self.reason = reason


@dataclass(frozen=True, slots=True)
class TaskWebSockets:
    """The WebSocket routes of the gateway."""

    connections: LiveConnections
    ids: IdGenerator
    log: Logger

    def routes(self) -> list[WebSocketRoute]:
        """Return the routes; a path that is none of them is accepted and closed with 4404."""
        return [
            WebSocketRoute("/ws/tasks/{task_id}", self._endpoint(self._serve_task)),
            WebSocketRoute("/{path:path}", self._endpoint(self._reject_unknown_path)),
        ]

    def _endpoint(self, serve: Callable[[WebSocket], Awaitable[None]]) -> Callable[[WebSocket], Awaitable[None]]:
        async def endpoint(websocket: WebSocket) -> None:
            self._set_request_context(websocket)
            try:
                await serve(websocket)
            except _CloseConnection as closed:
                await _close(websocket, closed.code, closed.reason)
            except OctoError as error:
                await _close(websocket, get_close_code(error), error.code)
            except SlowConsumerError:
                await _close(websocket, TRY_AGAIN_LATER, "too slow")
            except (WebSocketDisconnect, ConnectionError):
                return
            except Exception as error:  # The outermost boundary of a socket: log and close.
                self.log.error("socket.crashed", error=error)
                await _close(websocket, INTERNAL_ERROR, "internal")

        return endpoint

    async def _reject_unknown_path(self, websocket: WebSocket) -> None:
        del websocket
        raise OctoError("There is no WebSocket at this path.", code="not_found")

    async def _serve_task(self, websocket: WebSocket) -> None:
        connections = self.connections
        credential = await connections.authenticator.authenticate(websocket)
        with connections.count_connection("websocket"):
            # Before accepting: no frame is sent on a socket that is then closed with 4401, 4403 or 4404.
            session = await connections.open_session(credential, websocket)
            await websocket.accept()
            task_id = str(websocket.path_params["task_id"])
            async with connections.hub.subscribe(task_id) as hints:
                first = await run_until_first(
                    self._send_frames(websocket, session, hints),
                    self._receive_messages(websocket, session, hints, credential, task_id),
                    connections.draining.wait(),
                )
        # The final frame was sent, the client left, or the gateway drains, in the order of the coroutines above.
        raise _CloseConnection((NORMAL_CLOSURE, GOING_AWAY, SERVICE_RESTART)[first])

    async def _send_frames(self, websocket: WebSocket, session: LiveSession, hints: TaskSubscription) -> None:
        async with contextlib.aclosing(session.frames(hints)) as frames:
            async for frame in frames:
                await self.connections.send_within_timeout(websocket.send_text(msgspec.json.encode(frame).decode()))

    async def _receive_messages(
        self, websocket: WebSocket, session: LiveSession, hints: TaskSubscription, credential: str, task_id: str
    ) -> None:
        """Handle the client's messages until it disconnects.

        The response to a cancellation is the frame of ``task.cancelled``. The response to a refused message is a
        ``status`` frame that repeats ``seq`` and ``progress``, with ``data.note`` = ``{type, code, detail}``.
        """
        malformed = 0
        while True:
            message = await websocket.receive()
            if message["type"] == "websocket.disconnect":
                return
            message_type = _parse_message(message.get("text"))
            if message_type is None:
                malformed += 1
                if malformed > MAX_MALFORMED:
                    raise _CloseConnection(POLICY_VIOLATION, "messages not understood")
                continue
            try:
                await self.connections.authenticator.check_rate_limit(credential)
                await self._handle_message(message_type, credential, task_id)
            except OctoError as error:
                session.add_note({"type": message_type, "code": error.code, "detail": error.detail})
            # Wakes the sender, which then sends the note, or the frame that the message caused.
            hints.notify(events=True, text=False)

    async def _handle_message(self, message_type: str, credential: str, task_id: str) -> None:
        if message_type == "cancel":
            await self.connections.upstream.cancel(credential, task_id)
        else:
            raise OctoError("Approvals are not configured here.", code="not_configured")

    def _set_request_context(self, websocket: WebSocket) -> None:
        header = websocket.headers.get("x-correlation-id", "")
        correlation_id = header if REQUEST_ID.fullmatch(header) else "corr-" + self.ids.hex()
        parents = websocket.headers.getlist("traceparent")
        # Of two, neither is to be believed (W3C Trace Context section 3.2.1).
        trace = (parse_traceparent(parents[0]) if len(parents) == 1 else None) or start_trace()
        set_context(RequestContext("reflex", "req-" + self.ids.hex(), correlation_id, trace))


def _parse_message(message: object) -> str | None:
    """Return the type of a well-formed message; ``None`` for any other."""
    if not isinstance(message, str):
        return None
    try:
        message_type = msgspec.json.decode(message.encode(), type=_ClientMessage).type
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None
    return message_type if message_type in ("cancel", "approval") else None


async def _close(websocket: WebSocket, code: int, reason: str) -> None:
    """Close a socket with a code, for which it has to be accepted first. An unresponsive client is dropped."""
    with contextlib.suppress(TimeoutError, RuntimeError, WebSocketDisconnect, ConnectionError):
        async with asyncio.timeout(CLOSE_SECONDS):
            if websocket.application_state is WebSocketState.CONNECTING:
                await websocket.accept()
            await websocket.close(code, reason)
