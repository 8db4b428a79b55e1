"""``WS /ws/dashboard`` and ``GET /dashboard/events``: everything that the caller may see, as a stream of frames."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from urllib.parse import urlencode

import msgspec
from msgspec import UNSET
from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket

from octollm.concurrency import run_until_first
from octollm.contracts.dashboard import Changes, ChangesQuery, DashboardQuery
from octollm.contracts.internal_operations import READ_CHANGES, READ_EVENT_CHANGES
from octollm.contracts.observability import ServiceStates
from octollm.contracts.public_api import LIST_SERVICES, WATCH_DASHBOARD
from octollm.errors import OctoError
from octollm.framing import encode_sse
from octollm.live import DashboardFeeds, DashboardSession
from octollm.rpc.asgi_extension import disconnect_silent_client
from octollm.rpc.call import IncomingCall, Operation, implement
from octollm.rpc.limits import wait_for_disconnect
from octollm.services.reflex.live import RETRY_EVENT, SSE_HEADERS, LiveConnections, SlowConsumerError
from octollm.services.reflex.upstream import Upstream
from octollm.services.reflex.websocket import SERVICE_RESTART, CloseConnection

MAX_MESSAGES = 64
"""Messages of a client, which are ignored, after which its socket is closed."""


@dataclass(frozen=True, slots=True)
class UpstreamDashboard:
    """The orchestrator and the monitor, as one caller may read them: the source of a dashboard session."""

    upstream: Upstream
    credential: str

    async def changes(self, query: ChangesQuery) -> Changes:
        """Return a page of changes, or the present state."""
        wanted, parameters = query.parts, urlencode(msgspec.to_builtins(query))
        for part, declared in (("tasks", READ_CHANGES), ("events", READ_EVENT_CHANGES)):
            is_allowed = await self.upstream.may_call(self.credential, declared)
            if part in wanted and not is_allowed:
                raise OctoError(f"The caller lacks {declared.scope}.", code="scope_missing")
            if is_allowed and (not wanted or part in wanted):
                return await self.upstream.call(self.credential, declared, parameters)
        # The services have no position.
        return Changes(self.upstream.get_tenant(self.credential), (), 0 if query.after is UNSET else query.after)

    async def services(self) -> ServiceStates:
        """Return the state of the services."""
        return await self.upstream.call(self.credential, LIST_SERVICES)


@dataclass(frozen=True, slots=True)
class DashboardStreams:
    """Opens dashboard sessions, and sends their frames."""

    connections: LiveConnections
    feeds: DashboardFeeds

    async def serve_websocket(self, websocket: WebSocket) -> None:
        """Send frames until the client goes, is refused, or the gateway drains."""
        connections = self.connections
        credential = await connections.authenticator.authenticate(websocket)
        with connections.count_connection("dashboard", credential, websocket):
            async with self._open(credential, websocket) as session:
                await websocket.accept()

                async def send_frames() -> None:
                    async with contextlib.aclosing(session.frames()) as frames:
                        async for frame in frames:
                            text = msgspec.json.encode(frame).decode()
                            await connections.send_within_timeout(websocket.send_text(text))

                await run_until_first(send_frames(), _ignore_messages(websocket), connections.draining.wait())
        if connections.draining.is_set():
            raise OctoError("The service is shutting down.", code="draining", retry_after=1)

    @contextlib.asynccontextmanager
    async def _open(self, credential: str, connection: HTTPConnection) -> AsyncGenerator[DashboardSession]:
        """Yield an open session, whose caller's authority is checked while the context is open."""
        connections = self.connections
        if connections.draining.is_set():
            raise OctoError("The service is shutting down.", code="draining", retry_after=1)
        query = _read_query(connection)
        session = DashboardSession(
            self.feeds,
            UpstreamDashboard(connections.upstream, credential),
            ChangesQuery(query.after, query.status, query.text, query.include, query.limit),
            await connections.upstream.may_call(credential, LIST_SERVICES),
            connections.timing,
        )
        await session.open()
        if query.tenant not in ("", session.tenant):
            raise OctoError("There is no such tenant.", code="not_found")

        async def check() -> None:
            await session.check()
            if "services" in session.includes and not await connections.upstream.may_call(credential, LIST_SERVICES):
                raise OctoError("The caller lacks monitor:read.", code="scope_missing")

        def refuse(error: OctoError) -> None:
            lost = error.code in ("scope_missing", "authority_missing")
            session.refuse(CloseConnection(SERVICE_RESTART, "authority changed") if lost else error)

        with connections.authority.track(credential, f"dashboard {','.join(session.includes)}", check, refuse):
            yield session

    def build_sse_operation(self) -> Operation:
        """Return the operation that streams the frames as server-sent events."""

        async def handle(call: IncomingCall, _body: object) -> Response:
            stack = contextlib.AsyncExitStack()
            try:
                stack.enter_context(self.connections.count_connection("dashboard", call.bearer, call.request))
                session = await stack.enter_async_context(self._open(call.bearer, call.request))
            except BaseException:
                await stack.aclose()
                raise
            return _DashboardEventResponse(self.connections, session, stack)

        return implement(WATCH_DASHBOARD, handle, auth="gateway")


class _DashboardEventResponse(Response):
    """The frames of one session as events, whose id is the ``seq``."""

    def __init__(
        self, connections: LiveConnections, session: DashboardSession, stack: contextlib.AsyncExitStack
    ) -> None:
        super().__init__()
        self._connections = connections
        self._session = session
        self._stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until a disconnect, a refusal or the drain."""
        disconnect_silent_client(scope)
        connections = self._connections

        async def write(body: bytes, *, more: bool = True) -> None:
            message = {"type": "http.response.body", "body": body, "more_body": more}
            await connections.send_within_timeout(send(message))

        async def send_frames() -> None:
            async with contextlib.aclosing(self._session.frames()) as frames:
                async for frame in frames:
                    await write(encode_sse(frame, event_id=frame.seq))

        async with self._stack:
            await send({"type": "http.response.start", "status": 200, "headers": SSE_HEADERS})
            # The status is sent: an error can only end the stream. The client reconnects and gets it as a response.
            with contextlib.suppress(OctoError, SlowConsumerError, CloseConnection):
                await write(RETRY_EVENT)
                await run_until_first(send_frames(), wait_for_disconnect(receive), connections.draining.wait())
            with contextlib.suppress(SlowConsumerError):
                await write(b"", more=False)


def _read_query(connection: HTTPConnection) -> DashboardQuery:
    """Return what is asked for. Raises ``invalid_parameter``."""
    members: dict[str, object] = {}
    for name in DashboardQuery.__struct_fields__:
        values = connection.query_params.getlist(name)
        if len(values) > 1 and name not in ("status", "include"):
            raise OctoError(f"`{name}` may be given once.", code="invalid_parameter")
        if values:
            members[name] = ",".join(values)
    # A browser's EventSource reconnects with this header and its first URL, whose `after` is old by then.
    if last := connection.headers.get("last-event-id"):
        members["after"] = last
    try:
        query = msgspec.convert(members, DashboardQuery, strict=False)
    except msgspec.ValidationError as error:
        raise OctoError(f"The query is wrong: {error}.", code="invalid_parameter") from error
    query.check()
    return query


async def _ignore_messages(websocket: WebSocket) -> None:
    """Return when the client has disconnected. A client has nothing to say here."""
    for _ in range(MAX_MESSAGES):
        if (await websocket.receive())["type"] == "websocket.disconnect":
            return
    raise OctoError("The dashboard takes no messages.", code="malformed_request")
