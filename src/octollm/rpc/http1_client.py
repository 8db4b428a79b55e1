"""The HTTP/1.1 client of service calls: one connection pool per origin.

It runs on the caller's event loop, so that a call wakes no second thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
import ssl
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from octollm.errors import OctoError
from octollm.limiter import ConcurrencyLimiter
from octollm.rpc.http1_connection import Http1Connection
from octollm.rpc.http_client import (
    CONNECT_SECONDS,
    IDLE_SECONDS,
    MAX_KEEPALIVE,
    MAX_ORIGINS,
    HttpClient,
    HttpResponse,
    StreamedResponse,
    TransportError,
    create_connection_limiter,
    deadline_exceeded,
)

_TARGET = re.compile(r"/[!-~]*")

CreateTlsContext = Callable[[], ssl.SSLContext]
FindAddresses = Callable[[str, str], Awaitable[Sequence[str]]]
"""Returns the addresses of a host (the second argument) for requests to an origin (the first), best first."""


@dataclass(slots=True)
class _Origin:
    """One address with the limiter of its connections, and the idle ones, most recently used last."""

    url: str
    host: str
    name: str
    port: int
    secure: bool
    limiter: ConcurrencyLimiter
    idle: deque[tuple[Http1Connection, float]] = field(default_factory=deque[tuple[Http1Connection, float]])


class Http1Client(HttpClient):
    """A connection pool for one process.

    ``tls`` is the context for ``https`` addresses, or creates it for the first of them. The default trusts the system's
    authorities.

    With ``addresses`` a connection goes to one of those that it returns, and to no other. ``Host``, SNI and the
    certificate keep the name. Without it the operating system resolves names.
    """

    def __init__(
        self, tls: ssl.SSLContext | CreateTlsContext | None = None, *, addresses: FindAddresses | None = None
    ) -> None:
        self._tls = tls or ssl.create_default_context
        self._addresses = addresses
        self._origins: dict[str, _Origin] = {}
        self._connections: set[Http1Connection] = set()
        self._sweep: asyncio.TimerHandle | None = None

    async def aclose(self) -> None:
        """Close every connection."""
        if self._sweep is not None:
            self._sweep.cancel()
        for connection in list(self._connections):
            connection.close()
        self._connections.clear()
        self._origins.clear()

    async def send(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None, *, seconds: float
    ) -> HttpResponse:
        """Send a request and read the whole response, without the cost of a stream."""
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        origin, request = self._prepare(method, url, headers, body)
        connection = await self._acquire(origin, until)
        # A timer that fails the connection is cheaper than asyncio.timeout, which cancels the task.
        timer = loop.call_at(until, _fail_timed_out, connection, origin.host, seconds)
        try:
            connection.write(request, head=method == "HEAD")
            body = await connection.read_body()
            return HttpResponse(connection.status, connection.headers, body)
        finally:
            timer.cancel()
            # After a failure or a cancellation the rest of the response is still to come, so the connection is closed
            # instead of reused. That is also how the server learns of the cancellation.
            self._release(origin, connection)

    @contextlib.asynccontextmanager
    async def stream(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None, *, seconds: float
    ) -> AsyncGenerator[StreamedResponse]:
        """Send a request and yield its response as it arrives."""
        origin, request = self._prepare(method, url, headers, body)
        try:
            async with asyncio.timeout(seconds):
                # No limit of its own: the timeout around it covers the wait for a connection as well.
                connection = await self._acquire(origin, math.inf)
                try:
                    connection.write(request, head=method == "HEAD")
                    await connection.read_headers()
                    yield StreamedResponse(connection.status, connection.headers, _chunks(connection))
                finally:
                    self._release(origin, connection)
        except TimeoutError as error:
            raise deadline_exceeded(origin.host, seconds) from error

    def _prepare(self, method: str, url: str, headers: Mapping[str, str], body: bytes | None) -> tuple[_Origin, bytes]:
        scheme, _, rest = url.partition("://")
        host, slash, target = rest.partition("/")
        target = slash + target or "/"
        if _TARGET.fullmatch(target) is None:
            raise ValueError(f"{target!r} is not a percent-encoded request target")
        at = f"{scheme}://{host}"
        origin = self._origins.get(at)
        if origin is None:
            origin = self._origins[at] = self._origin(at, host)
        lines = [f"{method} {target} HTTP/1.1", f"host: {origin.host}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        if body is not None or method in ("POST", "PUT", "PATCH"):
            lines.append(f"content-length: {len(body or b'')}")
        # A line break in a header value would begin another header or request (request splitting).
        head = "\r\n".join(lines)
        breaks = len(lines) - 1
        if head.count("\n") != breaks or head.count("\r") != breaks or "\0" in head:
            raise OctoError("A header of the call has a line break.", code="invalid_header")
        return origin, head.encode("latin-1") + b"\r\n\r\n" + (body or b"")

    def _origin(self, at: str, host: str) -> _Origin:
        parts = urlsplit(at)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in host:
            raise ValueError(f"{at} is not the address of a service")
        if len(self._origins) >= MAX_ORIGINS:
            # Addresses of pods come and go; drop those without a connection.
            for key, known in list(self._origins.items()):
                if not known.idle and not known.limiter.running:
                    del self._origins[key]
        secure = parts.scheme == "https"
        port = parts.port or (443 if secure else 80)
        return _Origin(at, host, parts.hostname, port, secure, create_connection_limiter(host))

    async def _acquire(self, origin: _Origin, until: float) -> Http1Connection:
        """Return a connection by the loop time ``until``; :meth:`_release` returns it to the pool."""
        if not origin.limiter.try_acquire():
            await origin.limiter.acquire(until - asyncio.get_running_loop().time())
        try:
            while origin.idle:
                # The most recently used connection first: those that are not needed reach their idle limit.
                connection, _ = origin.idle.pop()
                if connection.is_idle:
                    return connection
                self._connections.discard(connection)
            return await self._connect(origin, until)
        except BaseException:
            origin.limiter.release()
            raise

    async def _connect(self, origin: _Origin, until: float) -> Http1Connection:
        loop = asyncio.get_running_loop()
        tls = await self._tls_context() if origin.secure else None
        began = loop.time()
        try:
            async with asyncio.timeout_at(min(until, began + CONNECT_SECONDS)):
                connection = await self._open(origin, tls)
        # TimeoutError is an OSError too, so it has to come first.
        except TimeoutError as error:
            if loop.time() >= until:
                raise deadline_exceeded(origin.host, until - began) from error
            raise TransportError(
                f"{origin.host} did not accept a connection in {CONNECT_SECONDS:g} s.",
                code="connect_timeout",
                request_sent=False,
            ) from error
        except OSError as error:
            raise TransportError(
                f"{origin.host} could not be reached.", code="connect_failed", request_sent=False
            ) from error
        self._connections.add(connection)
        return connection

    async def _tls_context(self) -> ssl.SSLContext:
        tls = self._tls
        if not isinstance(tls, ssl.SSLContext):
            # In a thread: reading the system's authorities takes 50 ms.
            tls = self._tls = await asyncio.to_thread(tls)
        return tls

    async def _open(self, origin: _Origin, tls: ssl.SSLContext | None) -> Http1Connection:
        """Connect to the first address that accepts. Raises ``OSError``."""
        loop = asyncio.get_running_loop()
        addresses = [origin.name] if self._addresses is None else await self._addresses(origin.url, origin.name)
        failure = OSError("no address")
        for address in addresses:
            try:
                _, connection = await loop.create_connection(
                    lambda: Http1Connection(origin.host),
                    address,
                    origin.port,
                    ssl=tls,
                    server_hostname=None if tls is None else origin.name,
                )
            except TimeoutError:
                raise
            except OSError as error:
                failure = error
            else:
                return connection
        raise failure

    def _release(self, origin: _Origin, connection: Http1Connection) -> None:
        reusable = connection.release()
        if reusable:
            origin.idle.append((connection, asyncio.get_running_loop().time()))
        else:
            self._connections.discard(connection)
        origin.limiter.release()
        if len(origin.idle) > MAX_KEEPALIVE:
            self._close_oldest_idle(origin)
        if reusable and self._sweep is None:
            self._sweep = asyncio.get_running_loop().call_later(IDLE_SECONDS, self._sweep_idle)

    def _close_oldest_idle(self, origin: _Origin) -> None:
        connection, _ = origin.idle.popleft()
        connection.close()
        self._connections.discard(connection)

    def _sweep_idle(self) -> None:
        loop = asyncio.get_running_loop()
        before = loop.time() - IDLE_SECONDS
        for origin in self._origins.values():
            # The deque is ordered by time, so the first connection that is young enough ends the search.
            while origin.idle and origin.idle[0][1] <= before:
                self._close_oldest_idle(origin)
        waiting = any(origin.idle for origin in self._origins.values())
        self._sweep = loop.call_later(IDLE_SECONDS / 4, self._sweep_idle) if waiting else None


def _fail_timed_out(connection: Http1Connection, host: str, seconds: float) -> None:
    connection.fail(deadline_exceeded(host, seconds))


async def _chunks(connection: Http1Connection) -> AsyncIterator[bytes]:
    while (chunk := await connection.read_chunk()) is not None:
        yield chunk
