"""A streamed chat answer: server-sent events as the model writes, stopped when the client leaves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from octollm.contracts.problems import to_problem
from octollm.contracts.stream import HEARTBEAT_SECONDS
from octollm.errors import OctoError
from octollm.services.models.answering import OnText
from octollm.services.models.wire import KEEPALIVE_COMMENT, ChunkEncoder, PricedChatCompletion, encode_error_event
from octollm.telemetry import Logger

CompletionFunction = Callable[[OnText], Awaitable[PricedChatCompletion]]
_QUEUE_SIZE = 256
_KEEPALIVE_SECONDS = HEARTBEAT_SECONDS * 0.8
"""Seconds without a word after which a comment is sent; before the first word it also begins the answer."""


class ChatStreamResponse(Response):
    """The response of one streamed call.

    A failure before the first word is raised, so that it is answered with its own status; one after it is the last
    event. While nothing is written for a while, comments keep the connection.
    """

    def __init__(
        self, complete: CompletionFunction, chunks: ChunkEncoder, *, with_usage: bool, request_id: str, log: Logger
    ) -> None:
        super().__init__(
            media_type="text/event-stream", headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        )
        del self.headers["content-length"]
        self._complete = complete
        self._chunks = chunks
        self._with_usage = with_usage
        self._request_id = request_id
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer. Raises what the call raised before its first word, and ``ClientDisconnect``."""
        items: asyncio.Queue[str | PricedChatCompletion | Exception] = asyncio.Queue(_QUEUE_SIZE)
        tasks: list[asyncio.Task[Any]] = [
            asyncio.create_task(self._pump(items)),
            gone := asyncio.create_task(_wait_for_disconnect(receive)),
            getting := asyncio.create_task(items.get()),
        ]
        begun = False
        try:
            while True:
                await asyncio.wait({getting, gone}, timeout=_KEEPALIVE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                if gone.done():
                    raise ClientDisconnect
                item = getting.result() if getting.done() else None
                if isinstance(item, Exception) and not begun:
                    raise item
                if not begun:
                    begun = True
                    await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                    await _send_body(send, self._chunks.encode_start())
                if isinstance(item, PricedChatCompletion | Exception):
                    await _send_body(send, self._encode_last(item), more=False)
                    return
                await _send_body(send, KEEPALIVE_COMMENT if item is None else self._chunks.encode_text(item))
                if item is not None:
                    getting = asyncio.create_task(items.get())
                    tasks[-1] = getting
        finally:
            await _cancel_all(tasks)

    async def _pump(self, items: asyncio.Queue[str | PricedChatCompletion | Exception]) -> None:
        try:
            await items.put(await self._complete(items.put))
        except Exception as error:  # handed over to the response, which raises or sends it
            await items.put(error)

    def _encode_last(self, item: PricedChatCompletion | Exception) -> bytes:
        if isinstance(item, PricedChatCompletion):
            return self._chunks.encode_end(item, with_usage=self._with_usage)
        if not isinstance(item, OctoError):
            self._log.error("chat.crashed", error=item)
            item = OctoError("The service failed; its log has the reason under this request id.")
        return encode_error_event(to_problem(item, self._request_id))


async def _send_body(send: Send, body: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel_all(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    for task in tasks:
        # Their failures were handed over, or nobody waits for them any more.
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task
