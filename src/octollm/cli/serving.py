"""`octollm serve` and `octollm keys provision`: services in processes of their own."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
from rich.text import Text

from octollm.cli.environment import command_settings
from octollm.cli.exits import EXIT_DONE, exit_code_of
from octollm.cli.running import run_command
from octollm.cli.terminal import messages, output, show_error
from octollm.clock import SystemClock, Uuid7Ids
from octollm.errors import OctoError
from octollm.installation.own_keys import provision

SPARE_SECONDS = 10.0
"""What stopping may take beyond draining before the process just ends."""


def serve_command(service: str) -> int:
    """Serve one service until a signal."""
    from octollm.installation.single import single_service  # noqa: PLC0415  brings in every service

    console = messages()
    try:
        settings = command_settings()
    except OctoError as error:
        show_error(error)
        return exit_code_of(error)

    async def work() -> int:
        clock = SystemClock()

        def tell(what: str) -> None:
            console.print(Text(f"Waiting for {what}", "octo.quiet"))

        async with single_service(service, settings, clock=clock, ids=Uuid7Ids(clock), tell=tell) as single:
            console.print(Text.assemble(("Ready ", "octo.title"), f"{single.name} on {single.address}"))
            await single.host.ended()
        return EXIT_DONE

    # To be told to stop is the usual end of a service: an orchestrator of containers takes anything else for a failure.
    return run_command(work, last_resort=settings.drain_seconds + SPARE_SECONDS, interrupted=EXIT_DONE)


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
