"""ETags of answers, and answering who has it already with 304 (RFC 9110 sections 8.8.3, 13.1.2 and 15.4.5)."""

from __future__ import annotations

import hashlib
import re

from starlette.responses import Response

from octollm.rpc.outlet import Whole

_TAG = re.compile(rb'(?:W/)?("[\x21\x23-\x7e\x80-\xff]*")')
_KEPT = (b"etag", b"cache-control", b"content-location", b"expires", b"vary")
MAX_TAGS = 64
"""More than these in one ``If-None-Match`` are not looked at."""


def validated(answer: Whole | Response, held: bytes | None) -> Whole | Response:
    """Return ``answer`` with an ETag, or 304 when ``held``, the caller's ``If-None-Match``, has it.

    An answer that has an ETag keeps it; else it is made of the body. Who stores the answer has to ask each time,
    unless it says otherwise itself. Anything but 200 is returned as it is.
    """
    if answer.status_code != 200:
        return answer
    headers = answer.raw_headers
    names = {name for name, _ in headers}
    if b"etag" not in names:
        headers.append((b"etag", b'"%s"' % hashlib.sha256(bytes(answer.body)).hexdigest()[:32].encode()))
    if b"cache-control" not in names:
        headers.append((b"cache-control", b"private, no-cache"))
    if held is None or not _has(held, next(value for name, value in headers if name == b"etag")):
        return answer
    return Whole(304, b"", [(name, value) for name, value in headers if name in _KEPT])


def _has(held: bytes, tag: bytes) -> bool:
    if held.strip() == b"*":
        return True
    # The weak comparison of section 8.8.3.2: what was compressed is the same answer.
    plain = tag.removeprefix(b"W/")
    return any(found[1] == plain for found, _ in zip(_TAG.finditer(held), range(MAX_TAGS), strict=False))
