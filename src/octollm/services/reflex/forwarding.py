"""Reverse proxy to the orchestrator: each public route becomes an operation whose request is forwarded and whose response, whole or streamed, is passed back."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from urllib.parse import quote, urlencode

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from octollm.concurrency import run_until_first
from octollm.contracts.api import LAST_EVENT_ID_DESCRIPTION
from octollm.contracts.operations import FILE_NAME_DESCRIPTION
from octollm.contracts.task import MAX_FILE_BYTES
from octollm.errors import OctoError
from octollm.resilience import Deadline
from octollm.rpc.call import JSON, IncomingCall, Operation, OperationDocs
from octollm.rpc.http_client import HttpResponse, StreamedResponse
from octollm.services.reflex.public_routes import PUBLIC_ROUTES, PublicRoute
from octollm.services.reflex.screening import InputGuardrail
from octollm.services.reflex.upstream import Upstream, UpstreamRequest

_DRAIN_INDEX = 2
"""The place of the drain among what ends a relay."""


class StreamProxyResponse(Response):
    """Opens the call when it is sent, so that a refusal is still answered as one."""

    def __init__(
        self, upstream: Upstream, credential: str, request: UpstreamRequest, deadline: Deadline, draining: asyncio.Event
    ) -> None:
        super().__init__()
        self._upstream = upstream
        self._credential = credential
        self._request = request
        self._deadline = deadline
        self._draining = draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer until it ends, the reader goes away, or the door drains."""
        del scope
        begun = False

        async def consume(streamed: StreamedResponse) -> None:
            nonlocal begun
            begun = True
            kind = streamed.headers.get("content-type", "application/octet-stream")
            headers = [(b"content-type", kind.encode("latin-1")), (b"cache-control", b"no-store")]
            await send({"type": "http.response.start", "status": streamed.status, "headers": headers})
            try:
                async for chunk in streamed.chunks:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            except (OctoError, ConnectionError, TimeoutError):
                return  # the other side is gone: the reader connects again and goes on from what it has

        async def relay() -> None:
            try:
                await self._upstream.stream(self._credential, self._request, self._deadline, consume)
            except OctoError:
                if not begun:
                    raise

        async def gone() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        ended = await run_until_first(relay(), gone(), self._draining.wait())
        if begun:
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        elif ended == _DRAIN_INDEX:
            raise OctoError("The service is shutting down.", code="draining", retry_after=1)


MAX_JSON_BYTES = 1024 * 1024
"""Bytes of a JSON body."""
EVENT_STREAM = "text/event-stream"
STREAM_SECONDS = 3600.0

_FORWARDED_HEADERS = ("location", "etag", "retry-after", "content-disposition")
_FILE_NAME = re.compile(r"[!-~]{1,1024}")
_LAST_EVENT = re.compile(r"[0-9]{1,15}")


class RequestForwarder:
    """Passes public calls on to the orchestrator in the name of whoever makes them."""

    def __init__(self, upstream: Upstream, guardrail: InputGuardrail, draining: asyncio.Event) -> None:
        self._upstream = upstream
        self._guardrail = guardrail
        self._draining = draining

    def operations(self) -> list[Operation]:
        """Return the operations of the public API."""
        return [self._build_operation(public) for public in PUBLIC_ROUTES]

    def _build_operation(self, route: PublicRoute) -> Operation:
        async def handle(call: IncomingCall, body: object) -> Response:
            del body
            asked = _build_request(route, call)
            if route.name == "tasks.submit":
                asked = replace(asked, headers={**asked.headers, **await self._guardrail.check(call)})
            if route.name == "events.read" and EVENT_STREAM in call.request.headers.get("accept", ""):
                return StreamProxyResponse(
                    self._upstream, call.bearer, _build_stream_request(asked, call), call.deadline, self._draining
                )
            return _build_response(await self._upstream.send(call.bearer, asked, call.deadline), route)

        stream = route.name == "events.read"
        return Operation(
            route.name,
            route.method,
            route.path,
            handle,
            kind=route.kind,
            auth="door",
            query=route.query,
            body=route.body,
            response=route.answer,
            status=route.status,
            raw=True,
            cacheable=route.cacheable,
            max_body=(MAX_FILE_BYTES if route.is_file else MAX_JSON_BYTES) if route.method == "POST" else 0,
            limited=not stream,
            traced=route.traced,
            timeout=STREAM_SECONDS if stream else 60.0,
            summary=route.summary,
            docs=_describe_route(route),
        )


def _describe_route(route: PublicRoute) -> OperationDocs:
    headers: dict[str, str] = {}
    if route.is_file and route.method == "POST":
        headers["X-File-Name"] = FILE_NAME_DESCRIPTION
    if route.name == "events.read":
        headers["Last-Event-ID"] = LAST_EVENT_ID_DESCRIPTION
    media = "*/*" if route.is_file and route.method == "GET" else JSON
    return OperationDocs(media, EVENT_STREAM if route.name == "events.read" else "", headers, route.codes)


def _build_request(route: PublicRoute, call: IncomingCall) -> UpstreamRequest:
    values = {name: quote(str(value), safe="") for name, value in call.path.items()}
    path = (route.upstream_path or route.path).format_map(values)
    query = [(name, value) for name, value in call.request.query_params.multi_items() if route.forwards_parameter(name)]
    has_body = route.method == "POST"
    headers = _read_file_name(call.request) if has_body and route.is_file else {}
    held = call.request.headers.get("if-none-match")
    if route.cacheable and held is not None:
        headers["If-None-Match"] = held
    return UpstreamRequest(
        route.name,
        route.method,
        f"{path}?{urlencode(query)}" if query else path,
        route.kind,
        call.body if has_body else None,
        call.key,
        "application/octet-stream" if route.is_file else "application/json",
        headers,
    )


def _read_file_name(request: Request) -> dict[str, str]:
    name = request.headers.get("x-file-name")
    if name is None:
        return {}
    if not _FILE_NAME.fullmatch(name):
        raise OctoError("X-File-Name must be a percent-encoded name (RFC 3986).", code="invalid_header")
    return {"X-File-Name": name}


def _build_stream_request(request: UpstreamRequest, call: IncomingCall) -> UpstreamRequest:
    headers = {"Accept": EVENT_STREAM}
    last = call.request.headers.get("last-event-id", "")
    if _LAST_EVENT.fullmatch(last):
        headers["Last-Event-ID"] = last
    return UpstreamRequest(request.name, request.method, request.path, request.kind, headers=headers)


def _build_response(response: HttpResponse, route: PublicRoute) -> Response:
    headers = {name: response.headers[name] for name in _FORWARDED_HEADERS if name in response.headers}
    kind = response.headers.get("content-type", "application/octet-stream")
    if route.is_file and route.method == "GET":
        # A file is anybody's bytes: it is saved, never shown as a page of ours.
        headers.setdefault("content-disposition", "attachment")
        headers["cache-control"] = "private, max-age=31536000, immutable"
    else:
        headers["cache-control"] = "private, no-cache" if route.cacheable else "no-store"
    # Given as a header, so that no charset is added to a text that may have another.
    return Response(response.body, status_code=response.status, headers={**headers, "content-type": kind})
