"""NDJSON responses, read and written: progress, token and heartbeat events while the work goes on, then one result or problem."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec

from octollm.contracts.problems import Problem
from octollm.contracts.stream import HEARTBEAT_SECONDS, NDJSON, StreamEvent
from octollm.errors import OctoError
from octollm.rpc.http_client import StreamedResponse, TransportError
from octollm.rpc.problems import parse_problem, remote_error

OnEvent = Callable[[StreamEvent], Awaitable[None]]

_MAX_LINE = 8 * 1024 * 1024
_MAX_PROBLEM = 65536


class StreamSink:
    """Hands lines on; the first text of an answer that is begun again voids what an earlier one told."""

    def __init__(self, on_event: OnEvent) -> None:
        self._on_event = on_event
        self._has_text = False
        self._voids_text = False

    def begin_attempt(self) -> None:
        """Begin an answer."""
        self._voids_text = self._has_text

    async def emit(self, line: StreamEvent) -> None:
        """Hand a line on."""
        if line.type == "token":
            if self._voids_text:
                line = msgspec.structs.replace(line, reset=True)
            self._has_text, self._voids_text = True, False
        await self._on_event(line)


async def read_events(service: str, streamed: StreamedResponse, sink: StreamSink) -> bytes:
    """Hand every line before the last over, and return the result that the last one has.

    Raises what the callee says as :class:`RemoteError`, ``peer_protocol`` and ``connection_lost``.
    """
    if not streamed.headers.get("content-type", "").startswith(NDJSON):
        return await _read_single(service, streamed)
    rest = b""
    async for chunk in streamed.chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        if len(rest) > _MAX_LINE:
            raise OctoError(f"{service} sent a line that is too long.", code="peer_protocol")
        for text in whole:
            line = _parse_event(service, text)
            if line.type == "result":
                return bytes(line.result)
            if line.type == "problem" and line.problem is not None:
                raise remote_error(line.problem, service)
            await sink.emit(line)
    raise TransportError(f"{service} ended its answer without a result.", code="connection_lost", request_sent=True)


def _parse_event(service: str, text: bytes) -> StreamEvent:
    try:
        return msgspec.json.decode(text, type=StreamEvent)
    except msgspec.DecodeError as error:
        raise OctoError(f"{service} sent a line that is not understood.", code="peer_protocol") from error


async def _read_single(service: str, streamed: StreamedResponse) -> bytes:
    """Return the one answer of a callee that does not stream, which is its right."""
    body = b""
    async for chunk in streamed.chunks:
        body += chunk
        if len(body) > _MAX_LINE:
            raise OctoError(f"{service} sent an answer that is too long.", code="peer_protocol")
    return body


async def raise_for_status(service: str, streamed: StreamedResponse) -> None:
    """Raise what the callee says where the status is 400 or more."""
    if streamed.status < 400:
        return
    body = b""
    async for chunk in streamed.chunks:
        body += chunk
        if len(body) > _MAX_PROBLEM:
            break
    raise parse_problem(service, streamed.status, body, streamed.headers.get("retry-after"))


_QUEUE = 256
_HEARTBEAT = msgspec.json.encode(StreamEvent(type="heartbeat")) + b"\n"


class NdjsonEmitter:
    """An emitter whose lines are read on the other side by the response. A slow reader slows the writer."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[bytes | None] = asyncio.Queue(_QUEUE)

    async def token(self, text: str, *, reset: bool = False) -> None:
        """Send text that was written since the last one."""
        await self._put(StreamEvent(type="token", text=text, reset=reset))

    async def progress(self, percent: float, message: str = "") -> None:
        """Send how far the work is."""
        await self._put(StreamEvent(type="progress", progress=percent, message=message))

    async def result(self, encoded: bytes) -> None:
        """Send the answer, the last line."""
        await self._put(StreamEvent(type="result", result=msgspec.Raw(encoded)))
        await self._queue.put(None)

    async def problem(self, problem: Problem) -> None:
        """Send why there is no answer, the last line."""
        await self._put(StreamEvent(type="problem", problem=problem))
        await self._queue.put(None)

    async def _put(self, line: StreamEvent) -> None:
        await self._queue.put(msgspec.json.encode(line) + b"\n")

    async def iter_lines(self) -> AsyncIterator[bytes]:
        """Yield encoded lines until the last; a heartbeat when nothing was said for a while."""
        while True:
            try:
                async with asyncio.timeout(HEARTBEAT_SECONDS * 0.8):
                    line = await self._queue.get()
            except TimeoutError:
                yield _HEARTBEAT
                continue
            if line is None:
                return
            yield line
