"""The HTTP client of service calls: one small interface, its bounds, and failures as types."""

from __future__ import annotations

import abc
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Self

import msgspec

from octollm.errors import OctoError

CONNECT_SECONDS = 5.0
READ_SECONDS = 30.0
WRITE_SECONDS = 10.0
POOL_SECONDS = 5.0
MAX_CONNECTIONS = 100
MAX_KEEPALIVE = 20
IDLE_SECONDS = 60.0
"""How long a connection is kept that nothing uses."""
MAX_RESPONSE_BYTES = 32 * 1024 * 1024


class TransportError(OctoError):
    """A call that got no whole answer. ``began`` is false when the request surely never reached the handler."""

    def __init__(self, detail: str, *, code: str, request_sent: bool) -> None:
        super().__init__(detail, code=code)
        self.request_sent = request_sent


class HttpResponse(msgspec.Struct, frozen=True):
    """A whole answer; header names in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class StreamedResponse(msgspec.Struct, frozen=True):
    """An answer whose body is still coming."""

    status: int
    headers: Mapping[str, str]
    chunks: AsyncIterator[bytes]


class HttpClient(abc.ABC):
    """One pool of connections for one process. Redirects, cookies and proxies are off: calls stay inside."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        await self.aclose()

    @abc.abstractmethod
    async def aclose(self) -> None:
        """Close every connection."""

    @abc.abstractmethod
    def stream(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None, *, seconds: float
    ) -> AbstractAsyncContextManager[StreamedResponse]:
        """Send a request and hand over its answer as it comes; leaving closes the connection if it is not whole.

        Raises :class:`TransportError`, ``deadline_exceeded`` and ``peer_protocol``, also while the answer is read.
        """

    async def send(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None, *, seconds: float
    ) -> HttpResponse:
        """Send a request and read the whole answer, at most 32 MiB. Raises what :meth:`stream` does."""
        async with self.stream(method, url, headers, body, seconds=seconds) as streamed:
            parts: list[bytes] = []
            size = 0
            async for chunk in streamed.chunks:
                size += len(chunk)
                if size > MAX_RESPONSE_BYTES:
                    raise response_too_large(host_of(url))
                parts.append(chunk)
            return HttpResponse(streamed.status, streamed.headers, b"".join(parts))


def host_of(url: str) -> str:
    """Return host and port of a URL, for texts."""
    return url.split("/", 3)[2]


def response_too_large(host: str) -> OctoError:
    """Return the error of an answer with too many bytes."""
    return OctoError(f"{host} answered with more than {MAX_RESPONSE_BYTES} bytes.", code="peer_protocol")


def deadline_exceeded(host: str, seconds: float) -> OctoError:
    """Return the error of an answer that was not there in time."""
    return OctoError(f"{host} did not answer in the {seconds:.1f} s that were left.", code="deadline_exceeded")
