"""The public API that the orchestrator answers: how each call is passed on."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from urllib.parse import quote, urlencode

from starlette.requests import Request
from starlette.responses import Response

from octollm.contracts.listing import LAST_EVENT_ID_DESCRIPTION
from octollm.contracts.operations import FILE_NAME_DESCRIPTION
from octollm.contracts.task import MAX_FILE_BYTES
from octollm.errors import OctoError
from octollm.rpc.call import JSON, IncomingCall, Operation, OperationDocs
from octollm.rpc.http import HttpResponse
from octollm.services.reflex.goal_screen import InputGuardrail
from octollm.services.reflex.paths import PUBLIC_ROUTES, PublicRoute
from octollm.services.reflex.relay import StreamProxyResponse
from octollm.services.reflex.upstream import Upstream, UpstreamRequest

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
