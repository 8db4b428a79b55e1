"""An in-memory HTTP transport.

Requests go from the client's adapter straight into ASGI applications, without sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, MutableMapping
from typing import Any
from urllib.parse import unquote, urlsplit

from starlette.types import ASGIApp

from octollm.errors import OctoError
from octollm.rpc.http_client import HttpClient, StreamedResponse, TransportError

_DISCONNECT_SECONDS = 2.0
"""Seconds within which an application must end after its client disconnected."""


class InMemoryHttp(HttpClient):
    """In the place of a pool of connections: ``apps`` by their URL, without a trailing slash."""

    def __init__(self) -> None:
        self.apps: dict[str, ASGIApp] = {}

    async def aclose(self) -> None:
        """Close nothing."""

    @contextlib.asynccontextmanager
    async def stream(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None, *, seconds: float
    ) -> AsyncGenerator[StreamedResponse]:
        """Call an application and hand over its answer as it comes; leaving tells it that the client has left."""
        parts = urlsplit(url)
        app = self.apps.get(f"{parts.scheme}://{parts.netloc}")
        if app is None:
            raise TransportError(f"{parts.netloc} is not there.", code="connect_failed", request_sent=False)
        exchange = _ASGIExchange(body or b"")
        sent = headers if body is None else {**headers, "content-length": str(len(body))}
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": parts.scheme,
            "path": unquote(parts.path),
            "raw_path": parts.path.encode(),
            "query_string": parts.query.encode(),
            "root_path": "",
            "headers": [(name.lower().encode(), value.encode()) for name, value in sent.items()],
            "client": ("127.0.0.1", 1),
            "server": (parts.hostname, parts.port),
        }
        serving = asyncio.create_task(exchange.run(app, scope))
        try:
            async with asyncio.timeout(seconds):
                status, names = await exchange.wait_for_start()
                yield StreamedResponse(status, names, exchange.chunks())
        except TimeoutError as error:
            raise OctoError(f"{parts.netloc} did not answer in time.", code="deadline_exceeded") from error
        finally:
            exchange.disconnected.set()
            await asyncio.wait({serving}, timeout=_DISCONNECT_SECONDS)
            serving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await serving


class _ASGIExchange:
    """One request and its answer."""

    def __init__(self, body: bytes) -> None:
        self._body: bytes | None = body
        self._sent: asyncio.Queue[MutableMapping[str, Any] | None] = asyncio.Queue(64)
        self.disconnected = asyncio.Event()

    async def run(self, app: ASGIApp, scope: dict[str, Any]) -> None:
        try:
            await app(scope, self._receive, self._send)
        except OctoError:
            pass  # it broke off after it had begun, as a server would: the answer is not whole
        finally:
            with contextlib.suppress(asyncio.QueueFull):
                self._sent.put_nowait(None)

    async def wait_for_start(self) -> tuple[int, dict[str, str]]:
        first = await self._sent.get()
        if first is None:
            raise TransportError("The service ended without an answer.", code="connection_lost", request_sent=True)
        return first["status"], {name.decode(): value.decode() for name, value in first["headers"]}

    async def chunks(self) -> AsyncIterator[bytes]:
        while True:
            message = await self._sent.get()
            if message is None:
                raise TransportError("The answer broke off.", code="connection_lost", request_sent=True)
            if message.get("body"):
                yield message["body"]
            if not message.get("more_body", False):
                return

    async def _receive(self) -> dict[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.disconnected.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        if not self.disconnected.is_set():
            await self._sent.put(message)
