"""NDJSON responses, reader and writer.

Progress, token and heartbeat events come while the work goes on; the last line is the result or a problem.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec

from octollm.contracts.problems import Problem
from octollm.contracts.stream import HEARTBEAT_SECONDS, NDJSON, StreamEvent
from octollm.errors import OctoError
from octollm.framing import LineDecoder, LineTooLongError, encode_ndjson
from octollm.rpc.http_client import StreamedResponse, TransportError
from octollm.rpc.problems import parse_problem, remote_error

OnEvent = Callable[[StreamEvent], Awaitable[None]]

_MAX_LINE = 8 * 1024 * 1024
_MAX_PROBLEM = 65536


class StreamSink:
    """Forwards events; when a retry starts the response again, its first text resets the text sent before."""

    def __init__(self, on_event: OnEvent) -> None:
        self._on_event = on_event
        self._has_text = False
        self._must_reset = False

    def begin_attempt(self) -> None:
        """Start a response, the first or that of a retry."""
        self._must_reset = self._has_text

    async def emit(self, event: StreamEvent) -> None:
        """Forward an event."""
        if event.type == "token":
            if self._must_reset:
                event = msgspec.structs.replace(event, reset=True)
            self._has_text, self._must_reset = True, False
        await self._on_event(event)


async def read_events(service: str, streamed: StreamedResponse, sink: StreamSink) -> bytes:
    """Forward every event to ``sink`` and return the JSON of the result, the last one.

    Raises the callee's problem as :class:`RemoteError`, ``peer_protocol`` and ``connection_lost``.
    """
    if not streamed.headers.get("content-type", "").startswith(NDJSON):
        return await _read_single(service, streamed)
    decoder = LineDecoder(_MAX_LINE)
    async for chunk in streamed.chunks:
        try:
            events = [msgspec.json.decode(line, type=StreamEvent) for line in decoder.feed(chunk)]
        except LineTooLongError as error:
            raise OctoError(f"{service} sent a line that is too long.", code="peer_protocol") from error
        except ValueError as error:
            raise OctoError(f"{service} sent a malformed line.", code="peer_protocol") from error
        for event in events:
            if event.type == "result":
                return bytes(event.result)
            if event.type == "problem" and event.problem is not None:
                raise remote_error(event.problem, service)
            await sink.emit(event)
    raise TransportError(f"{service} ended its response without a result.", code="connection_lost", request_sent=True)


async def _read_single(service: str, streamed: StreamedResponse) -> bytes:
    """Return the body of a callee that answers a request for NDJSON with a single object, as it may."""
    body = b""
    async for chunk in streamed.chunks:
        body += chunk
        if len(body) > _MAX_LINE:
            raise OctoError(f"{service} sent a response that is too long.", code="peer_protocol")
    return body


async def raise_for_status(service: str, streamed: StreamedResponse) -> None:
    """Raise the callee's problem when the status is 400 or more."""
    if streamed.status < 400:
        return
    body = b""
    async for chunk in streamed.chunks:
        body += chunk
        # Nobody needs a longer problem: cut off, it is no JSON, and the status alone is reported.
        if len(body) > _MAX_PROBLEM:
            break
    raise parse_problem(service, streamed.status, body, streamed.headers.get("retry-after"))


_QUEUE = 256
_HEARTBEAT = encode_ndjson(StreamEvent(type="heartbeat"))


class NdjsonEmitter:
    """An emitter over a bounded queue that the response reads: a slow reader slows the handler."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[bytes | None] = asyncio.Queue(_QUEUE)

    async def token(self, text: str, *, reset: bool = False) -> None:
        """Send the text written since the last event; ``reset`` discards the text before."""
        await self._put(StreamEvent(type="token", text=text, reset=reset))

    async def progress(self, percent: float, message: str = "") -> None:
        """Send the progress of the work, in percent."""
        await self._put(StreamEvent(type="progress", progress=percent, message=message))

    async def result(self, encoded: bytes) -> None:
        """Send the JSON of the result as the last line."""
        await self._put(StreamEvent(type="result", result=msgspec.Raw(encoded)))
        await self._queue.put(None)

    async def problem(self, problem: Problem) -> None:
        """Send a problem as the last line."""
        await self._put(StreamEvent(type="problem", problem=problem))
        await self._queue.put(None)

    async def _put(self, event: StreamEvent) -> None:
        await self._queue.put(encode_ndjson(event))

    async def iter_lines(self) -> AsyncIterator[bytes]:
        """Yield encoded lines up to the last, and a heartbeat after each silence of four seconds."""
        while True:
            try:
                # Earlier than promised, which leaves time for the way to the reader.
                async with asyncio.timeout(HEARTBEAT_SECONDS * 0.8):
                    line = await self._queue.get()
            except TimeoutError:
                yield _HEARTBEAT
                continue
            if line is None:
                return
            yield line
