"""Running a command's work: an event loop, signals, and an end that comes in any case."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Coroutine
from typing import Any

from octollm.cli.exits import EXIT_INTERRUPTED, exit_code_for
from octollm.cli.terminal import show_error
from octollm.errors import OctoError

KILL_AFTER_SECONDS = 2.8
"""After a signal a command ends within this time, whatever still runs."""

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class InterruptHandler:
    """Turns the first signal into a cancellation, and sees to it that the process ends soon after."""

    def __init__(self, kill_after: float) -> None:
        self.task: asyncio.Task[int] | None = None
        self.is_interrupted = False
        self._timer = threading.Timer(kill_after, _exit_now)
        self._timer.daemon = True

    def handle_signal(self) -> None:
        """Cancel the work; on the second signal, end at once."""
        if self.is_interrupted:
            _exit_now()
        self.is_interrupted = True
        self._timer.start()
        if self.task is not None:
            self.task.cancel()

    def disarm(self) -> None:
        """Note that the work has ended by itself, with its threads."""
        self._timer.cancel()
        if self._timer.is_alive():
            self._timer.join()


def _exit_now() -> None:
    """End the process without waiting for anything. Children notice by their closed pipes."""
    os._exit(EXIT_INTERRUPTED)


async def _run_interruptible(
    work: Callable[[], Coroutine[Any, Any, int]], interrupt: InterruptHandler, interrupted_code: int
) -> int:
    loop = asyncio.get_running_loop()
    task = interrupt.task = asyncio.create_task(work(), name="command")
    for number in _SIGNALS:
        with contextlib.suppress(NotImplementedError, RuntimeError):  # a platform or thread without them
            loop.add_signal_handler(number, interrupt.handle_signal)
    try:
        return await task
    except BaseException:
        # What an interrupted piece of work dies of is not what the user has to hear.
        if interrupt.is_interrupted:
            return interrupted_code
        raise


def _new_loop() -> asyncio.AbstractEventLoop:
    if sys.platform == "win32":
        return asyncio.new_event_loop()
    import uvloop  # noqa: PLC0415  not there on every platform

    return uvloop.new_event_loop()


def run_command(
    work: Callable[[], Coroutine[Any, Any, int]],
    *,
    kill_after: float = KILL_AFTER_SECONDS,
    interrupted_code: int = EXIT_INTERRUPTED,
) -> int:
    """Run ``work`` and return its exit code; a failure is printed, a signal stops it.

    ``last_resort`` is how many seconds after a signal the process ends, whatever still runs; ``interrupted`` is the
    exit code of work that a signal stopped in order.
    """
    interrupt = InterruptHandler(kill_after)
    try:
        with asyncio.Runner(loop_factory=_new_loop) as runner:
            return runner.run(_run_interruptible(work, interrupt, interrupted_code))
    except OctoError as error:
        show_error(error)
        return exit_code_for(error)
    finally:
        interrupt.disarm()
