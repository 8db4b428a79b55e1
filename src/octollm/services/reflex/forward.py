"""The public API that the orchestrator answers: how each call is passed on."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from urllib.parse import quote, urlencode

from starlette.requests import Request
from starlette.responses import Response

from octollm.contracts.listing import LAST_EVENT
from octollm.contracts.operations import FILE_NAME
from octollm.contracts.task import MAX_FILE_BYTES
from octollm.errors import OctoError
from octollm.rpc.call import JSON, About, Call, Operation
from octollm.rpc.http import Answer
from octollm.services.reflex.goal_screen import GoalScreen
from octollm.services.reflex.paths import PUBLIC, PublicPath
from octollm.services.reflex.relay import Relay
from octollm.services.reflex.upstream import Asked, Upstream

MAX_JSON = 1024 * 1024
"""Bytes of a JSON body."""
EVENT_STREAM = "text/event-stream"
FOLLOW_SECONDS = 3600.0

_PASSED_BACK = ("location", "etag", "retry-after", "content-disposition")
_FILE_NAME = re.compile(r"[!-~]{1,1024}")
_LAST_EVENT = re.compile(r"[0-9]{1,15}")


class Forward:
    """Passes public calls on to the orchestrator in the name of whoever makes them."""

    def __init__(self, upstream: Upstream, screen: GoalScreen, draining: asyncio.Event) -> None:
        self._upstream = upstream
        self._screen = screen
        self._draining = draining

    def operations(self) -> list[Operation]:
        """Return the operations of the public API."""
        return [self._operation(public) for public in PUBLIC]

    def _operation(self, public: PublicPath) -> Operation:
        async def handle(call: Call, body: object) -> Response:
            del body
            asked = _asked(public, call)
            if public.name == "tasks.submit":
                asked = replace(asked, headers={**asked.headers, **await self._screen.check(call)})
            if public.name == "events.read" and EVENT_STREAM in call.request.headers.get("accept", ""):
                return Relay(self._upstream, call.bearer, _followed(asked, call), call.deadline, self._draining)
            return _response(await self._upstream.send(call.bearer, asked, call.deadline), public)

        stream = public.name == "events.read"
        return Operation(
            public.name,
            public.method,
            public.path,
            handle,
            kind=public.kind,
            auth="door",
            query=public.query,
            body=public.body,
            answer=public.answer,
            status=public.status,
            raw=True,
            cacheable=public.cacheable,
            max_body=(MAX_FILE_BYTES if public.file else MAX_JSON) if public.method == "POST" else 0,
            limited=not stream,
            traced=public.traced,
            timeout=FOLLOW_SECONDS if stream else 60.0,
            summary=public.summary,
            about=_about(public),
        )


def _about(public: PublicPath) -> About:
    headers: dict[str, str] = {}
    if public.file and public.method == "POST":
        headers["X-File-Name"] = FILE_NAME
    if public.name == "events.read":
        headers["Last-Event-ID"] = LAST_EVENT
    media = "*/*" if public.file and public.method == "GET" else JSON
    return About(media, EVENT_STREAM if public.name == "events.read" else "", headers, public.codes)


def _asked(public: PublicPath, call: Call) -> Asked:
    values = {name: quote(str(value), safe="") for name, value in call.path.items()}
    path = (public.to or public.path).format_map(values)
    query = [(name, value) for name, value in call.request.query_params.multi_items() if public.passes_on(name)]
    has_body = public.method == "POST"
    headers = _file_name(call.request) if has_body and public.file else {}
    held = call.request.headers.get("if-none-match")
    if public.cacheable and held is not None:
        headers["If-None-Match"] = held
    return Asked(
        public.name,
        public.method,
        f"{path}?{urlencode(query)}" if query else path,
        public.kind,
        call.body if has_body else None,
        call.key,
        "application/octet-stream" if public.file else "application/json",
        headers,
    )


def _file_name(request: Request) -> dict[str, str]:
    name = request.headers.get("x-file-name")
    if name is None:
        return {}
    if not _FILE_NAME.fullmatch(name):
        raise OctoError("X-File-Name must be a percent-encoded name (RFC 3986).", code="invalid_header")
    return {"X-File-Name": name}


def _followed(asked: Asked, call: Call) -> Asked:
    headers = {"Accept": EVENT_STREAM}
    last = call.request.headers.get("last-event-id", "")
    if _LAST_EVENT.fullmatch(last):
        headers["Last-Event-ID"] = last
    return Asked(asked.name, asked.method, asked.path, asked.kind, headers=headers)


def _response(answer: Answer, public: PublicPath) -> Response:
    headers = {name: answer.headers[name] for name in _PASSED_BACK if name in answer.headers}
    kind = answer.headers.get("content-type", "application/octet-stream")
    if public.file and public.method == "GET":
        # A file is anybody's bytes: it is saved, never shown as a page of ours.
        headers.setdefault("content-disposition", "attachment")
        headers["cache-control"] = "private, max-age=31536000, immutable"
    else:
        headers["cache-control"] = "private, no-cache" if public.cacheable else "no-store"
    # Given as a header, so that no charset is added to a text that may have another.
    return Response(answer.body, status_code=answer.status, headers={**headers, "content-type": kind})
