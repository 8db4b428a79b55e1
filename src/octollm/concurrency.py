"""Concurrency helpers: the supervisor of background loops, the retry loop, and an inter-process file lock.

Every loop that repeats, pauses or retries goes through :class:`BackgroundLoop`, :func:`retry` or :class:`Retries`, so
that failures show in ``/ready`` and in the log the same way everywhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

from filelock import BaseFileLock, FileLock, Timeout

from octollm.contracts.observability import DependencyStatus
from octollm.errors import OctoError
from octollm.resilience import Backoff

DEFAULT_PAUSE = 1.0
"""The pause after a failed round of a loop that has neither an interval nor a backoff."""
CLOSE_SECONDS = 5.0
"""How long a background loop may take to end after its cancellation."""

T = TypeVar("T")


class LoopLogger(Protocol):
    """The part of a logger that a background loop uses."""

    def info(self, event: str, **members: object) -> None:
        """Log a normal event."""
        ...

    def warning(self, event: str, **members: object) -> None:
        """Log an event that needs attention."""
        ...

    def error(self, event: str, **members: object) -> None:
        """Log a failure."""
        ...


class BackgroundLoop:
    """A supervised loop: repeats ``work`` until it is closed, and makes its failures visible.

    A round that raises :class:`OctoError` begins an outage: ``failure`` holds its detail, the log has one line, and the
    next round follows after ``backoff``. The first successful round ends the outage. Any other exception is a defect:
    it is logged, ``on_crash`` is called, and the loop ends for good, unless ``restart`` treats it like an outage.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[], Awaitable[object]],
        *,
        interval: float = 0.0,
        initial_delay: float = 0.0,
        backoff: Backoff | None = None,
        restart: bool = False,
        log: LoopLogger | None = None,
        log_after: float = 0.0,
        on_crash: Callable[[BaseException], None] | None = None,
        close_timeout: float = CLOSE_SECONDS,
    ) -> None:
        """Create a loop; it starts with :meth:`start` or ``async with``.

        ``interval`` is the pause after a successful round, which :meth:`wake` cuts short, and after a failed one when
        there is no ``backoff``. An outage is logged when it lasts longer than ``log_after``. Times are in seconds.
        """
        self.name = name
        self.failure = ""
        """Why the last round failed or the loop ended; empty while it works."""
        self._work = work
        self._interval = interval
        self._initial_delay = initial_delay
        self._backoff = backoff or Backoff(interval or DEFAULT_PAUSE, interval or DEFAULT_PAUSE)
        self._restart = restart
        self._log = log
        self._log_after = log_after
        self._on_crash = on_crash
        self._close_timeout = close_timeout
        self._wakeup = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._failures = 0
        self._failing_since = 0.0
        self._outage_logged = False

    async def __aenter__(self) -> BackgroundLoop:
        """Start the loop."""
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the loop."""
        await self.aclose()

    def start(self) -> None:
        """Start the loop in its own task."""
        self._task = asyncio.create_task(self._run(), name=self.name)
        # A crash is surfaced by _run(); without this asyncio would report it again as never retrieved.
        self._task.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def aclose(self) -> None:
        """Cancel the loop and wait for its end, at most ``close_timeout``. A crash is not raised again."""
        if self._task is None:
            return
        self._task.cancel()
        _, pending = await asyncio.wait({self._task}, timeout=self._close_timeout)
        # Work that swallows its cancellation must not block the shutdown of everything else.
        if pending and self._log is not None:
            self._log.error("loop.not_closed", loop=self.name)

    def wake(self) -> None:
        """Start the next round now, instead of after ``interval``. During a backoff it has no effect."""
        self._wakeup.set()

    def report_success(self) -> None:
        """End an outage in the middle of a round, for ``work`` that does not return while all is well."""
        self._failures = 0
        self.failure = ""
        if self._outage_logged and self._log is not None:
            self._log.info("loop.recovered", loop=self.name)
        self._outage_logged = False

    @property
    def crash(self) -> BaseException | None:
        """Return the exception that ended the loop, or ``None``."""
        task = self._task
        return task.exception() if task is not None and task.done() and not task.cancelled() else None

    def raise_if_crashed(self) -> None:
        """Raise the exception that ended the loop, if there is one."""
        if (error := self.crash) is not None:
            raise error

    async def check_health(self) -> DependencyStatus:
        """Return the loop's state for ``/ready``. It is never required: a service works, if less well, without it."""
        return DependencyStatus(ok=not self.failure, detail=self.failure, required=False)

    async def _run(self) -> None:
        try:
            await asyncio.sleep(self._initial_delay)
            while True:
                try:
                    await self._work()
                except OctoError as error:
                    await self._pause_after(error, error.detail)
                except Exception as error:
                    if not self._restart:
                        raise
                    await self._pause_after(error, f"Background loop {self.name!r} failed: {type(error).__name__}.")
                else:
                    self.report_success()
                    await wait_for_event(self._wakeup, self._interval)
        except Exception as error:
            self.failure = f"Background loop {self.name!r} stopped: {type(error).__name__}."
            if self._log is not None:
                self._log.error("loop.crashed", loop=self.name, error=error)
            if self._on_crash is not None:
                self._on_crash(error)
            raise

    async def _pause_after(self, error: Exception, detail: str) -> None:
        now = asyncio.get_running_loop().time()
        if not self._failures:
            self._failing_since = now
        self._failures += 1
        self.failure = detail
        # One line per outage: a database that is away for an hour must not fill the log.
        if self._log is not None and not self._outage_logged and now - self._failing_since >= self._log_after:
            self._outage_logged = True
            self._log.warning("loop.failing", loop=self.name, error=error)
        await asyncio.sleep(self._backoff.pause(self._failures))


