"""The event log as it grows, from the server-sent stream (HTML standard, section 9.2)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

import msgspec

from octollm.client.door import GatewayTransport, protocol_error
from octollm.client.errors import APIError, DeadlineExceeded, Unavailable
from octollm.client.patience import RECONNECT_TIMEOUT_SECONDS, ReconnectBackoff
from octollm.contracts.events import Event

_STREAM_SECONDS = 3600.0
_MAX_EVENT = 4 * 1024 * 1024


async def stream_events(
    transport: GatewayTransport, *, after: int = 0, reconnect_timeout: float = RECONNECT_TIMEOUT_SECONDS
) -> AsyncGenerator[Event]:
    """Yield events behind the position ``after``, and go on for ever, also over a broken connection.

    Raises what the door refuses with, and :class:`Unavailable` when no door is back after ``patience`` seconds.
    """
    bearing = ReconnectBackoff(transport, reconnect_timeout)
    while True:
        try:
            async with contextlib.aclosing(_read_connection(transport, after)) as events:
                async for event in events:
                    bearing.reset()
                    if event is not None and event.seq > after:
                        after = event.seq
                        yield event
            error: APIError = _stream_ended(transport)
        except DeadlineExceeded:
            # The stream was open for as long as one may be.
            error = _stream_ended(transport)
        except APIError as broken:
            error = broken
        await asyncio.sleep(bearing.next_delay(error, f"Go on with after={after} once it is back."))


async def _read_connection(transport: GatewayTransport, after: int) -> AsyncGenerator[Event | None]:
    """Yield the events of one connection, and ``None`` for each sign of life."""
    async with transport.stream(f"/events?after={after}", "text/event-stream", _STREAM_SECONDS) as streamed:
        rest = b""
        async for chunk in streamed.chunks:
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) > _MAX_EVENT:
                raise protocol_error(transport.url)
            for line in lines:
                if line.startswith(b"data:"):
                    yield _decode_event(line[5:], transport)
                elif line.startswith(b":"):
                    yield None


def _stream_ended(transport: GatewayTransport) -> APIError:
    return Unavailable(f"{transport.url} ended the stream of events.", code="connection_lost")


def _decode_event(data: bytes, transport: GatewayTransport) -> Event:
    try:
        return msgspec.json.decode(data, type=Event)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise protocol_error(transport.url) from error
