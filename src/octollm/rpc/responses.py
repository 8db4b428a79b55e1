"""Responses: a writer that sends in one write where the server can, gzip (RFC 9110 section 12.5.3), ETags and 304 (sections 8.8.3, 13.1.2, 15.4.5)."""

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
    """A whole answer in JSON: what is left of a Starlette response where nothing else is needed."""

    status_code: int
    body: bytes
    raw_headers: list[tuple[bytes, bytes]]

    @classmethod
    def from_json(cls, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> BufferedResponse:
        """Return the answer with its content headers and ``headers``."""
        raw = [_JSON_CONTENT_TYPE, (b"content-length", str(len(body)).encode())]
        if headers:
            raw += [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        return cls(status, body, raw)


class ResponseWriter:
    """The way out of one call. It is an ASGI ``send`` too, for answers that come in parts.

    ``accept`` is the call's ``Accept-Encoding``, if it had one.
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
        """In whose name the call is, once it was let in."""
        self.status = 0
        """The status that was sent; 0 while none was."""

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        """Send a message of ASGI."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), *self._id_headers()]
        await self._send(message)

    async def send_response(self, response: BufferedResponse | Response, scope: Scope) -> None:
        """Send an answer; one of Starlette's responses that comes in parts sends itself."""
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
"""Smaller answers are sent as they are: nothing would be gained."""
_MAX_INLINE_BYTES = 64 * 1024
"""Bytes that are compressed on the event loop; more are left to a thread."""
_LEVEL = 5
_COMPRESSIBLE = re.compile(rb"(text/|application/([a-z.-]+\+)?(json|javascript|xml|yaml)\b|image/svg)")
_ZERO_QUALITY = re.compile(r"q=0(\.0{0,3})?")

Headers = Sequence[tuple[bytes, bytes]]


def accepts_gzip(header: bytes) -> bool:
    """Say whether an ``Accept-Encoding`` header takes gzip; what is said of ``gzip`` counts more than of ``*``."""
    found: dict[str, bool] = {}
    for part in header.decode("latin-1").lower().split(","):
        name, _, weight = (piece.strip() for piece in part.partition(";"))
        found[name] = _ZERO_QUALITY.fullmatch(weight.replace(" ", "")) is None
    return found.get("gzip", found.get("*", False))


async def compress(body: bytes, headers: Headers, accept: bytes) -> tuple[bytes, Headers]:
    """Return an answer as a client that sent ``accept`` gets it.

    An ``ETag`` becomes weak, since the bytes are others (RFC 9110 section 8.8.1).
    """
    named = dict(headers)
    if _COMPRESSIBLE.match(named.get(b"content-type", b"")) is None or b"content-encoding" in named:
        return body, headers
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
    kept = [(name, changed.get(name, value)) for name, value in varied]
    return small, [*kept, (b"content-encoding", b"gzip")]


_TAG = re.compile(rb'(?:W/)?("[\x21\x23-\x7e\x80-\xff]*")')
_NOT_MODIFIED_HEADERS = (b"etag", b"cache-control", b"content-location", b"expires", b"vary")
MAX_TAGS = 64
"""More than these in one ``If-None-Match`` are not looked at."""


def apply_etag(response: BufferedResponse | Response, if_none_match: bytes | None) -> BufferedResponse | Response:
    """Return ``answer`` with an ETag, or 304 when ``held``, the caller's ``If-None-Match``, has it.

    An answer that has an ETag keeps it; else it is made of the body. Who stores the answer has to ask each time,
    unless it says otherwise itself. Anything but 200 is returned as it is.
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
    # The weak comparison of section 8.8.3.2: what was compressed is the same answer.
    plain = tag.removeprefix(b"W/")
    return any(found[1] == plain for found, _ in zip(_TAG.finditer(if_none_match), range(MAX_TAGS), strict=False))
