"""The HTTP client behind one small adapter: pooled, bounded, and with failures as our own types."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass
from types import TracebackType

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

CONNECT_SECONDS = 5.0
READ_SECONDS = 30.0
POOL_SECONDS = 5.0
MAX_CONNECTIONS = 100
MAX_KEEPALIVE = 20
MAX_ANSWER = 32 * 1024 * 1024


class TransportError(OctoError):
    """A call that got no whole answer. ``began`` is false when the request surely never reached the handler."""

    def __init__(self, detail: str, *, code: str, began: bool) -> None:
        super().__init__(detail, code=code)
        self.began = began


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer; header names in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Streamed:
    """An answer whose body is still coming."""

    status: int
    headers: Mapping[str, str]
    chunks: AsyncIterator[bytes]


class Http:
    """One pool for one process. Redirects, cookies and proxies from the environment are off: calls stay inside."""

    def __init__(self) -> None:
        # A proxy rule that excludes every host keeps proxies of the environment away from internal calls.
        self._transport = HTTPTransport(
            connect_timeout=CONNECT_SECONDS,
            read_timeout=READ_SECONDS,
            pool_idle_timeout=60.0,
            pool_max_idle_per_host=MAX_KEEPALIVE,
            follow_redirects=False,
            enable_cookie_store=False,
            enable_otel=False,
            enable_brotli=False,
            enable_zstd=False,
            use_system_dns=True,
            proxy=pyqwest.Proxy("http://127.0.0.1:9", no_proxy="*,0.0.0.0/0,::/0"),
        )
        self._slots: dict[str, asyncio.Semaphore] = {}

    async def __aenter__(self) -> Http:
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close every connection."""
        await self._transport.aclose()

    async def send(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None, *, seconds: float
    ) -> Answer:
        """Send a request and read the whole answer (at most 32 MiB) within ``seconds``.

        Raises :class:`TransportError` and ``deadline_exceeded``.
        """
        async with self.stream(method, url, headers, body, seconds=seconds) as streamed:
            parts: list[bytes] = []
            size = 0
            async for chunk in streamed.chunks:
                size += len(chunk)
                if size > MAX_ANSWER:
                    raise OctoError(f"{_host(url)} answered with more than {MAX_ANSWER} bytes.", code="peer_protocol")
                parts.append(chunk)
            return Answer(streamed.status, streamed.headers, b"".join(parts))

    @contextlib.asynccontextmanager
    async def stream(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None, *, seconds: float
    ) -> AsyncGenerator[Streamed]:
        """Send a request and hand over its answer as it comes; leaving closes the connection if it is not whole."""
        host = _host(url)
        began = False
        try:
            async with asyncio.timeout(seconds), self._slot(host):
                response = await self._transport.execute(Request(method, url, Headers(list(headers.items())), body))
                began = True
                async with response:
                    names = {name.lower(): value for name, value in response.headers.items()}
                    yield Streamed(response.status, names, _chunks(response))
        except ConnectTimeout as error:
            raise TransportError(
                f"{host} did not accept a connection in {CONNECT_SECONDS:g} s.", code="connect_timeout", began=False
            ) from error
        except TimeoutError as error:
            raise _timed_out(host, error, seconds) from error
        except ConnectionError as error:
            raise TransportError(f"{host} could not be reached.", code="connect_failed", began=began) from error
        except (ReadError, WriteError, RemoteProtocolError, pyqwest.StreamError) as error:
            raise TransportError(
                f"The connection to {host} broke before its answer was whole.", code="connection_lost", began=True
            ) from error

    @contextlib.asynccontextmanager
    async def _slot(self, host: str) -> AsyncGenerator[None]:
        slots = self._slots.setdefault(host, asyncio.Semaphore(MAX_CONNECTIONS))
        try:
            async with asyncio.timeout(POOL_SECONDS):
                await slots.acquire()
        except TimeoutError:
            raise TransportError(
                f"No connection to {host} came free in {POOL_SECONDS:g} s.", code="pool_timeout", began=False
            ) from None
        try:
            yield
        finally:
            slots.release()


def _timed_out(host: str, error: TimeoutError, seconds: float) -> OctoError:
    # asyncio's own timeout has no text; the transport's read timeout says what it waited for.
    if str(error):
        return TransportError(f"{host} sent nothing for {READ_SECONDS:g} s.", code="read_timeout", began=True)
    return OctoError(f"{host} did not answer in the {seconds:.1f} s that were left.", code="deadline_exceeded")


async def _chunks(response: Response) -> AsyncIterator[bytes]:
    async for chunk in response.content:
        yield bytes(chunk)


def _host(url: str) -> str:
    return url.split("/", 3)[2]
