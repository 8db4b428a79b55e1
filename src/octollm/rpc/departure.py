"""A caller that goes away while its call is served: the work is cancelled, all the way down."""

from __future__ import annotations

import asyncio
import contextlib
from types import TracebackType
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from octollm.rpc.exchange import WholeRequestExtension


class DisconnectScope:
    """While it is open, a caller that goes away cancels the task that opened it, which then sees ``ClientDisconnect``.

    A server that offers an :class:`Exchange` tells of it; otherwise a task has to watch ``receive``, which nothing
    else may read meanwhile.
    """

    __slots__ = ("_disconnected", "_extension", "_receive", "_task", "_watch")

    def __init__(self, extension: WholeRequestExtension | None, receive: Receive) -> None:
        self._extension = extension
        self._receive = receive
        self._task: asyncio.Task[Any] | None = None
        self._watch: asyncio.Task[None] | None = None
        self._disconnected = False

    async def __aenter__(self) -> None:
        self._task = asyncio.current_task()
        if self._extension is not None:
            self._extension.set_disconnect_callback(self._cancel)
        else:
            self._watch = asyncio.create_task(self._watch_receive())

    async def __aexit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self._extension is not None:
            self._extension.set_disconnect_callback(None)
        elif self._watch is not None:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch
        if not self._disconnected or self._task is None:
            return
        # The server may have cancelled the task as well: that one stands.
        others = self._task.uncancel()
        if others == 0 and kind is not None and issubclass(kind, asyncio.CancelledError):
            raise ClientDisconnect

    def _cancel(self) -> None:
        self._disconnected = True
        if self._task is not None:
            self._task.cancel()

    async def _watch_receive(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._cancel()


async def receive_never() -> Any:
    """Wait for ever: the ``receive`` of a response that is sent while a :class:`DisconnectScope` is open."""
    await asyncio.Event().wait()
