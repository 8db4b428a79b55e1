"""ETags of answers, and answering who has it already with 304 (RFC 9110 sections 8.8.3, 13.1.2 and 15.4.5)."""

from __future__ import annotations

import hashlib
import re

from starlette.responses import Response

from octollm.rpc.outlet import BufferedResponse

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