NextDelay = Callable[[OctoError, int], float | None]
"""Decides after a failure and the number of attempts so far: seconds until the next attempt, or ``None`` to give up."""


class Attempt:
    """One attempt of :class:`Retries`, a context manager. ``number`` counts from 1."""

    def __init__(self, number: int, next_delay: NextDelay) -> None:
        self.number = number
        self.delay: float | None = None
        self._next_delay = next_delay

    def __enter__(self) -> Attempt:
        """Begin the attempt."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """Suppress an :class:`OctoError` after which another attempt follows."""
        if isinstance(error, OctoError):
            self.delay = self._next_delay(error, self.number)
        return self.delay is not None


class Retries:
    """The attempts of one call, an async iterator: ``async for attempt in Retries(policy): with attempt: …``.

    It ends after the first attempt that succeeds; the pauses are between the attempts. The decision is the policy's
    alone, so a policy is tested without waiting.
    """

    def __init__(self, next_delay: NextDelay) -> None:
        self._next_delay = next_delay
        self._last: Attempt | None = None

    def __aiter__(self) -> Retries:
        """Return itself."""
        return self

    async def __anext__(self) -> Attempt:
        """Return the next attempt, after the pause that the policy wants."""
        last = self._last
        if last is not None and last.delay is None:
            raise StopAsyncIteration
        if last is not None and last.delay is not None:
            await asyncio.sleep(last.delay)
        self._last = Attempt(1 if last is None else last.number + 1, self._next_delay)
        return self._last


async def retry(work: Callable[[], Awaitable[T]], next_delay: NextDelay) -> T:
    """Return the result of ``work``, which is called again after an :class:`OctoError` while ``next_delay`` allows."""
    async for attempt in Retries(next_delay):
        with attempt:
            return await work()
    raise AssertionError("an attempt that fails for the last time raises its error")


async def retry_outage(work: Callable[[], Awaitable[T]], backoff: Backoff, *, name: str, log: LoopLogger) -> T:
    """Return the result of ``work``, called again without a limit while a server that it needs is away.

    The log shows the wait under ``name``, as it shows an outage of a :class:`BackgroundLoop`.
    """

    def next_delay(error: OctoError, attempt: int) -> float | None:
        if error.code not in ("unavailable", "overloaded"):
            return None
        if attempt == 1:
            log.warning("loop.failing", loop=name, error=error)
        return backoff.pause(attempt)

    return await retry(work, next_delay)


async def wait_for_event(event: asyncio.Event, timeout: float, *, clear: bool = True) -> None:
    """Return when ``event`` is set, or after ``timeout`` seconds; then clear it, unless told not to."""
    if timeout <= 0:
        # One turn of the event loop: a timer of no length would cancel the wait, which costs more than many a round.
        await asyncio.sleep(0)
    elif not event.is_set():
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await event.wait()
    if clear:
        event.clear()


class TaskDeadline:
    """Limits each of many short pieces of work that one task does one after the other, as ``asyncio.timeout`` does.

    ``asyncio.timeout`` sets and removes a timer each time, which takes longer than a small piece of work. This one has
    a timer at a time, which finds out when it fires whether the piece that runs by then is late.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._timer: asyncio.TimerHandle | None = None
        self._due: float | None = None
        self._expired = False
        self._cancelling = 0

    def __enter__(self) -> None:
        """Begin a piece of work."""
        self._due = self._loop.time() + self._seconds
        self._expired = False
        self._cancelling = self._task.cancelling()
        if self._timer is None:
            self._timer = self._loop.call_at(self._due, self._check)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it. Raises ``TimeoutError`` when it was cancelled because it was late, and for no other reason."""
        self._due = None
        if self._expired and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise TimeoutError from error

    def _check(self) -> None:
        self._timer = None
        if self._due is None:
            return
        if self._loop.time() < self._due:
            self._timer = self._loop.call_at(self._due, self._check)
            return
        self._expired = True
        self._task.cancel()

    def close(self) -> None:
        """Remove the timer."""
        if self._timer is not None:
            self._timer.cancel()


_LOCK_POLL_SECONDS = 0.1


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
                await asyncio.sleep(_LOCK_POLL_SECONDS)
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
    """Another process held the lock for longer than ``wait_seconds``."""


async def run_until_first(*coroutines: Coroutine[Any, Any, object]) -> int:
    """Run ``coroutines`` until one ends, cancel the others, and return the index of the first; raise its exception."""
    tasks = [asyncio.ensure_future(work) for work in coroutines]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        first = next(index for index, task in enumerate(tasks) if task.done())
        tasks[first].result()
        return first
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        for task in tasks:
            if not task.cancelled():
                # Mark the exception as retrieved: the first one was raised above, the others no longer matter.
                task.exception()
