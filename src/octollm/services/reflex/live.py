"""Live connections: sessions on a task with a bound and a send timeout, and their frames as server-sent events.

The event stream format is that of the HTML standard, section 9.2.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from dataclasses import dataclass, field

from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from octollm.capability import CapabilityError, Revocations
from octollm.capability.inspection import read_chain
from octollm.capability.tokens import TokenClaims
from octollm.clock import Clock
from octollm.concurrency import BackgroundLoop, LoopLogger, run_until_first
from octollm.contracts.task_operations import WATCH_TASK
from octollm.errors import OctoError
from octollm.framing import encode_sse
from octollm.live import (
    FeedReader,
    LiveFrame,
    LiveSession,
    SessionTiming,
    TaskFeeds,
    is_transient,
    parse_resume_position,
)
from octollm.rpc.asgi_extension import disconnect_silent_client
from octollm.rpc.call import IncomingCall, Operation, implement
from octollm.rpc.limits import wait_for_disconnect
from octollm.services.reflex.auth import CredentialAuthenticator
from octollm.services.reflex.throttle import ConnectionCounter
from octollm.services.reflex.upstream import Upstream, UpstreamTask
from octollm.telemetry import Metrics

AUTHORITY_SECONDS = 0.25
"""Interval at which new revocations and expired tokens are looked for."""
MAX_CHECKS = 16
"""Checks of authority under way at a time."""
SEND_TIMEOUT_SECONDS = 10.0
"""How long one frame may wait for a client that does not read."""
_TASK_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class SlowConsumerError(Exception):
    """The client does not read: a frame waited longer than the send timeout."""


@dataclass(slots=True, eq=False)
class _Watcher:
    """One who watches a task: how to ask whether it may, and how to end it."""

    task_id: str
    check: Callable[[], Awaitable[object]]
    refuse: Callable[[OctoError], None]


@dataclass(slots=True)
class _CachedAuthority:
    """The access token that a credential was exchanged for, and who watches by it."""

    links: tuple[TokenClaims, ...] | None = None
    expires_at: float = float("-inf")
    watchers: dict[_Watcher, None] = field(default_factory=dict[_Watcher, None])


class WatcherAuthority:
    """Checks that who watches a task still may: when the access token expires, and when it is revoked.

    One check counts for all that watch a task by the same credential, and nothing is asked in between.
    """

    def __init__(self, upstream: Upstream, revocations: Revocations | None, clock: Clock, log: LoopLogger) -> None:
        self._upstream = upstream
        self._revocations = revocations
        self._clock = clock
        self._by_credential: dict[str, _CachedAuthority] = {}
        self._revocations_version = -1
        self._next_expiry = float("-inf")
        self._loop = BackgroundLoop(
            "watchers' authority", self._check_all, interval=AUTHORITY_SECONDS, restart=True, log=log
        )

    @contextlib.asynccontextmanager
    async def run(self) -> AsyncGenerator[None]:
        """Check while the context is open."""
        async with self._loop:
            yield

    @contextlib.contextmanager
    def track(
        self, credential: str, task_id: str, check: Callable[[], Awaitable[object]], refuse: Callable[[OctoError], None]
    ) -> Generator[None]:
        """Check one watcher while the context is open. ``check`` raises the error with which ``refuse`` is called."""
        authority = self._by_credential.setdefault(credential, _CachedAuthority())
        if not authority.watchers:
            self._renew(credential, authority)
        watcher = _Watcher(task_id, check, refuse)
        authority.watchers[watcher] = None
        try:
            yield
        finally:
            del authority.watchers[watcher]
            if not authority.watchers:
                self._by_credential.pop(credential, None)

    async def _check_all(self) -> None:
        now = self._clock.monotonic()
        version = 0 if self._revocations is None else self._revocations.version
        if version == self._revocations_version and now < self._next_expiry:
            return
        due = [
            credential
            for credential, authority in self._by_credential.items()
            if authority.expires_at <= now or (version != self._revocations_version and self._may_be_revoked(authority))
        ]
        self._revocations_version = version
        for start in range(0, len(due), MAX_CHECKS):
            await asyncio.gather(*(self._check(credential) for credential in due[start : start + MAX_CHECKS]))
        self._next_expiry = min((each.expires_at for each in self._by_credential.values()), default=float("inf"))

    def _may_be_revoked(self, authority: _CachedAuthority) -> bool:
        # The token is the orchestrator's own: reading it is enough to see that it is revoked.
        if self._revocations is None or authority.links is None:
            return True
        return self._revocations.is_revoked(authority.links)

    async def _check(self, credential: str) -> None:
        authority = self._by_credential.get(credential)
        if authority is None:
            return
        by_task: dict[str, list[_Watcher]] = {}
        for watcher in authority.watchers:
            by_task.setdefault(watcher.task_id, []).append(watcher)
        for watchers in by_task.values():
            try:
                await watchers[0].check()
            except OctoError as error:
                if is_transient(error):
                    authority.expires_at = float("-inf")  # due again at the next round
                    return
                for watcher in watchers:
                    watcher.refuse(error)
        self._renew(credential, authority)

    def _renew(self, credential: str, authority: _CachedAuthority) -> None:
        cached = self._upstream.get_cached_token(credential)
        if cached is None:
            return
        authority.expires_at = cached.expires_at
        self._next_expiry = min(self._next_expiry, cached.expires_at)
        with contextlib.suppress(CapabilityError):
            authority.links = read_chain(cached.token).links


@dataclass(slots=True)
class LiveConnections:
    """Opens live sessions, and bounds how many there are."""

    authenticator: CredentialAuthenticator
    upstream: Upstream
    feeds: TaskFeeds
    authority: WatcherAuthority
    clock: Clock
    metrics: Metrics
    draining: asyncio.Event
    timing: SessionTiming = field(default_factory=SessionTiming)
    send_timeout: float = SEND_TIMEOUT_SECONDS
    counter: ConnectionCounter = field(default_factory=ConnectionCounter)
    _drains: dict[Callable[[], None], None] = field(default_factory=dict[Callable[[], None], None])

    @contextlib.asynccontextmanager
    async def run(self) -> AsyncGenerator[None]:
        """Check the authority of those who watch, and close their connections at the drain."""
        draining = asyncio.create_task(self._wait_for_drain(), name="drain of live connections")
        async with self.authority.run():
            try:
                yield
            finally:
                draining.cancel()

    @contextlib.contextmanager
    def close_on_drain(self, close: Callable[[], None]) -> Generator[None]:
        """Have ``close`` called once the gateway drains, while the context is open."""
        self._drains[close] = None
        if self.draining.is_set():
            close()
        try:
            yield
        finally:
            self._drains.pop(close, None)

    async def _wait_for_drain(self) -> None:
        await self.draining.wait()
        for close in list(self._drains):
            close()

    async def open_session(self, credential: str, connection: HTTPConnection) -> LiveSession:
        """Return an open session on the task in the path, from the position in the query or ``Last-Event-ID``.

        It reads for itself until it is forked for a reader of :meth:`follow`. Raises ``task_not_found``,
        ``scope_missing``, ``invalid_parameter``, ``draining``.
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
            self.feeds.text_source,
            self.clock,
            position=parse_resume_position(after, query.getlist("offset")),
            timing=self.timing,
        )
        await session.open()
        return session

    @contextlib.asynccontextmanager
    async def follow(
        self,
        credential: str,
        task_id: str,
        on_refusal: Callable[[OctoError], None] | None = None,
    ) -> AsyncGenerator[FeedReader]:
        """Yield a reader of the task's feed, whose caller's authority is checked while the context is open.

        A refusal lets its next read fail, or calls ``on_refusal``.
        """
        async with self.feeds.join(task_id, UpstreamTask(self.upstream, credential, task_id)) as reader:
            with self.authority.track(credential, task_id, reader.view, on_refusal or reader.refuse):
                yield reader

    @contextlib.contextmanager
    def count_connection(self, kind: str, credential: str, connection: HTTPConnection) -> Generator[None]:
        """Count a connection while the context is open. Raises ``overloaded`` and ``too_many_connections``."""
        peer = connection.client.host if connection.client is not None else ""
        # This generator lives as long as the connection, and would keep the whole head of its request.
        del connection
        with self.counter.count(credential, peer):
            self.metrics.live_connections.labels(kind).inc()
            try:
                yield
            finally:
                self.metrics.live_connections.labels(kind).dec()

    async def send_within_timeout(self, sending: Awaitable[None]) -> None:
        """Send one frame. Raises :class:`SlowConsumerError` after ``send_timeout`` seconds."""
        # Frames are made one at a time, so only this one and the connection's buffer (64 KiB) are ever queued.
        try:
            async with asyncio.timeout(self.send_timeout):
                await sending
        except TimeoutError as error:
            raise SlowConsumerError from error


SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]
RETRY_EVENT = b"retry: 1000\n\n"


def encode_frame_event(frame: LiveFrame) -> bytes:
    """Return a frame as an event. Its id is the ``seq``, from which a client resumes."""
    return encode_sse(frame, event_id=frame.seq)


class FrameEventResponse(Response):
    """The frames of one session, until the final one."""

    def __init__(self, connections: LiveConnections, session: LiveSession, credential: str, task_id: str) -> None:
        super().__init__()
        self._connections = connections
        self._session = session
        self._credential = credential
        self._task_id = task_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until the final frame, a disconnect or the drain."""
        disconnect_silent_client(scope)
        connections = self._connections

        async def write(body: bytes, *, more: bool = True) -> None:
            message = {"type": "http.response.body", "body": body, "more_body": more}
            await connections.send_within_timeout(send(message))

        async def send_frames() -> None:
            async with (
                connections.follow(self._credential, self._task_id) as reader,
                contextlib.aclosing(self._session.fork(reader, reader).frames(reader)) as frames,
            ):
                async for frame in frames:
                    await write(encode_frame_event(frame))

        with connections.count_connection("sse", self._credential, HTTPConnection(scope)):
            await send({"type": "http.response.start", "status": 200, "headers": SSE_HEADERS})
            # The status is sent: an error can only end the stream. The client reconnects and gets it as a response.
            with contextlib.suppress(OctoError, SlowConsumerError):
                await write(RETRY_EVENT)
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
        return FrameEventResponse(connections, session, call.bearer, str(call.path["task_id"]))

    return implement(WATCH_TASK, handle, auth="gateway")
