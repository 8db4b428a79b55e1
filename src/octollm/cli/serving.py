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
from octollm.cli.exits import EXIT_DONE, exit_code_of
from octollm.cli.own_arms import with_join_secret
from octollm.cli.running import run_command
from octollm.cli.terminal import messages, output, show_error
from octollm.clock import SystemClock, Uuid7Ids
from octollm.config import Settings
from octollm.errors import OctoError
from octollm.installation.collector import settle_collector
from octollm.installation.hosted import Hosted
from octollm.installation.own_arm import load_arm, own_arm
from octollm.installation.own_keys import provision
from octollm.installation.wires import wire_of
from octollm.telemetry import configure_logs

SPARE_SECONDS = 10.0
"""What stopping may take beyond draining before the process just ends."""


def serve_command(target: str) -> int:
    """Serve one service, or the arm that ``module:name`` names, until a signal."""
    console = messages()
    try:
        settings = command_settings()
    except OctoError as error:
        show_error(error)
        return exit_code_of(error)

    def tell(what: str) -> None:
        console.print(Text(f"Waiting for {what}", "octo.quiet"))

    async def work() -> int:
        serving = _arm(target, settings, console, tell) if ":" in target else _service(target, settings, tell)
        async with serving as host:
            settle_collector()
            console.print(Text.assemble(("Ready ", "octo.title"), f"{host.name} on {host.address}"))
            await host.ended()
        return EXIT_DONE

    # To be told to stop is the usual end of a service: an orchestrator of containers takes anything else for a failure.
    return run_command(work, last_resort=settings.drain_seconds + SPARE_SECONDS, interrupted=EXIT_DONE)


@contextlib.asynccontextmanager
async def _service(name: str, settings: Settings, tell: Callable[[str], None]) -> AsyncGenerator[Hosted]:
    from octollm.installation.single import single_service  # noqa: PLC0415  brings in every service

    clock = SystemClock()
    async with single_service(name, settings, clock=clock, ids=Uuid7Ids(clock), tell=tell) as host:
        yield host


@contextlib.asynccontextmanager
async def _arm(
    target: str, settings: Settings, console: Console, tell: Callable[[str], None]
) -> AsyncGenerator[Hosted]:
    arm = load_arm(target)
    clock = SystemClock()
    settings = await with_join_secret(arm, settings, console)
    async with wire_of(settings).client() as http:
        with configure_logs(None, level=settings.log_level, clock=clock):
            async with own_arm(arm, settings, http, clock=clock, ids=Uuid7Ids(clock), tell=tell) as host:
                yield host


def provision_command(folder: Path, *, as_json: bool) -> int:
    """Make keys and say which files were written."""

    async def work() -> int:
        clock = SystemClock()
        written = await asyncio.to_thread(provision, folder, Uuid7Ids(clock))
        if as_json:
            print(msgspec.json.encode({"written": [str(path) for path in written]}).decode())
            return EXIT_DONE
        for path in written:
            output().print(Text(str(path)))
        if not written:
            messages().print(Text("All keys are there already.", "octo.quiet"))
        return EXIT_DONE

    return run_command(work)
