"""An event loop on a thread of its own, on which plain code runs the client for asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar, cast

from octollm.errors import OctoError

T = TypeVar("T")

_CANCEL_GRACE_SECONDS = 5.0
"""How long an interrupted call is given to close what it has open."""
_END = object()


class Portal:
    """Runs coroutines on its loop and waits for them. Threads may share it; :meth:`close` ends its thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._generators: set[AsyncGenerator[Any]] = set()
        # A program that forgets to close is not kept from ending.
        self._thread = threading.Thread(target=self._serve, name="octollm-client", daemon=True)
        self._thread.start()

    @property
    def is_closed(self) -> bool:
        """Say whether it was closed."""
        return not self._thread.is_alive()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run ``work`` and return what it returns. An exception here, as by Ctrl-C, cancels it and waits for its end.

        Raises ``state_conflict`` after :meth:`close`.
        """
        over = threading.Event()
        future = self._start(_run_and_signal(work, over))
        if future is None:
            work.close()
            raise _closed_error()
        try:
            return future.result()
        except CancelledError:
            raise _closed_error() from None
        except BaseException:
            if not future.done():
                future.cancel()
                over.wait(_CANCEL_GRACE_SECONDS)
            raise

    def iterate(self, items: AsyncGenerator[T]) -> Iterator[T]:
        """Yield what ``items`` yields; leaving early closes them."""
        self._generators.add(items)
        try:
            while (item := self.run(_next(items))) is not _END:
                yield cast("T", item)
        finally:
            self._close_items(items)

    def close(self) -> None:
        """Close what is being yielded, cancel what still runs, and end the thread. Calling it again does nothing."""
        if self._thread.is_alive():
            for items in tuple(self._generators):
                self._close_items(items)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    def _close_items(self, items: AsyncGenerator[Any]) -> None:
        if items in self._generators:
            self._generators.discard(items)
            closing = self._start(_close(items))
            # The garbage collector may come here on any thread: the loop's own must not wait for itself.
            if closing is not None and threading.current_thread() is not self._thread:
                with contextlib.suppress(CancelledError, TimeoutError):
                    closing.result(_CANCEL_GRACE_SECONDS)

    def _start(self, work: Coroutine[Any, Any, T]) -> Future[T] | None:
        """Hand ``work`` to the loop; ``None`` when the portal is closed."""
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop)
        except RuntimeError:
            work.close()
            return None

    def _serve(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.get_loop().run_forever()


async def _run_and_signal(work: Coroutine[Any, Any, T], over: threading.Event) -> T:
    try:
        return await work
    finally:
        over.set()


async def _next(items: AsyncGenerator[object]) -> object:
    return await anext(items, _END)


async def _close(items: AsyncGenerator[object]) -> None:
    # One that another thread waits on is busy; it is cancelled with all that runs.
    with contextlib.suppress(RuntimeError):
        await items.aclose()


def _closed_error() -> OctoError:
    return OctoError("The client is closed.", code="state_conflict")
