"""``GET /tasks/{task_id}/events``: the frames of a task as server-sent events (HTML standard, section 9.2)."""

from __future__ import annotations

import contextlib

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from octollm.contracts.listing import LAST_EVENT_ID_DESCRIPTION
from octollm.errors import OctoError
from octollm.live import LiveFrame, LiveSession
from octollm.rpc.call import IncomingCall, Operation, OperationDocs
from octollm.services.reflex.forward import STREAM_SECONDS
from octollm.services.reflex.racing import run_until_first
from octollm.services.reflex.watching import LiveConnections, SlowConsumerError

_SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]
_RETRY_EVENT = b"retry: 1000\n\n"


def encode_frame_event(frame: LiveFrame) -> bytes:
    """Return a frame as an event; its id is the ``seq``, so a reader goes on behind the last event it has."""
    return b"id: %d\ndata: %s\n\n" % (frame.seq, msgspec.json.encode(frame))


class FrameEventResponse(Response):
    """The frames of one session, until the final one."""

    def __init__(self, connections: LiveConnections, session: LiveSession, task_id: str) -> None:
        super().__init__()
        self._connections = connections
        self._session = session
        self._task_id = task_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        del scope
        watching = self._connections

        async def gone() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        async def write(body: bytes, *, more: bool = True) -> None:
            await watching.send_within_timeout(send({"type": "http.response.body", "body": body, "more_body": more}))

        async def tell() -> None:
            async with (
                watching.hub.subscribe(self._task_id) as hints,
                contextlib.aclosing(self._session.frames(hints)) as frames,
            ):
                async for frame in frames:
                    await write(encode_frame_event(frame))

        with watching.count_connection("sse"):
            await send({"type": "http.response.start", "status": 200, "headers": _SSE_HEADERS})
            # What ends a stream is no answer any more: the reader connects again and is told then.
            with contextlib.suppress(OctoError, SlowConsumerError):
                await write(_RETRY_EVENT)
                await run_until_first(tell(), gone(), watching.draining.wait())
            with contextlib.suppress(SlowConsumerError):
                await write(b"", more=False)


def build_sse_operation(connections: LiveConnections) -> Operation:
    """Return the operation."""

    async def handle(call: IncomingCall, body: object) -> Response:
        del body
        session = await connections.open_session(call.bearer, call.request)
        if session.is_finished:
            # 204 tells an EventSource not to connect again.
            return Response(status_code=204)
        return FrameEventResponse(connections, session, str(call.path["task_id"]))

    return Operation(
        "tasks.events",
        "GET",
        "/tasks/{task_id}/events",
        handle,
        auth="door",
        max_body=0,
        limited=False,
        timeout=STREAM_SECONDS,
        summary="A task's frames as server-sent events.",
        docs=OperationDocs(
            media_type="text/event-stream",
            headers={"Last-Event-ID": LAST_EVENT_ID_DESCRIPTION},
            error_codes=("task_not_found", "invalid_parameter"),
            other_statuses=(204,),
        ),
    )
