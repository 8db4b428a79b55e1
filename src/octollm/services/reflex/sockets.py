"""``WS /ws/tasks/{task_id}``: the frames of a task, and what its watcher may say."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import msgspec
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from octollm.clock import Ids
from octollm.context import ID, Scene, new_trace, parse_traceparent, set_scene
from octollm.contracts.problems import problem_of
from octollm.errors import OctoError
from octollm.events import Watch
from octollm.live import Session
from octollm.services.reflex.racing import first_of
from octollm.services.reflex.watching import SlowWatcherError, Watching
from octollm.telemetry import Log

DONE, GOING, MALFORMED, BROKEN, RESTARTING, LATER = 1000, 1001, 1008, 1011, 1012, 1013
"""Close codes of RFC 6455 section 7.4 and its registry; 4401, 4403 and 4404 are the statuses of HTTP."""
MAX_MALFORMED = 8
"""Messages that are not understood, before the socket is closed."""
CLOSE_SECONDS = 5.0
"""How long a watcher may take to take the closing frame."""


class _Said(msgspec.Struct):
    """A message of a watcher: ``{"type": "cancel"}`` or ``{"type": "approval", …}``."""

    type: str


def close_code(error: OctoError) -> int:
    """Return the code with which a socket is closed for ``error``."""
    status = problem_of(error).status
    if status in (401, 403, 404):
        return 4000 + status
    if status in (429, 502, 503, 504):
        return RESTARTING if error.code == "draining" else LATER
    return MALFORMED if 400 <= status < 500 else BROKEN


class _Closed(Exception):  # noqa: N818  (it carries how a socket ends, which need not be an error)
    def __init__(self, code: int, reason: str = "") -> None:
        super().__init__(code)
        self.code = code
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Sockets:
    """Serves the WebSockets of the door."""

    watching: Watching
    ids: Ids
    log: Log

    def routes(self) -> list[WebSocketRoute]:
        """Return the routes; a path that is none of them is accepted and closed with 4404."""
        return [
            WebSocketRoute("/ws/tasks/{task_id}", self._endpoint(self._task)),
            WebSocketRoute("/{path:path}", self._endpoint(self._nothing)),
        ]

    def _endpoint(self, serve: Callable[[WebSocket], Awaitable[None]]) -> Callable[[WebSocket], Awaitable[None]]:
        async def endpoint(websocket: WebSocket) -> None:
            self._set_scene(websocket)
            try:
                await serve(websocket)
            except _Closed as closed:
                await _close(websocket, closed.code, closed.reason)
            except OctoError as error:
                await _close(websocket, close_code(error), error.code)
            except SlowWatcherError:
                await _close(websocket, LATER, "too slow")
            except (WebSocketDisconnect, ConnectionError):
                return
            except Exception as error:  # the outermost boundary of a socket: it is logged and closed
                self.log.error("socket.crashed", error=error)
                await _close(websocket, BROKEN, "internal")

        return endpoint

    async def _nothing(self, websocket: WebSocket) -> None:
        del websocket
        raise OctoError("No socket is served here.", code="not_found")

    async def _task(self, websocket: WebSocket) -> None:
        watching = self.watching
        credential = await watching.door.admit(websocket)
        with watching.counted("websocket"):
            session = await watching.session(credential, websocket)
            await websocket.accept()
            task_id = str(websocket.path_params["task_id"])
            async with watching.hub.watch(task_id) as hints:
                ended = await first_of(
                    self._tell(websocket, session, hints),
                    self._listen(websocket, session, hints, credential, task_id),
                    watching.draining.wait(),
                )
        raise _Closed((DONE, GOING, RESTARTING)[ended])

    async def _tell(self, websocket: WebSocket, session: Session, hints: Watch) -> None:
        async with contextlib.aclosing(session.frames(hints)) as frames:
            async for frame in frames:
                await self.watching.hand_over(websocket.send_text(msgspec.json.encode(frame).decode()))

    async def _listen(
        self, websocket: WebSocket, session: Session, hints: Watch, credential: str, task_id: str
    ) -> None:
        """Do what the watcher says, until it goes.

        A cancellation is answered by the frame of ``task.cancelled``. What could not be done is answered by a
        ``status`` frame that repeats ``seq`` and ``progress``, with ``data.note`` = ``{type, code, detail}``.
        """
        malformed = 0
        while True:
            message = await websocket.receive()
            if message["type"] == "websocket.disconnect":
                return
            said = _read(message.get("text"))
            if said is None:
                malformed += 1
                if malformed > MAX_MALFORMED:
                    raise _Closed(MALFORMED, "messages not understood")
                continue
            try:
                await self.watching.door.count(credential)
                await self._do(said, credential, task_id)
            except OctoError as error:
                session.note({"type": said, "code": error.code, "detail": error.detail})
            hints.hint(events=True, text=False)

    async def _do(self, said: str, credential: str, task_id: str) -> None:
        if said == "cancel":
            await self.watching.upstream.cancel(credential, task_id)
        else:
            raise OctoError("Approvals are not configured here.", code="not_configured")

    def _set_scene(self, websocket: WebSocket) -> None:
        given = websocket.headers.get("x-correlation-id", "")
        correlation_id = given if ID.fullmatch(given) else "corr-" + self.ids.hex()
        trace = parse_traceparent(websocket.headers.get("traceparent")) or new_trace()
        set_scene(Scene("reflex", "req-" + self.ids.hex(), correlation_id, trace))


def _read(text: object) -> str | None:
    """Return the type of a message that is understood."""
    if not isinstance(text, str):
        return None
    try:
        said = msgspec.json.decode(text.encode(), type=_Said).type
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None
    return said if said in ("cancel", "approval") else None


async def _close(websocket: WebSocket, code: int, reason: str) -> None:
    """Close, accepting first where that is still to be done. A watcher that takes nothing is simply let go."""
    with contextlib.suppress(TimeoutError, RuntimeError, WebSocketDisconnect, ConnectionError):
        async with asyncio.timeout(CLOSE_SECONDS):
            if websocket.application_state is WebSocketState.CONNECTING:
                await websocket.accept()
            await websocket.close(code, reason)
