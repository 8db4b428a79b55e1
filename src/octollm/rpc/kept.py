"""Answers that a client keeps, to ask next time only whether they still hold (RFC 9111 section 4.3)."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping

import msgspec

from octollm.rpc.http import HttpResponse

MAX_CACHE_ENTRIES = 256
MAX_CACHE_BYTES = 8 * 1024 * 1024
MAX_ENTRY_BYTES = 1024 * 1024
"""Bytes of one answer that is kept."""
IF_NONE_MATCH = "If-None-Match"


class ETagCache:
    """The last answers to GETs that came with an ETag; the oldest that was used makes room.

    What one bearer may see another may not: each answer is kept for the bearer that it was given to, and the server is
    asked every time, so that nothing is seen by who may not see it any more.
    """

    def __init__(self, entries: int = MAX_CACHE_ENTRIES, size: int = MAX_CACHE_BYTES) -> None:
        self._entries = entries
        self._size = size
        self._used = 0
        self._responses: OrderedDict[bytes, HttpResponse] = OrderedDict()

    def add_validator(self, key: bytes, headers: dict[str, str]) -> HttpResponse | None:
        """Return what is kept under ``key``, and have ``headers`` ask whether it still holds."""
        kept = self._responses.get(key)
        if kept is None or IF_NONE_MATCH in headers:
            return None
        self._responses.move_to_end(key)
        headers[IF_NONE_MATCH] = kept.headers["etag"]
        return kept

    def store(self, key: bytes, cached: HttpResponse | None, response: HttpResponse) -> HttpResponse:
        """Return the answer that holds: ``kept`` where the server said so, else ``answer``, which is kept if it may."""
        if response.status == 304 and cached is not None:
            # Section 4.3.4: what came with the 304 takes the place of what was kept.
            return msgspec.structs.replace(cached, headers={**cached.headers, **_updated_headers(response.headers)})
        self._drop(key)
        if _is_storable(response):
            self._responses[key] = response
            self._used += len(response.body)
            while len(self._responses) > self._entries or self._used > self._size:
                self._drop(next(iter(self._responses)))
        return response

    def _drop(self, key: bytes) -> None:
        gone = self._responses.pop(key, None)
        if gone is not None:
            self._used -= len(gone.body)


def cache_key(url: str, bearer: str) -> bytes:
    """Return what an answer is kept under; the bearer cannot be read from it."""
    return hashlib.sha256(f"{url}\n{bearer}".encode()).digest()


def _is_storable(response: HttpResponse) -> bool:
    storable = "no-store" not in response.headers.get("cache-control", "")
    return response.status == 200 and "etag" in response.headers and storable and len(response.body) <= MAX_ENTRY_BYTES


def _updated_headers(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if not name.startswith("content-")}
