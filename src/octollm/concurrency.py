"""Concurrency helpers: supervised background tasks, waiting for an event with a timeout, a lock between processes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout


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


_POLL_SECONDS = 0.1


@asynccontextmanager
async def file_lock(path: Path, wait_seconds: float) -> AsyncGenerator[None]:
    """Hold the lock at ``path`` against other processes and other holders in this one; 0 seconds is one attempt.

    The operating system releases it when the process dies. Raises :class:`LockTimeout` after ``wait_seconds``, and
    ``OSError`` where the file cannot be opened or its file system has no locks.
    """
    # The file stays: a process that waits for a deleted one would hold another lock than the next to come.
    lock = FileLock(path, thread_local=False, preserve_lock_file=True, fallback_to_soft=False)
    try:
        async with asyncio.timeout(wait_seconds):
            while not _try_lock(lock):  # noqa: ASYNC110 - another process cannot set our events
                await asyncio.sleep(_POLL_SECONDS)
    except TimeoutError as exc:
        raise LockTimeout(str(path)) from exc
    try:
        yield
    finally:
        lock.release()


def _try_lock(lock: BaseFileLock) -> bool:
    # One attempt at a time: waiting inside filelock would block the event loop.
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return False
    return True


class LockTimeout(Exception):  # noqa: N818 - named for what happened, as the built-in TimeoutError is
    """Another process held the lock for longer than this one would wait."""


async def run_until_first(*coroutines: Coroutine[Any, Any, object]) -> int:
    """Run all until one ends; cancel the others and return which it was, the first of several.

    Raises what it raised.
    """
    tasks = [asyncio.ensure_future(work) for work in coroutines]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        ended = next(index for index, task in enumerate(tasks) if task.done())
        tasks[ended].result()
        return ended
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        for task in tasks:
            if not task.cancelled():
                # Its failure was raised above, or is of no interest any more; either way it was seen.
                task.exception()
