"""The HTTP/2 client of service calls (RFC 9113): many calls multiplexed on one connection.

It has the limits and failure types of every :class:`~octollm.rpc.http_client.HttpClient`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import TypedDict

import pyqwest
from pyqwest import (
    ConnectTimeout,
    Headers,
    HTTPTransport,
    ReadError,
    RemoteProtocolError,
    Request,
    Response,
    WriteError,
)

from octollm.errors import OctoError
from octollm.limiter import ConcurrencyLimiter
from octollm.rpc.http_client import (
    CONNECT_SECONDS,
    IDLE_SECONDS,
    MAX_KEEPALIVE,
    MAX_ORIGINS,
    READ_SECONDS,
    HttpClient,
    StreamedResponse,
    TransportError,
    create_connection_limiter,
    deadline_exceeded,
    host_of,
)
from octollm.rpc.tls import TlsConfig


def _internal_transport(tls: TlsConfig | None) -> HTTPTransport:
    return HTTPTransport(
        # Without TLS the client must know that the server speaks HTTP/2 (RFC 9113 section 3.3); TLS negotiates it.
        http_version=pyqwest.HTTPVersion.HTTP2 if tls is None else None,
        **_tls_options(tls),
        connect_timeout=CONNECT_SECONDS,
        read_timeout=READ_SECONDS,
        pool_idle_timeout=IDLE_SECONDS,
        pool_max_idle_per_host=MAX_KEEPALIVE,
        follow_redirects=False,
        enable_cookie_store=False,
        enable_otel=False,
        enable_brotli=False,
        enable_zstd=False,
        use_system_dns=True,
        # A rule that excludes every host keeps the environment's proxies away from internal calls.
        proxy=pyqwest.Proxy("http://127.0.0.1:9", no_proxy="*,0.0.0.0/0,::/0"),
    )


class _TlsFiles(TypedDict, total=False):
    tls_cert: bytes
    tls_key: bytes
    tls_ca_cert: bytes
    tls_include_system_certs: bool


class Http2Client(HttpClient):
    """A connection pool for one process; ``tls`` is the configuration for ``https`` addresses.

    Redirects, cookies and the environment's proxies are off, so that calls stay inside. Calls to external services
    bring a ``transport`` of their own.
    """

    def __init__(self, tls: TlsConfig | None = None, *, transport: HTTPTransport | None = None) -> None:
        self._transport = transport or _internal_transport(tls)
        self._limiters: dict[str, ConcurrencyLimiter] = {}
        self._active_timeouts: set[asyncio.Timeout] = set()
        self._closed = False

    async def aclose(self) -> None:
        """Close every connection; calls in flight fail with ``connection_lost``."""
        self._closed = True
        for timer in self._active_timeouts:
            # Ends the calls in flight at once; ``_closed`` tells this timeout from a missed deadline.
            timer.reschedule(0)
        await self._transport.aclose()

    @contextlib.asynccontextmanager
    async def stream(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None, *, seconds: float
    ) -> AsyncGenerator[StreamedResponse]:
        """Send a request and yield its response as it arrives; leaving early resets the stream."""
        host = host_of(url)
        sent = False
        try:
            # The deadline is the outer one, so that it covers the wait for a slot too.
            async with self._in_time(seconds), self._limiter(host):
                response = await self._transport.execute(Request(method, url, Headers(list(headers.items())), body))
                sent = True
                async with response:
                    names = {name.lower(): value for name, value in response.headers.items()}
                    yield StreamedResponse(response.status, names, _chunks(response))
        except ConnectTimeout as error:
            raise TransportError(
                f"{host} did not accept a connection in {CONNECT_SECONDS:g} s.",
                code="connect_timeout",
                request_sent=False,
            ) from error
        except TimeoutError as error:
            if self._closed:
                raise _connection_lost(host) from error
            raise _timeout_error(host, error, seconds) from error
        except ConnectionError as error:
            raise TransportError(f"{host} could not be reached.", code="connect_failed", request_sent=sent) from error
        except (ReadError, WriteError, RemoteProtocolError, pyqwest.StreamError) as error:
            raise _connection_lost(host) from error

    @contextlib.asynccontextmanager
    async def _in_time(self, seconds: float) -> AsyncGenerator[None]:
        async with asyncio.timeout(seconds) as timer:
            self._active_timeouts.add(timer)
            try:
                yield
            finally:
                self._active_timeouts.discard(timer)

    def _limiter(self, host: str) -> ConcurrencyLimiter:
        limiter = self._limiters.get(host)
        if limiter is None:
            if len(self._limiters) >= MAX_ORIGINS:
                # Addresses of pods come and go; drop those without a call.
                self._limiters = {name: known for name, known in self._limiters.items() if known.running}
            limiter = self._limiters[host] = create_connection_limiter(host)
        return limiter


def _tls_options(tls: TlsConfig | None) -> _TlsFiles:
    if tls is None:
        return {}
    tls.client_context()  # raises a setting error that names the wrong file; the transport's own would not
    own: _TlsFiles = {"tls_cert": tls.certificate.read_bytes(), "tls_key": tls.key.read_bytes()}
    if tls.ca is None:
        return {**own, "tls_include_system_certs": True}
    return {**own, "tls_ca_cert": tls.ca.read_bytes()}


def _connection_lost(host: str) -> TransportError:
    return TransportError(
        f"The connection to {host} broke before its response was complete.", code="connection_lost", request_sent=True
    )


def _timeout_error(host: str, error: TimeoutError, seconds: float) -> OctoError:
    # asyncio's timeout has no text; the transport's read timeout has one.
    if str(error):
        return TransportError(f"{host} sent nothing for {READ_SECONDS:g} s.", code="read_timeout", request_sent=True)
    return deadline_exceeded(host, seconds)


async def _chunks(response: Response) -> AsyncIterator[bytes]:
    async for chunk in response.content:
        yield bytes(chunk)
