"""`octollm serve` and `octollm keys provision`: services and arms in processes of their own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import msgspec
from rich.console import Console
from rich.text import Text

from octollm.cli.environment import command_settings
from octollm.cli.exits import EXIT_DONE, exit_code_for
from octollm.cli.own_arms import with_enrolment_token
from octollm.cli.running import run_command
from octollm.cli.terminal import messages, output, show_error
from octollm.clock import SystemClock, Uuid7Generator
from octollm.config import Settings
from octollm.errors import OctoError
from octollm.installation.collector import tune_garbage_collector
from octollm.installation.hosted import ServiceHost
from octollm.installation.own_arm import load_arm, serve_arm
from octollm.installation.own_keys import provision_keys
from octollm.installation.wires import transport_from_settings
from octollm.telemetry import configure_logging

KILL_MARGIN_SECONDS = 10.0
"""What stopping may take beyond draining before the process just ends."""


def serve_command(target: str) -> int:
    """Serve one service, or the arm that ``module:name`` names, until a signal."""
    console = messages()
    try:
        settings = command_settings()
    except OctoError as error:
        show_error(error)
        return exit_code_for(error)

    def tell(what: str) -> None:
        console.print(Text(f"Waiting for {what}", "octo.quiet"))

    async def work() -> int:
        serving = (
            _serve_arm(target, settings, console, tell) if ":" in target else _serve_builtin(target, settings, tell)
        )
        async with serving as host:
            tune_garbage_collector()
            console.print(Text.assemble(("Ready ", "octo.title"), f"{host.name} on {host.address}"))
            await host.wait()
        return EXIT_DONE

    # To be told to stop is the usual end of a service: an orchestrator of containers takes anything else for a failure.
    return run_command(work, kill_after=settings.shutdown_grace + KILL_MARGIN_SECONDS, interrupted_code=EXIT_DONE)


@contextlib.asynccontextmanager
async def _serve_builtin(name: str, settings: Settings, on_wait: Callable[[str], None]) -> AsyncGenerator[ServiceHost]:
    from octollm.installation.single import serve_builtin_service  # noqa: PLC0415  brings in every service

    clock = SystemClock()
    async with serve_builtin_service(name, settings, clock=clock, ids=Uuid7Generator(clock), on_wait=on_wait) as host:
        yield host


@contextlib.asynccontextmanager
async def _serve_arm(
    target: str, settings: Settings, console: Console, on_wait: Callable[[str], None]
) -> AsyncGenerator[ServiceHost]:
    arm = load_arm(target)
    clock = SystemClock()
    settings = await with_enrolment_token(arm, settings, console)
    async with transport_from_settings(settings).create_client() as http:
        with configure_logging(None, level=settings.log_level, clock=clock):
            async with serve_arm(arm, settings, http, clock=clock, ids=Uuid7Generator(clock), on_wait=on_wait) as host:
                yield host


def provision_command(folder: Path, *, as_json: bool) -> int:
    """Make keys and say which files were written."""

    async def work() -> int:
        clock = SystemClock()
        written = await asyncio.to_thread(provision_keys, folder, Uuid7Generator(clock))
        if as_json:
            print(msgspec.json.encode({"written": [str(path) for path in written]}).decode())
            return EXIT_DONE
        for path in written:
            output().print(Text(str(path)))
        if not written:
            messages().print(Text("All keys are there already.", "octo.quiet"))
        return EXIT_DONE

    return run_command(work)
