"""An answer of the orchestrator that is passed on as it comes: the stream of events."""

from __future__ import annotations

import asyncio

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from octollm.errors import OctoError
from octollm.resilience import Deadline
from octollm.rpc.http import StreamedResponse
from octollm.services.reflex.racing import run_until_first
from octollm.services.reflex.upstream import Upstream, UpstreamRequest

_DRAIN_INDEX = 2
"""The place of the drain among what ends a relay."""


class StreamProxyResponse(Response):
    """Opens the call when it is sent, so that a refusal is still answered as one."""

    def __init__(
        self, upstream: Upstream, credential: str, request: UpstreamRequest, deadline: Deadline, draining: asyncio.Event
    ) -> None:
        super().__init__()
        self._upstream = upstream
        self._credential = credential
        self._request = request
        self._deadline = deadline
        self._draining = draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer until it ends, the reader goes away, or the door drains."""
        del scope
        begun = False

        async def consume(streamed: StreamedResponse) -> None:
            nonlocal begun
            begun = True
            kind = streamed.headers.get("content-type", "application/octet-stream")
            headers = [(b"content-type", kind.encode("latin-1")), (b"cache-control", b"no-store")]
            await send({"type": "http.response.start", "status": streamed.status, "headers": headers})
            try:
                async for chunk in streamed.chunks:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            except (OctoError, ConnectionError, TimeoutError):
                return  # the other side is gone: the reader connects again and goes on from what it has

        async def relay() -> None:
            try:
                await self._upstream.stream(self._credential, self._request, self._deadline, consume)
            except OctoError:
                if not begun:
                    raise

        async def gone() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        ended = await run_until_first(relay(), gone(), self._draining.wait())
        if begun:
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        elif ended == _DRAIN_INDEX:
            raise OctoError("The service is shutting down.", code="draining", retry_after=1)
