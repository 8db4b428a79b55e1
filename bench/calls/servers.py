"""Other HTTP servers under our services, and other HTTP clients under our calls: what our own are worth."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping

import aiohttp
import pyqwest
import uvicorn
from granian.constants import HTTPModes, Interfaces
from granian.server.embed import Server
from starlette.types import ASGIApp

from octollm.rpc.external import PyqwestClient
from octollm.rpc.http_client import HttpClient, HttpResponse, StreamedResponse


async def plain_uvicorn(app: ASGIApp, port: int) -> None:
    """Serve with uvicorn's own protocol on httptools."""
    config = uvicorn.Config(app, port=port, http="httptools", log_config=None, access_log=False, lifespan="off")
    await uvicorn.Server(config).serve()


async def granian(app: ASGIApp, port: int) -> None:
    """Serve with granian, whose network side is in Rust, on this event loop."""
    server = Server(
        app, port=port, interface=Interfaces.ASGINL, http=HTTPModes.http1, websockets=False, log_enabled=False
    )
    await server.serve()


def pyqwest_client() -> HttpClient:
    """Return a client on pyqwest over HTTP/1.1, in the adapter that we have for it."""
    return PyqwestClient(pyqwest.HTTPTransport(http_version=pyqwest.HTTPVersion.HTTP1, enable_otel=False))


class AiohttpClient(HttpClient):
    """A client on aiohttp, which does what a whole call needs and no more: no errors of its own, no streams."""

    def __init__(self) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, limit_per_host=100),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(sock_connect=5, sock_read=30),
        )

    async def aclose(self) -> None:
        await self._session.close()

    async def send(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None, *, seconds: float
    ) -> HttpResponse:
        async with (
            asyncio.timeout(seconds),
            self._session.request(method, url, headers=headers, data=body, allow_redirects=False) as response,
        ):
            found = {name.lower(): value for name, value in response.headers.items()}
            return HttpResponse(response.status, found, await response.read())

    @contextlib.asynccontextmanager
    async def stream(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None, *, seconds: float
    ) -> AsyncGenerator[StreamedResponse]:
        raise NotImplementedError
        yield
