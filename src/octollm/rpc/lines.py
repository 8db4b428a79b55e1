"""Reading the answer of a call as it comes: lines of NDJSON, or one whole answer of a callee that does not stream."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec

from octollm.contracts.stream import NDJSON, Line
from octollm.errors import OctoError
from octollm.rpc.http import Streamed, TransportError
from octollm.rpc.problems import error_from_response, error_of

OnLine = Callable[[Line], Awaitable[None]]

_MAX_LINE = 8 * 1024 * 1024
_MAX_PROBLEM = 65536


class Told:
    """Hands lines on; the first text of an answer that is begun again voids what an earlier one told."""

    def __init__(self, on_line: OnLine) -> None:
        self._on_line = on_line
        self._any = False
        self._void = False

    def begin(self) -> None:
        """Begin an answer."""
        self._void = self._any

    async def tell(self, line: Line) -> None:
        """Hand a line on."""
        if line.type == "token":
            if self._void:
                line = msgspec.structs.replace(line, reset=True)
            self._any, self._void = True, False
        await self._on_line(line)


async def read_lines(service: str, streamed: Streamed, told: Told) -> bytes:
    """Hand every line before the last over, and return the result that the last one has.

    Raises what the callee says as :class:`RemoteError`, ``peer_protocol`` and ``connection_lost``.
    """
    if not streamed.headers.get("content-type", "").startswith(NDJSON):
        return await _whole(service, streamed)
    rest = b""
    async for chunk in streamed.chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        if len(rest) > _MAX_LINE:
            raise OctoError(f"{service} sent a line that is too long.", code="peer_protocol")
        for text in whole:
            line = _line(service, text)
            if line.type == "result":
                return bytes(line.result)
            if line.type == "problem" and line.problem is not None:
                raise error_of(line.problem, service)
            await told.tell(line)
    raise TransportError(f"{service} ended its answer without a result.", code="connection_lost", began=True)


def _line(service: str, text: bytes) -> Line:
    try:
        return msgspec.json.decode(text, type=Line)
    except msgspec.DecodeError as error:
        raise OctoError(f"{service} sent a line that is not understood.", code="peer_protocol") from error


async def _whole(service: str, streamed: Streamed) -> bytes:
    """Return the one answer of a callee that does not stream, which is its right."""
    body = b""
    async for chunk in streamed.chunks:
        body += chunk
        if len(body) > _MAX_LINE:
            raise OctoError(f"{service} sent an answer that is too long.", code="peer_protocol")
    return body


async def raise_refusal(service: str, streamed: Streamed) -> None:
    """Raise what the callee says where the status is 400 or more."""
    if streamed.status < 400:
        return
    body = b""
    async for chunk in streamed.chunks:
        body += chunk
        if len(body) > _MAX_PROBLEM:
            break
    raise error_from_response(service, streamed.status, body, streamed.headers.get("retry-after"))
