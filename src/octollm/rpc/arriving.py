"""Reading a request as it arrives: its headers' texts, its ids, its body within bounds."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope

from octollm.clock import IdGenerator
from octollm.context import REQUEST_ID
from octollm.errors import OctoError

BODY_SECONDS = 60.0
"""How long the body of a call may take to arrive."""


async def read_body(scope: Scope, headers: Mapping[bytes, bytes], receive: Receive, limit: int) -> bytes:
    """Return the body of a request that is not whole yet. Raises ``body_too_large`` and ``request_timeout``."""
    length = headers.get(b"content-length")
    if length is None and b"transfer-encoding" not in headers and scope["http_version"] in ("1.0", "1.1"):
        return b""  # RFC 9112 section 6.3: it has none
    if length is not None and length.isdigit() and int(length) > limit:
        raise body_too_large(limit)
    body = b""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                body += message.get("body", b"")
                if len(body) > limit:
                    raise body_too_large(limit)
                if not message.get("more_body", False):
                    return body
    except TimeoutError:
        raise OctoError(f"The body did not arrive in {BODY_SECONDS:g} s.", code="request_timeout") from None


def body_too_large(limit: int) -> OctoError:
    """Return what a body of more than ``limit`` bytes is answered."""
    return OctoError(f"The body may have at most {limit} bytes.", code="body_too_large")


def header_text(value: bytes | None) -> str | None:
    """Return the text of a header, ``None`` for none."""
    return None if value is None else value.decode("latin-1")


def id_or_new(value: bytes | None, ids: IdGenerator, prefix: str) -> str:
    """Return an id that was sent, or a new one with ``prefix`` where it is missing or malformed."""
    text = header_text(value)
    return text if text and REQUEST_ID.fullmatch(text) else prefix + ids.hex()
