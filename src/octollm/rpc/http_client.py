"""The HTTP client interface of service calls, its limits, its failure types, and a private ETag cache.

The clients for service calls and for external services implement :class:`HttpClient`. The cache revalidates (RFC 9111
section 4.3).
"""

from __future__ import annotations

import abc
import hashlib
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Self

import msgspec

from octollm.errors import OctoError
from octollm.limiter import ConcurrencyLimiter, ConcurrencyPolicy, Refusal
from octollm.lru import LruCache

CONNECT_SECONDS = 5.0
READ_SECONDS = 30.0
WRITE_SECONDS = 10.0
POOL_SECONDS = 5.0
MAX_CONNECTIONS = 100
MAX_QUEUED = 4096
"""Calls that wait for one of :data:`MAX_CONNECTIONS` connections to a host; a further one is refused."""
MAX_KEEPALIVE = 20
MAX_ORIGINS = 1024
"""Addresses that a pool knows before it forgets those without a connection."""
IDLE_SECONDS = 60.0
"""How long an idle connection is kept open."""
MAX_RESPONSE_BYTES = 32 * 1024 * 1024


class TransportError(OctoError):
    """A call without a complete response.

    ``request_sent`` is false when the request certainly never reached the handler, so that any call may be retried.
    """

    def __init__(self, detail: str, *, code: str, request_sent: bool) -> None:
        super().__init__(detail, code=code)
        self.request_sent = request_sent


class HttpResponse(msgspec.Struct, frozen=True):
    """A whole response; header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class StreamedResponse(msgspec.Struct, frozen=True):
    """A response whose body is still arriving."""

    status: int
    headers: Mapping[str, str]
    chunks: AsyncIterator[bytes]


class HttpClient(abc.ABC):
    """A connection pool for one process. Redirects, cookies and proxies are off, so that calls stay inside."""

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
        """Send a request and yield its response as it arrives; leaving early closes the connection.

        Raises :class:`TransportError`, ``deadline_exceeded`` and ``peer_protocol``, also while the body is read.
        """

    async def send(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None, *, seconds: float
    ) -> HttpResponse:
        """Send a request and read the whole response, at most 32 MiB. Raises what :meth:`stream` does."""
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
    """Return the host and port of a URL, for messages."""
    return url.split("/", 3)[2]


def response_too_large(host: str) -> OctoError:
    """Return the error for a response over the size limit."""
    return OctoError(f"{host} answered with more than {MAX_RESPONSE_BYTES} bytes.", code="peer_protocol")


def deadline_exceeded(host: str, seconds: float) -> OctoError:
    """Return the error for a response that missed the caller's deadline."""
    return OctoError(f"{host} did not answer in the {seconds:.1f} s that were left.", code="deadline_exceeded")


def create_connection_limiter(host: str) -> ConcurrencyLimiter:
    """Return the limiter of a pool's connections to ``host``; it raises ``pool_timeout`` and ``deadline_exceeded``."""
    policy = ConcurrencyPolicy(MAX_CONNECTIONS, MAX_QUEUED, POOL_SECONDS)

    def refuse(refusal: Refusal) -> OctoError:
        if refusal == "deadline_exceeded":
            return OctoError(f"No connection to {host} came free before the deadline.", code="deadline_exceeded")
        return TransportError(
            f"No connection to {host} came free in {POOL_SECONDS:g} s."
            if refusal == "wait_expired"
            else f"{MAX_QUEUED} calls wait for a connection to {host} already.",
            code="pool_timeout",
            request_sent=False,
        )

    return ConcurrencyLimiter(f"The connection pool of {host}", policy, refusal=refuse)


MAX_CACHE_ENTRIES = 256
MAX_CACHE_BYTES = 8 * 1024 * 1024
MAX_ENTRY_BYTES = 1024 * 1024
"""Bytes of the largest response that is cached."""
IF_NONE_MATCH = "If-None-Match"


class ETagCache:
    """The ETag cache: an LRU cache of GET responses that carry an ETag (RFC 9110 section 8.8.3).

    Entries are per bearer, since one bearer may see what another may not. Every use revalidates with the server, so
    that nobody is served a response that they may no longer see.
    """

    def __init__(self, entries: int = MAX_CACHE_ENTRIES, size: int = MAX_CACHE_BYTES) -> None:
        self._responses: LruCache[bytes, HttpResponse] = LruCache(
            entries, max_weight=size, weigh=lambda response: len(response.body)
        )

    def add_validator(self, key: bytes, headers: dict[str, str]) -> HttpResponse | None:
        """Return the response cached under ``key``, and add ``If-None-Match`` for it to ``headers``."""
        cached = self._responses.get(key)
        if cached is None or IF_NONE_MATCH in headers:
            return None
        headers[IF_NONE_MATCH] = cached.headers["etag"]
        return cached

    def store(self, key: bytes, cached: HttpResponse | None, response: HttpResponse) -> HttpResponse:
        """Return ``cached`` if the server confirmed it by a 304, else ``response``, which is cached if it may be."""
        if response.status == 304 and cached is not None:
            # RFC 9111 section 4.3.4: header fields of the 304 replace the cached ones.
            return msgspec.structs.replace(cached, headers={**cached.headers, **_updated_headers(response.headers)})
        self._responses.pop(key)
        if _is_storable(response):
            self._responses.put(key, response)
        return response


def cache_key(url: str, bearer: str) -> bytes:
    """Return the cache key of a response, from which the bearer cannot be recovered."""
    return hashlib.sha256(f"{url}\n{bearer}".encode()).digest()


def _is_storable(response: HttpResponse) -> bool:
    storable = "no-store" not in response.headers.get("cache-control", "")
    return response.status == 200 and "etag" in response.headers and storable and len(response.body) <= MAX_ENTRY_BYTES


def _updated_headers(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if not name.startswith("content-")}
