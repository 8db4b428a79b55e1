"""Compressing answers for clients that ask for it (RFC 9110 section 12.5.3); services among themselves do not."""

from __future__ import annotations

import asyncio
import gzip
import re
from collections.abc import Sequence

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
