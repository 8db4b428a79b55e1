"""Limits of an incoming call: a deadline scope, and a scope that cancels the handler when the client disconnects.

The bound on concurrent calls is :class:`octollm.limiter.ConcurrencyLimiter`.
"""

from __future__ import annotations

import asyncio
import contextlib
from types import TracebackType
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from octollm.errors import OctoError
from octollm.resilience import Deadline
from octollm.rpc.asgi_extension import WholeRequestExtension


class DeadlineScope:
    """Cancels the task that entered it once the deadline has passed; the scope then raises ``deadline_exceeded``."""

    __slots__ = ("_deadline", "_expired", "_task", "_timer")

    def __init__(self, deadline: Deadline) -> None:
        self._deadline = deadline
        self._expired = False
        self._task: asyncio.Task[Any] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> None:
        # A timer fires at the next turn of the event loop: by then the handler would have begun.
        self._deadline.raise_if_passed()
        self._task = asyncio.current_task()
        self._timer = asyncio.get_running_loop().call_later(self._deadline.remaining(), self._expire)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if not self._expired or self._task is None:
            return
        # A cancellation from elsewhere takes precedence over ours.
        others = self._task.uncancel()
        if others == 0 and kind is not None and issubclass(kind, asyncio.CancelledError):
            raise OctoError("The time limit of this call has expired.", code="deadline_exceeded") from error

    def _expire(self) -> None:
        self._expired = True
        if self._task is not None:
            self._task.cancel()


class DisconnectScope:
    """Cancel on disconnect: a client that goes away cancels the task that entered the scope.

    The scope then raises ``ClientDisconnect``. With the whole-request extension the server calls back; without it a
    task watches ``receive``, which nothing else may call meanwhile.
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
        # A cancellation by the server takes precedence over ours.
        others = self._task.uncancel()
        if others == 0 and kind is not None and issubclass(kind, asyncio.CancelledError):
            raise ClientDisconnect

    def _cancel(self) -> None:
        self._disconnected = True
        if self._task is not None:
            self._task.cancel()

    async def _watch_receive(self) -> None:
        await wait_for_disconnect(self._receive)
        self._cancel()


async def wait_for_disconnect(receive: Receive) -> None:
    """Return when the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def receive_never() -> Any:
    """Wait for ever: the ``receive`` of a response that is sent while a :class:`DisconnectScope` is open."""
    await asyncio.Event().wait()
