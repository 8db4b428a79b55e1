"""How an answer leaves: in one write where the server can, else as ASGI messages, with the ids of the call."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any, cast

import msgspec
from starlette.responses import Response
from starlette.types import Scope, Send

from octollm.rpc.compression import MIN_COMPRESSED_BYTES, Headers, compress
from octollm.rpc.departure import receive_never
from octollm.rpc.exchange import WholeRequestExtension
from octollm.rpc.opened import AuthContext

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
    """The way out of one call. It is an ASGI ``send_report`` too, for answers that come in parts.

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
