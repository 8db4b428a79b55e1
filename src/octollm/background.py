"""A background task whose failure cannot be overlooked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress


class BackgroundTask:
    """One task. Stopping it raises what it died of; so does :meth:`check`."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._task: asyncio.Task[None] | None = None

    def start(self, work: Coroutine[object, object, None], *, on_end: Callable[[], None] | None = None) -> None:
        """Run ``work`` until it ends or :meth:`stop`; ``on_end`` is called then, to wake those who wait for it."""
        self._task = asyncio.create_task(work, name=self._name)
        if on_end is not None:
            self._task.add_done_callback(lambda _: on_end())

    @property
    def failure(self) -> BaseException | None:
        """Return what the task died of, or ``None``."""
        if self._task is None or not self._task.done() or self._task.cancelled():
            return None
        return self._task.exception()

    def raise_if_failed(self) -> None:
        """Raise what the task died of."""
        if (failure := self.failure) is not None:
            raise failure

    async def wait(self) -> None:
        """Wait until the task ends, and raise what it died of."""
        if self._task is not None:
            await asyncio.shield(self._task)

    async def stop(self) -> None:
        """Cancel the task, wait for its end, and raise what it had died of."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.wait([self._task])
        self.raise_if_failed()


@asynccontextmanager
async def run_in_background(
    name: str, work: Coroutine[object, object, None], on_failure: Callable[[BaseException], None]
) -> AsyncGenerator[None]:
    """Run ``work`` for as long as the context is open; ``on_failure`` is told at once what it dies of."""
    background = BackgroundTask(name)

    def ended() -> None:
        if background.failure is not None:
            on_failure(background.failure)

    background.start(work, on_end=ended)
    try:
        yield
    finally:
        with suppress(Exception):  # it was told to ``on_failure``
            await background.stop()


async def wait_for_event(event: asyncio.Event, timeout: float, *, clear: bool = True) -> None:
    """Return when ``news`` is set, or after ``seconds``; and clear it, if asked to."""
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout):
            await event.wait()
    if clear:
        event.clear()
