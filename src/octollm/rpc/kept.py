"""Answers that a client keeps, to ask next time only whether they still hold (RFC 9111 section 4.3)."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping

import msgspec

from octollm.rpc.http import Answer

MAX_ENTRIES = 256
MAX_BYTES = 8 * 1024 * 1024
MAX_ONE = 1024 * 1024
"""Bytes of one answer that is kept."""
HELD = "If-None-Match"


class Kept:
    """The last answers to GETs that came with an ETag; the oldest that was used makes room.

    What one bearer may see another may not: each answer is kept for the bearer that it was given to, and the server is
    asked every time, so that nothing is seen by who may not see it any more.
    """

    def __init__(self, entries: int = MAX_ENTRIES, size: int = MAX_BYTES) -> None:
        self._entries = entries
        self._size = size
        self._used = 0
        self._answers: OrderedDict[bytes, Answer] = OrderedDict()

    def asking(self, key: bytes, headers: dict[str, str]) -> Answer | None:
        """Return what is kept under ``key``, and have ``headers`` ask whether it still holds."""
        kept = self._answers.get(key)
        if kept is None or HELD in headers:
            return None
        self._answers.move_to_end(key)
        headers[HELD] = kept.headers["etag"]
        return kept

    def told(self, key: bytes, kept: Answer | None, answer: Answer) -> Answer:
        """Return the answer that holds: ``kept`` where the server said so, else ``answer``, which is kept if it may."""
        if answer.status == 304 and kept is not None:
            # Section 4.3.4: what came with the 304 takes the place of what was kept.
            return msgspec.structs.replace(kept, headers={**kept.headers, **_fresh(answer.headers)})
        self._drop(key)
        if _may_be_kept(answer):
            self._answers[key] = answer
            self._used += len(answer.body)
            while len(self._answers) > self._entries or self._used > self._size:
                self._drop(next(iter(self._answers)))
        return answer

    def _drop(self, key: bytes) -> None:
        gone = self._answers.pop(key, None)
        if gone is not None:
            self._used -= len(gone.body)


def key_of(where: str, bearer: str) -> bytes:
    """Return what an answer is kept under; the bearer cannot be read from it."""
    return hashlib.sha256(f"{where}\n{bearer}".encode()).digest()


def _may_be_kept(answer: Answer) -> bool:
    storable = "no-store" not in answer.headers.get("cache-control", "")
    return answer.status == 200 and "etag" in answer.headers and storable and len(answer.body) <= MAX_ONE


def _fresh(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if not name.startswith("content-")}
