"""``GET /tasks/{task_id}/events``: the frames of a task as server-sent events (HTML standard, section 9.2)."""

from __future__ import annotations

import contextlib

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from octollm.contracts.listing import LAST_EVENT
from octollm.errors import OctoError
from octollm.live import LiveFrame, Session
from octollm.rpc.call import About, Call, Operation
from octollm.services.reflex.forward import FOLLOW_SECONDS
from octollm.services.reflex.racing import first_of
from octollm.services.reflex.watching import SlowWatcherError, Watching

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]
_START = b"retry: 1000\n\n"


def event_of(frame: LiveFrame) -> bytes:
    """Return a frame as an event; its id is the ``seq``, so a reader goes on behind the last event it has."""
    return b"id: %d\ndata: %s\n\n" % (frame.seq, msgspec.json.encode(frame))


class FrameEvents(Response):
    """The frames of one session, until the final one."""

    def __init__(self, watching: Watching, session: Session, task_id: str) -> None:
        super().__init__()
        self._watching = watching
        self._session = session
        self._task_id = task_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        del scope
        watching = self._watching

        async def gone() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        async def write(body: bytes, *, more: bool = True) -> None:
            await watching.hand_over(send({"type": "http.response.body", "body": body, "more_body": more}))

        async def tell() -> None:
            async with (
                watching.hub.watch(self._task_id) as hints,
                contextlib.aclosing(self._session.frames(hints)) as frames,
            ):
                async for frame in frames:
                    await write(event_of(frame))

        with watching.counted("sse"):
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            # What ends a stream is no answer any more: the reader connects again and is told then.
            with contextlib.suppress(OctoError, SlowWatcherError):
                await write(_START)
                await first_of(tell(), gone(), watching.draining.wait())
            with contextlib.suppress(SlowWatcherError):
                await write(b"", more=False)


def sse_operation(watching: Watching) -> Operation:
    """Return the operation."""

    async def handle(call: Call, body: object) -> Response:
        del body
        session = await watching.session(call.bearer, call.request)
        if session.nothing_left:
            # 204 tells an EventSource not to connect again.
            return Response(status_code=204)
        return FrameEvents(watching, session, str(call.path["task_id"]))

    return Operation(
        "tasks.events",
        "GET",
        "/tasks/{task_id}/events",
        handle,
        auth="door",
        max_body=0,
        limited=False,
        timeout=FOLLOW_SECONDS,
        summary="A task's frames as server-sent events.",
        about=About(
            media="text/event-stream",
            headers={"Last-Event-ID": LAST_EVENT},
            codes=("task_not_found", "invalid_parameter"),
            also=(204,),
        ),
    )
