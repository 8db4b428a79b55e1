"""Reading the answer of a call as it comes: lines of NDJSON, or one whole answer of a callee that does not stream."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec

from octollm.contracts.stream import NDJSON, StreamEvent
from octollm.errors import OctoError
from octollm.rpc.http import StreamedResponse, TransportError
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
