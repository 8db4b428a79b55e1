"""Reading server-sent events (WHATWG HTML section 9.2), as far as chat completions use them: the data of each event."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator

MAX_EVENT_BYTES = 1024 * 1024


async def iter_sse_data(
    chunks: AsyncIterator[bytes | memoryview | bytearray], max_event_bytes: int = MAX_EVENT_BYTES
) -> AsyncGenerator[bytes]:
    """Yield the data of each event; comments and other fields are passed over. Raises ``ValueError`` past the bound."""
    data: list[bytes] = []
    size = 0
    async for line in _iter_lines(chunks, max_event_bytes):
        if not line:
            if data:
                yield b"\n".join(data)
            data, size = [], 0
        elif line.startswith(b"data:"):
            value = line[5:].removeprefix(b" ")
            size += len(value)
            if size > max_event_bytes:
                raise ValueError("an event is too long")
            data.append(value)
    if data:  # some servers leave out the last empty line
        yield b"\n".join(data)


async def _iter_lines(chunks: AsyncIterator[bytes | memoryview | bytearray], limit: int) -> AsyncGenerator[bytes]:
    """Yield lines without their ends. A lone CR, which no server of chat completions sends, does not end one."""
    buffer = bytearray()
    async for chunk in chunks:
        buffer += chunk
        *whole, rest = bytes(buffer).split(b"\n")
        for line in whole:
            yield line.removesuffix(b"\r")
        buffer = bytearray(rest)
        if len(buffer) > limit:
            raise ValueError("a line is too long")
    if buffer:
        yield bytes(buffer).removesuffix(b"\r")
