"""Live connections: sessions on a task with a bound and a send timeout, and their frames as server-sent events.

The event stream format is that of the HTML standard, section 9.2.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Generator
from dataclasses import dataclass, field

from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from octollm.clock import Clock
from octollm.concurrency import run_until_first
from octollm.contracts.public_api import WATCH_TASK
from octollm.errors import OctoError
from octollm.events import TaskWatchHub
from octollm.framing import encode_sse
from octollm.limiter import ConcurrencyLimiter, ConcurrencyPolicy
from octollm.live import LiveFrame, LiveSession, SessionTiming, parse_resume_position
from octollm.rpc.call import IncomingCall, Operation, implement
from octollm.rpc.limits import wait_for_disconnect
from octollm.services.reflex.auth import CredentialAuthenticator
from octollm.services.reflex.upstream import Upstream, UpstreamTask
from octollm.storage import TextStream
from octollm.telemetry import Metrics

MAX_WATCHERS = 4096
"""Open live connections of one process."""
SEND_TIMEOUT_SECONDS = 10.0
"""How long one frame may wait for a client that does not read."""
_TASK_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class SlowConsumerError(Exception):
    """The client does not read: a frame waited longer than the send timeout."""


def create_connection_limiter() -> ConcurrencyLimiter:
    """Return the limiter of live connections. It has no queue: a client tries again by itself."""
    return ConcurrencyLimiter("The gateway", ConcurrencyPolicy(MAX_WATCHERS, max_queued=0, max_wait=0.0))


@dataclass(slots=True)
class LiveConnections:
    """Opens live sessions, and bounds how many there are."""

    authenticator: CredentialAuthenticator
    upstream: Upstream
    text_stream: TextStream
    hub: TaskWatchHub
    clock: Clock
    metrics: Metrics
    draining: asyncio.Event
    timing: SessionTiming = field(default_factory=SessionTiming)
    send_timeout: float = SEND_TIMEOUT_SECONDS
    limiter: ConcurrencyLimiter = field(default_factory=create_connection_limiter)

    async def open_session(self, credential: str, connection: HTTPConnection) -> LiveSession:
        """Return an open session on the task in the path, from the position in the query or ``Last-Event-ID``.

        Raises ``task_not_found``, ``scope_missing``, ``invalid_parameter``, ``draining``.
        """
        task_id = str(connection.path_params["task_id"])
        if not _TASK_ID.fullmatch(task_id):
            raise OctoError("There is no such task.", code="task_not_found")
        if self.draining.is_set():
            raise OctoError("The service is shutting down.", code="draining", retry_after=1)
        query = connection.query_params
        afters = query.getlist("after")
        if len(afters) > 1:
            raise OctoError("`after` may be given once.", code="invalid_parameter")
        # A browser's EventSource reconnects with this header and its first URL, whose `after` is old by then.
        after = connection.headers.get("last-event-id") or (afters[0] if afters else None)
        session = LiveSession(
            task_id,
            UpstreamTask(self.upstream, credential, task_id),
            self.text_stream,
            self.clock,
            position=parse_resume_position(after, query.getlist("offset")),
            timing=self.timing,
        )
        await session.open()
        return session

    @contextlib.contextmanager
    def count_connection(self, kind: str) -> Generator[None]:
        """Count a connection while the context is open. Raises ``overloaded`` past the bound."""
        if not self.limiter.try_acquire():
            raise OctoError("Too many live connections are open here.", code="overloaded", retry_after=5)
        self.metrics.live_connections.labels(kind).inc()
        try:
            yield
        finally:
            self.limiter.release()
            self.metrics.live_connections.labels(kind).dec()

    async def send_within_timeout(self, sending: Awaitable[None]) -> None:
        """Send one frame. Raises :class:`SlowConsumerError` after ``send_timeout`` seconds."""
        # Frames are made one at a time, so only this one and the connection's buffer (64 KiB) are ever queued.
        try:
            async with asyncio.timeout(self.send_timeout):
                await sending
        except TimeoutError as error:
            raise SlowConsumerError from error


_SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]
_RETRY_EVENT = b"retry: 1000\n\n"


def encode_frame_event(frame: LiveFrame) -> bytes:
    """Return a frame as an event. Its id is the ``seq``, from which a client resumes."""
    return encode_sse(frame, event_id=frame.seq)


class FrameEventResponse(Response):
    """The frames of one session, until the final one."""

    def __init__(self, connections: LiveConnections, session: LiveSession, task_id: str) -> None:
        super().__init__()
        self._connections = connections
        self._session = session
        self._task_id = task_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until the final frame, a disconnect or the drain."""
        del scope
        connections = self._connections

        async def write(body: bytes, *, more: bool = True) -> None:
            message = {"type": "http.response.body", "body": body, "more_body": more}
            await connections.send_within_timeout(send(message))

        async def send_frames() -> None:
            async with (
                connections.hub.subscribe(self._task_id) as hints,
                contextlib.aclosing(self._session.frames(hints)) as frames,
            ):
                async for frame in frames:
                    await write(encode_frame_event(frame))

        with connections.count_connection("sse"):
            await send({"type": "http.response.start", "status": 200, "headers": _SSE_HEADERS})
            # The status is sent: an error can only end the stream. The client reconnects and gets it as a response.
            with contextlib.suppress(OctoError, SlowConsumerError):
                await write(_RETRY_EVENT)
                await run_until_first(send_frames(), wait_for_disconnect(receive), connections.draining.wait())
            with contextlib.suppress(SlowConsumerError):
                await write(b"", more=False)


def build_sse_operation(connections: LiveConnections) -> Operation:
    """Return the operation that streams a task's frames as server-sent events."""

    async def handle(call: IncomingCall, body: object) -> Response:
        del body
        session = await connections.open_session(call.bearer, call.request)
        if session.is_finished:
            # 204 makes an EventSource stop reconnecting.
            return Response(status_code=204)
        return FrameEventResponse(connections, session, str(call.path["task_id"]))

    return implement(WATCH_TASK, handle, auth="door")
