"""What every command shares: exit codes, settings, the event loop with its signals, and the API client."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Annotated, Any, ParamSpec

import typer

from octollm.cli.output import encode_json_line, restore_cursor, show_error, show_warning
from octollm.client import APIError, AsyncClient, connect
from octollm.client._transport import GatewayTransport, create_transport
from octollm.config import Settings, read_settings, unknown_settings
from octollm.contracts.problems import ERROR_KINDS
from octollm.contracts.services import SERVICES, local_url
from octollm.errors import OctoError
from octollm.installation.home import find_running, read_local_key
from octollm.resilience import RetryPolicy

P = ParamSpec("P")

EXIT_DONE = 0
"""The command succeeded; for a goal: the task completed."""
EXIT_FAILED = 1
"""The command failed and printed the reason."""
EXIT_USAGE = 2
"""Wrong usage or input: nothing was sent or started."""
EXIT_NOT_FOUND = 3
"""For a goal: the task completed, but the files do not have what it asks for."""
EXIT_INTERRUPTED = 130
"""Stopped by Ctrl-C or a signal (128 + SIGINT)."""

KILL_AFTER_SECONDS = 2.8
"""A command exits within this time after a signal, whatever is still running."""
RESTORE_SECONDS = 0.1
"""How long the terminal may take to show its cursor again."""
PROBE_SECONDS = 2.0
"""Timeout of the check whether an installation runs on this machine."""

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def print_json(value: object) -> None:
    """Print one JSON document on a line of standard output."""
    print(encode_json_line(value), flush=True)


def exit_code_for(error: OctoError) -> int:
    """Return the exit code for an error: ``EXIT_USAGE`` when the input, a setting or an arm's declaration is wrong."""
    kind = ERROR_KINDS.get(error.code)
    if error.code in ("setting_invalid", "arm_invalid") or (kind is not None and kind.status in (400, 413)):
        return EXIT_USAGE
    return EXIT_FAILED


def command_settings(*, warn: bool = True) -> Settings:
    """Read the settings from the environment. Raises ``setting_invalid``.

    ``warn`` prints a warning for each ``OCTOLLM_*`` variable that is no setting.
    """
    services = tuple(SERVICES)
    for sentence in unknown_settings(os.environ, services) if warn else ():
        show_warning(sentence)
    return read_settings(os.environ, services)


class InterruptHandler:
    """Cancel the command on the first signal; end the process on the second, or ``kill_after`` seconds later."""

    def __init__(self, kill_after: float) -> None:
        self.task: asyncio.Task[int] | None = None
        self.is_interrupted = False
        self._timer = threading.Timer(kill_after, _exit_now)
        self._timer.daemon = True

    def handle_signal(self) -> None:
        """Cancel the command; on the second signal, exit at once."""
        if self.is_interrupted:
            _exit_now()
        self.is_interrupted = True
        self._timer.start()
        if self.task is not None:
            self.task.cancel()

    def disarm(self) -> None:
        """Stop the kill timer: the command has ended, and so have its threads."""
        self._timer.cancel()
        if self._timer.is_alive():
            self._timer.join()


def _exit_now() -> None:
    """Exit without waiting for anything. Child processes notice their closed pipes."""
    # In a thread: the terminal may have been stopped, and does not take anything then.
    restoring = threading.Thread(target=restore_cursor, daemon=True)
    restoring.start()
    restoring.join(RESTORE_SECONDS)
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
        # Errors caused by the cancellation itself would only confuse the user.
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
    """Run ``work`` and return its exit code. Errors are printed; a signal cancels ``work``.

    ``kill_after`` seconds after a signal the process exits, whatever is still running. ``interrupted_code`` is the
    exit code when a signal stopped ``work`` cleanly.
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


def ask_for_consent(question: str) -> None:
    """Ask yes or no on the terminal; end the process unless the answer is yes. Not for a running event loop."""
    try:
        typer.confirm(question, abort=True, err=True)
    except typer.Abort as error:
        # Raised for "no", for the end of the input, and in place of KeyboardInterrupt.
        if isinstance(error.__context__, KeyboardInterrupt):
            typer.echo(err=True)
            raise typer.Exit(EXIT_INTERRUPTED) from error
        raise


def async_command(work: Callable[P, Coroutine[Any, Any, int]]) -> Callable[P, None]:
    """Make a typer command of a coroutine function that returns the exit code.

    The wrapper keeps the signature and docstring, from which typer builds options and help.
    """

    @functools.wraps(work)
    def command(*args: P.args, **kwargs: P.kwargs) -> None:
        raise typer.Exit(run_command(functools.partial(work, *args, **kwargs)))

    return command


async def has_no_installation(settings: Settings) -> bool:
    """Return whether no gateway answers on this machine and the settings name none elsewhere."""
    if settings.urls or await find_running(settings.home) is not None:
        return False
    async with connect(_local_url(settings), timeout=PROBE_SECONDS, retry=RetryPolicy(max_attempts=1)) as client:
        try:
            await client.health()
        except APIError as error:
            return error.code == "connect_failed"
        return False


@contextlib.asynccontextmanager
async def open_client(settings: Settings) -> AsyncGenerator[AsyncClient]:
    """Open a client of the gateway: at ``OCTOLLM_URL``, else on this machine."""
    urls, key = await _gateway_address(settings)
    async with connect(urls, key) as client:
        yield client


@contextlib.asynccontextmanager
async def open_transport(settings: Settings) -> AsyncGenerator[GatewayTransport]:
    """Open the transport to the same gateway, for requests that are no part of the public API."""
    transport = create_transport(*await _gateway_address(settings))
    try:
        yield transport
    finally:
        await transport.aclose()


async def _gateway_address(settings: Settings) -> tuple[tuple[str, ...], str | None]:
    """Return the URLs of the gateway and the API key to send."""
    if settings.urls:
        return settings.urls, settings.api_key
    running = await find_running(settings.home)
    key = settings.api_key
    # Another process may listen on the local port: send the home's own key only to the process that locks this home.
    if running and key is None and not settings.trust_loopback:
        key = read_local_key(settings.home)
    return (running.url if running else _local_url(settings),), key


def _local_url(settings: Settings) -> str:
    return local_url("reflex", port_offset=settings.port_offset, tls=settings.tls_cert is not None)
