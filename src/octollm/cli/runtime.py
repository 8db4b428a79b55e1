"""What every command shares: exit codes, settings, the event loop with its signals, and the API client."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

from octollm.cli.output import show_error, show_warning
from octollm.client import APIError, AsyncClient, connect
from octollm.client._transport import GatewayTransport
from octollm.config import Settings, read_settings, unknown_settings
from octollm.contracts.problems import ERROR_KINDS
from octollm.contracts.services import SERVICES, local_url
from octollm.errors import OctoError
from octollm.installation.home import find_running, read_local_key
from octollm.resilience import RetryPolicy

EXIT_DONE = 0
"""What was asked for is done; for a goal: it completed."""
EXIT_FAILED = 1
"""It failed, and the reason was said."""
EXIT_USAGE = 2
"""Wrong usage or input: nothing was sent or started."""
EXIT_INTERRUPTED = 130
"""Stopped by Ctrl-C or a signal (128 + SIGINT)."""


def exit_code_for(error: OctoError) -> int:
    """Return the exit code for a failure: faults of input, settings and declarations are the user's to mend."""
    kind = ERROR_KINDS.get(error.code)
    if error.code in ("setting_invalid", "arm_invalid") or (kind is not None and kind.status in (400, 413)):
        return EXIT_USAGE
    return EXIT_FAILED


def command_settings(*, warn: bool = True) -> Settings:
    """Read the settings from the environment; ``warn`` of names that nothing reads. Raises ``setting_invalid``."""
    services = tuple(SERVICES)
    for sentence in unknown_settings(os.environ, services) if warn else ():
        show_warning(sentence)
    return read_settings(os.environ, services)


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


PROBE_SECONDS = 2.0


async def has_no_installation(settings: Settings) -> bool:
    """Say whether no installation answers on this machine, and none elsewhere is meant."""
    if settings.urls or await find_running(settings.home) is not None:
        return False
    async with connect(_local_url(settings), timeout=PROBE_SECONDS, retry=RetryPolicy(max_attempts=1)) as octo:
        try:
            await octo.health()
        except APIError as error:
            return error.code == "connect_failed"
        return False


@contextlib.asynccontextmanager
async def open_client(settings: Settings) -> AsyncGenerator[AsyncClient]:
    """Open a client of the door that the settings name: ``OCTOLLM_URL``, else this machine's.

    The home's own key is shown only to the process that holds this home, and only when it wants one.
    """
    urls, key = settings.urls, settings.api_key
    if not urls:
        running = await find_running(settings.home)
        urls = (running.url if running else _local_url(settings),)
        if running and key is None and not settings.trust_loopback:
            key = read_local_key(settings.home)
    async with connect(urls, key) as octo:
        yield octo


@contextlib.asynccontextmanager
async def open_transport(settings: Settings) -> AsyncGenerator[GatewayTransport]:
    """Open the same door for requests that the client has no method for."""
    async with open_client(settings) as octo:
        yield octo.transport


def _local_url(settings: Settings) -> str:
    return local_url("reflex", port_offset=settings.port_offset, tls=settings.tls_cert is not None)
