"""Responses: a writer that sends in one write where the server can, gzip, ETags and 304.

RFC 9110 sections 12.5.3 (``Accept-Encoding``), 8.8.3 (``ETag``), 13.1.2 (``If-None-Match``) and 15.4.5 (304).
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import re
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, cast

import msgspec
from starlette.responses import Response
from starlette.types import Scope, Send

from octollm.rpc.asgi_extension import WholeRequestExtension
from octollm.rpc.auth import AuthContext
from octollm.rpc.limits import receive_never

_JSON_CONTENT_TYPE = (b"content-type", b"application/json")


class BufferedResponse(msgspec.Struct, frozen=True):
    """A whole response in JSON, much cheaper to make than a Starlette response."""

    status_code: int
    body: bytes
    raw_headers: list[tuple[bytes, bytes]]

    @classmethod
    def from_json(cls, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> BufferedResponse:
        """Return a response with its content headers and ``headers``."""
        raw = [_JSON_CONTENT_TYPE, (b"content-length", str(len(body)).encode())]
        if headers:
            raw += [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        return cls(status, body, raw)


class ResponseWriter:
    """Sends the response of one call, and is an ASGI ``send`` for responses that come in parts.

    ``accept`` is the value of ``Accept-Encoding``, if there was one.
    """

    __slots__ = ("_accept", "_correlation_id", "_request_id", "_send", "auth", "extension", "status")

    def __init__(
        self,
        send: Send,
        extension: WholeRequestExtension | None,
        request_id: str,
        correlation_id: str,
        accept: bytes | None,
    ) -> None:
        self._send = send
        self._accept = accept
        self._request_id = request_id
        self._correlation_id = correlation_id
        self.extension = extension
        self.auth: AuthContext | None = None
        """Set once the call is authenticated."""
        self.status = 0
        """The status that was sent, or 0."""

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        """Send an ASGI message, with the ids of the call in its head."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), *self._id_headers()]
        await self._send(message)

    async def send_response(self, response: BufferedResponse | Response, scope: Scope) -> None:
        """Send a response; a Starlette response of another class (a stream, a file) sends itself."""
        if response.__class__ not in (BufferedResponse, Response):
            await cast("Response", response)(scope, receive_never, self)
            return
        own: Headers
        body, own = bytes(response.body), response.raw_headers
        if self._accept is not None and len(body) >= MIN_COMPRESSED_BYTES:
            body, own = await compress(body, own, self._accept)
        headers = [*own, *self._id_headers()]
        self.status = response.status_code
        if self.extension is not None and self.extension.respond(response.status_code, headers, body):
            return
        await self._send({"type": "http.response.start", "status": response.status_code, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    def _id_headers(self) -> tuple[tuple[bytes, bytes], tuple[bytes, bytes]]:
        return (b"x-request-id", self._request_id.encode()), (b"x-correlation-id", self._correlation_id.encode())


MIN_COMPRESSED_BYTES = 1024
"""Smaller responses are not compressed: it would gain nothing."""
_MAX_INLINE_BYTES = 64 * 1024
"""Larger bodies are compressed in a thread, so that the event loop does not stall."""
_LEVEL = 5
_COMPRESSIBLE = re.compile(rb"(text/|application/([a-z.-]+\+)?(json|javascript|xml|yaml)\b|image/svg)")
_ZERO_QUALITY = re.compile(r"q=0(\.0{0,3})?")

Headers = Sequence[tuple[bytes, bytes]]


def accepts_gzip(header: bytes) -> bool:
    """Say whether an ``Accept-Encoding`` header accepts gzip; ``gzip`` takes precedence over ``*``."""
    accepted: dict[str, bool] = {}
    for part in header.decode("latin-1").lower().split(","):
        name, _, weight = (piece.strip() for piece in part.partition(";"))
        accepted[name] = _ZERO_QUALITY.fullmatch(weight.replace(" ", "")) is None
    return accepted.get("gzip", accepted.get("*", False))


async def compress(body: bytes, headers: Headers, accept: bytes) -> tuple[bytes, Headers]:
    """Return body and headers, compressed if the client's ``Accept-Encoding`` allows it.

    A strong ``ETag`` becomes weak, since the bytes change (RFC 9110 section 8.8.1).
    """
    named = dict(headers)
    if _COMPRESSIBLE.match(named.get(b"content-type", b"")) is None or b"content-encoding" in named:
        return body, headers
    # On the plain response as well: a cache has to keep the two apart.
    varied = [*headers, (b"vary", b"Accept-Encoding")]
    if not accepts_gzip(accept):
        return body, varied
    if len(body) <= _MAX_INLINE_BYTES:
        small = gzip.compress(body, _LEVEL, mtime=0)
    else:
        small = await asyncio.to_thread(gzip.compress, body, _LEVEL, mtime=0)
    changed = {b"content-length": str(len(small)).encode()}
    if (tag := named.get(b"etag")) is not None and not tag.startswith(b"W/"):
        changed[b"etag"] = b"W/" + tag
    rest = [(name, changed.get(name, value)) for name, value in varied]
    return small, [*rest, (b"content-encoding", b"gzip")]


_TAG = re.compile(rb'(?:W/)?("[\x21\x23-\x7e\x80-\xff]*")')
_NOT_MODIFIED_HEADERS = (b"etag", b"cache-control", b"content-location", b"expires", b"vary")
MAX_TAGS = 64
"""Further tags of one ``If-None-Match`` are ignored."""


def apply_etag(response: BufferedResponse | Response, if_none_match: bytes | None) -> BufferedResponse | Response:
    """Return the response with an ETag, or 304 if ``If-None-Match`` has that tag.

    A response without an ETag gets one from its body. Caches have to revalidate it each time, unless it has a
    ``Cache-Control`` of its own. A status other than 200 is returned unchanged.
    """
    if response.status_code != 200:
        return response
    headers = response.raw_headers
    names = {name for name, _ in headers}
    if b"etag" not in names:
        headers.append((b"etag", b'"%s"' % hashlib.sha256(bytes(response.body)).hexdigest()[:32].encode()))
    if b"cache-control" not in names:
        headers.append((b"cache-control", b"private, no-cache"))
    if if_none_match is None or not _matches_etag(
        if_none_match, next(value for name, value in headers if name == b"etag")
    ):
        return response
    return BufferedResponse(304, b"", [(name, value) for name, value in headers if name in _NOT_MODIFIED_HEADERS])


def _matches_etag(if_none_match: bytes, tag: bytes) -> bool:
    if if_none_match.strip() == b"*":
        return True
    # Weak comparison (section 8.8.3.2): a compressed body is the same representation.
    plain = tag.removeprefix(b"W/")
    return any(match[1] == plain for match, _ in zip(_TAG.finditer(if_none_match), range(MAX_TAGS), strict=False))
