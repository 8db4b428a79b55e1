"""Reverse proxy to the orchestrator and the memory for every declared public operation.

A request is forwarded with the caller's access token; the response comes back whole or as a stream.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from urllib.parse import urlencode

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from octollm.concurrency import run_until_first
from octollm.contracts.declarations import JSON, AnyOperation
from octollm.contracts.public_api import PUBLIC_OPERATIONS
from octollm.contracts.schedules import CREATE_SCHEDULE
from octollm.contracts.steering import InstructionRequest
from octollm.contracts.task_operations import INSTRUCT_TASK, SUBMIT_TASK
from octollm.errors import OctoError
from octollm.resilience import Deadline
from octollm.rpc.call import IncomingCall, Operation, implement
from octollm.rpc.http_client import HttpResponse, StreamedResponse
from octollm.rpc.limits import wait_for_disconnect
from octollm.services.reflex.screening import InputGuardrail
from octollm.services.reflex.upstream import AUDIENCES, Audience, Upstream, UpstreamRequest

FORWARD_TIMEOUT_SECONDS = 60.0

_FORWARDED_HEADERS = ("location", "etag", "retry-after", "content-disposition")
_CONDITIONS = frozenset({"If-Match", "If-None-Match"})
"""Preconditions of a change (RFC 9110 section 13.1), forwarded to an operation that declares them."""
_FILE_NAME = re.compile(r"[!-~]{1,1024}")
_LAST_EVENT = re.compile(r"[0-9]{1,15}")


class StreamProxyResponse(Response):
    """A stream of the orchestrator, passed on chunk by chunk.

    The upstream call starts when the response is sent: an error before the first byte still becomes a problem.
    """

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
        """Send the stream until it ends, the client disconnects, or the gateway drains."""
        del scope
        started = False

        async def consume(streamed: StreamedResponse) -> None:
            nonlocal started
            started = True
            media_type = streamed.headers.get("content-type", "application/octet-stream")
            headers = [(b"content-type", media_type.encode("latin-1")), (b"cache-control", b"no-store")]
            await send({"type": "http.response.start", "status": streamed.status, "headers": headers})
            try:
                async for chunk in streamed.chunks:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            except (OctoError, ConnectionError, TimeoutError):
                return  # Either side has gone. The client reconnects with the id of its last event.

        async def relay() -> None:
            try:
                await self._upstream.stream(self._credential, self._request, self._deadline, consume)
            except OctoError:
                # After the first byte the status is sent: the stream can only end.
                if not started:
                    raise

        await run_until_first(relay(), wait_for_disconnect(receive), self._draining.wait())
        if started:
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        elif self._draining.is_set():
            raise OctoError("The service is shutting down.", code="draining", retry_after=1)


class RequestForwarder:
    """Forwards public calls to the service that does the work, in the name of their caller.

    Bodies and responses pass through as they are. The orchestrator validates bodies strictly; services ignore members
    that they do not know, so bodies for the memory are validated here. Of the query, only declared
    parameters pass, so that a token in the URL ends here.
    """

    def __init__(self, upstream: Upstream, guardrail: InputGuardrail, draining: asyncio.Event) -> None:
        self._upstream = upstream
        self._guardrail = guardrail
        self._draining = draining

    def operations(self) -> list[Operation]:
        """Return the declared operations whose work another service does."""
        return [
            self._build_operation(declared, audience)
            for audience in AUDIENCES
            for declared in PUBLIC_OPERATIONS
            if declared.service == audience
        ]

    def _build_operation(self, declared: AnyOperation, audience: Audience) -> Operation:
        async def handle(call: IncomingCall, body: object) -> Response:
            del body
            request = replace(_build_request(declared, call), service=audience)
            if declared in (SUBMIT_TASK, CREATE_SCHEDULE):
                request = replace(request, headers={**request.headers, **await self._guardrail.check(call)})
            elif declared is INSTRUCT_TASK:
                await self._check_instruction(call)
            if declared.stream_media_type and declared.stream_media_type in call.request.headers.get("accept", ""):
                stream_request = _build_stream_request(request, call, declared.stream_media_type)
                return StreamProxyResponse(self._upstream, call.bearer, stream_request, call.deadline, self._draining)
            return _build_response(await self._upstream.send(call.bearer, request, call.deadline), declared)

        raw = audience == "orchestrator"
        return implement(declared, handle, auth="gateway", raw=raw, timeout=FORWARD_TIMEOUT_SECONDS)

    async def _check_instruction(self, call: IncomingCall) -> None:
        try:
            text = msgspec.json.decode(call.body, type=InstructionRequest).text
        except (msgspec.DecodeError, UnicodeDecodeError):
            return  # The orchestrator validates the body and reports its faults.
        await self._guardrail.check_instruction(call.bearer, text, call.deadline)


def _build_request(declared: AnyOperation, call: IncomingCall) -> UpstreamRequest:
    path = declared.format_service_path(**{name: str(value) for name, value in call.path.items()})
    parameters = declared.query_parameters
    query = [(name, value) for name, value in call.request.query_params.multi_items() if name in parameters]
    has_body = declared.body_limit > 0
    headers = _read_file_name(call.request) if declared.sends_file else {}
    etag = call.request.headers.get("if-none-match")
    if declared.cacheable and etag is not None:
        headers["If-None-Match"] = etag
    for name in _CONDITIONS & declared.headers.keys():
        if (condition := call.request.headers.get(name)) is not None:
            headers[name] = condition
    return UpstreamRequest(
        declared.id,
        declared.method,
        f"{path}?{urlencode(query)}" if query else path,
        declared.kind,
        call.body if has_body else None,
        call.key,
        "application/octet-stream" if declared.sends_file else JSON,
        headers,
    )


def _read_file_name(request: Request) -> dict[str, str]:
    name = request.headers.get("x-file-name")
    if name is None:
        return {}
    if not _FILE_NAME.fullmatch(name):
        raise OctoError("X-File-Name must be a percent-encoded name (RFC 3986).", code="invalid_header")
    return {"X-File-Name": name}


def _build_stream_request(request: UpstreamRequest, call: IncomingCall, media_type: str) -> UpstreamRequest:
    headers = {"Accept": media_type}
    last = call.request.headers.get("last-event-id", "")
    if _LAST_EVENT.fullmatch(last):
        headers["Last-Event-ID"] = last
    return UpstreamRequest(request.name, request.method, request.path, request.kind, headers=headers)


def _build_response(response: HttpResponse, declared: AnyOperation) -> Response:
    headers = {name: response.headers[name] for name in _FORWARDED_HEADERS if name in response.headers}
    media_type = response.headers.get("content-type", "application/octet-stream")
    if declared.service_path and "location" in headers and declared.path.endswith(declared.service_path):
        # The service names a path of its own.
        headers["location"] = declared.path.removesuffix(declared.service_path) + headers["location"]
    if declared.returns_file:
        # A file may hold a page with scripts: the browser saves it and never shows it under this origin.
        headers.setdefault("content-disposition", "attachment")
        # The digest of a file is its address, so what is behind an address never changes.
        headers["cache-control"] = "private, max-age=31536000, immutable"
    else:
        headers["cache-control"] = "private, no-cache" if declared.cacheable else "no-store"
    # As a header, because Starlette's media_type would add a charset that the text may not have.
    return Response(response.body, status_code=response.status, headers={**headers, "content-type": media_type})
