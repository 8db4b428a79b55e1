"""Framing of streams: newline-delimited JSON and server-sent events, encoding and incremental decoding. No I/O.

NDJSON is one JSON document per line. Server-sent events are those of the WHATWG HTML standard, section 9.2.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable
from typing import TypeVar

import msgspec

KEEPALIVE_COMMENT = b": ping\n\n"
"""A comment line of an event stream; a client may take it as a sign of life."""

T = TypeVar("T")


class LineTooLongError(ValueError):
    """A line or an event is longer than its bound, so the stream cannot be read on."""


class LineDecoder:
    """Splits a byte stream into lines, in pieces of any size. A line longer than ``max_line`` bytes is an error."""

    def __init__(self, max_line: int) -> None:
        self._max_line = max_line
        self._pending: list[bytes] = []
        self._pending_size = 0

    def feed(self, chunk: bytes | bytearray | memoryview) -> list[bytes]:
        """Return the lines that ``chunk`` completes, without their LF. Raises :class:`LineTooLongError`."""
        first, *others = bytes(chunk).split(b"\n")
        self._append(first)
        if not others:
            return []
        lines = [b"".join(self._pending), *others[:-1]]
        self._pending, self._pending_size = [], 0
        self._append(others[-1])
        return lines

    @property
    def rest(self) -> bytes:
        """Return the last line, which no LF has ended."""
        return b"".join(self._pending)

    def _append(self, part: bytes) -> None:
        # Parts are joined once, when the line ends: joining at each chunk would be quadratic for a long line.
        self._pending.append(part)
        self._pending_size += len(part)
        if self._pending_size > self._max_line:
            raise LineTooLongError("a line is too long")


async def iter_ndjson(
    chunks: AsyncIterable[bytes | bytearray | memoryview], kind: type[T], max_line: int
) -> AsyncGenerator[T]:
    """Yield the document of each line as ``kind``. A line without its LF was cut off, and is not decoded.

    Raises :class:`LineTooLongError` and ``ValueError`` for a line that is not a ``kind``.
    """
    decoder = LineDecoder(max_line)
    async for chunk in chunks:
        for line in decoder.feed(chunk):
            yield msgspec.json.decode(line, type=kind)


async def iter_sse(
    chunks: AsyncIterable[bytes | bytearray | memoryview], max_event: int
) -> AsyncGenerator[bytes | None]:
    """Yield the data of each event, and ``None`` for each comment; other fields are ignored.

    Events without data are ignored, too. A lone CR does not end a line: no server that is read here sends one. Raises
    :class:`LineTooLongError` for an event of more than ``max_event`` bytes.
    """
    decoder = LineDecoder(max_event)
    data: list[bytes] = []
    size = 0
    async for chunk in chunks:
        for ended_line in decoder.feed(chunk):
            line = ended_line.removesuffix(b"\r")
            if not line:
                if data:
                    yield b"\n".join(data)
                data, size = [], 0
            elif line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" "))
                size += len(line)
                if size > max_event:
                    raise LineTooLongError("an event is too long")
            elif line.startswith(b":"):
                yield None
    # Some servers leave out the last LF, or the empty line after it.
    last = decoder.rest.removesuffix(b"\r")
    if last.startswith(b"data:"):
        data.append(last[5:].removeprefix(b" "))
    if data:
        yield b"\n".join(data)


def encode_ndjson(document: object) -> bytes:
    """Return ``document`` as a line of NDJSON; JSON escapes every LF inside it."""
    return msgspec.json.encode(document) + b"\n"


def encode_sse(document: object, *, event_id: int | None = None, event: str = "") -> bytes:
    """Return a server-sent event with ``document`` as JSON, which has no line break, in one line of data."""
    id_line = b"" if event_id is None else b"id: %d\n" % event_id
    event_line = f"event: {event}\n".encode() if event else b""
    return b"%s%sdata: %s\n\n" % (id_line, event_line, msgspec.json.encode(document))
