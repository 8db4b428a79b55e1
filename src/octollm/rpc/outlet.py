"""How an answer leaves: in one write where the server can, else as ASGI messages, with the ids of the call."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any, cast

import msgspec
from starlette.responses import Response
from starlette.types import Scope, Send

from octollm.rpc.compression import MIN_BYTES, Headers, compressed
from octollm.rpc.departure import nobody_leaves
from octollm.rpc.exchange import Exchange
from octollm.rpc.opened import Opened

_JSON = (b"content-type", b"application/json")


class Whole(msgspec.Struct, frozen=True):
    """A whole answer in JSON: what is left of a Starlette response where nothing else is needed."""

    status_code: int
    body: bytes
    raw_headers: list[tuple[bytes, bytes]]

    @classmethod
    def of(cls, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> Whole:
        """Return the answer with its content headers and ``headers``."""
        raw = [_JSON, (b"content-length", str(len(body)).encode())]
        if headers:
            raw += [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        return cls(status, body, raw)


class Outlet:
    """The way out of one call. It is an ASGI ``send`` too, for answers that come in parts.

    ``accept`` is the call's ``Accept-Encoding``, if it had one.
    """

    __slots__ = ("_accept", "_correlation_id", "_request_id", "_send", "exchange", "opened", "status")

    def __init__(
        self, send: Send, exchange: Exchange | None, request_id: str, correlation_id: str, accept: bytes | None
    ) -> None:
        self._send = send
        self._accept = accept
        self._request_id = request_id
        self._correlation_id = correlation_id
        self.exchange = exchange
        self.opened: Opened | None = None
        """In whose name the call is, once it was let in."""
        self.status = 0
        """The status that was sent; 0 while none was."""

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        """Send a message of ASGI."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), *self._ids()]
        await self._send(message)

    async def whole(self, answer: Whole | Response, scope: Scope) -> None:
        """Send an answer; one of Starlette's responses that comes in parts sends itself."""
        if answer.__class__ not in (Whole, Response):
            await cast("Response", answer)(scope, nobody_leaves, self)
            return
        own: Headers
        body, own = bytes(answer.body), answer.raw_headers
        if self._accept is not None and len(body) >= MIN_BYTES:
            body, own = await compressed(body, own, self._accept)
        headers = [*own, *self._ids()]
        self.status = answer.status_code
        if self.exchange is not None and self.exchange.answer(answer.status_code, headers, body):
            return
        await self._send({"type": "http.response.start", "status": answer.status_code, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    def _ids(self) -> tuple[tuple[bytes, bytes], tuple[bytes, bytes]]:
        return (b"x-request-id", self._request_id.encode()), (b"x-correlation-id", self._correlation_id.encode())
