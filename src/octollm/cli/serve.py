"""`octollm serve` and `migrate`: one service or arm in its own process, and the database schemas."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.text import Text

from octollm.arm import Arm
from octollm.cli.output import messages, output, show_error
from octollm.cli.runtime import EXIT_DONE, command_settings, exit_code_for, open_client, run_command
from octollm.clock import SystemClock, Uuid7Generator
from octollm.config import Settings
from octollm.errors import OctoError
from octollm.installation.arm_host import load_arm, open_arm_keys, serve_arm
from octollm.installation.home import find_running
from octollm.installation.network import transport_from_settings
from octollm.installation.provisioning import provision_keys
from octollm.installation.service_host import ServiceHost, tune_garbage_collector
from octollm.storage.migrations import migrate_all
from octollm.telemetry import configure_logging


async def with_enrolment_token(arm: Arm[Any], settings: Settings, console: Console) -> Settings:
    """Return the settings with a join secret, where this home's own installation can be asked for one.

    Whoever owns the home may let in what they like; elsewhere an administrator hands a secret out.
    """
    if settings.enrolment_token is not None or settings.urls or await find_running(settings.home) is None:
        return settings
    if (await open_arm_keys(settings, arm.name, Uuid7Generator(SystemClock()))).is_enrolled:
        return settings
    async with open_client(settings) as octo:
        made = await octo.create_enrolment_token(arm.name, calls=arm.declared_calls, lifetime_seconds=600)
    console.print(Text.assemble(("Joins ", "octo.title"), f"{arm.name}, with the calls that it declares"))
    return replace(settings, enrolment_token=made.secret)


def migrate_command(*, as_json: bool) -> int:
    """Migrate every service's schema, and say what was done with each."""

    async def work() -> int:
        done = await migrate_all(command_settings(), SystemClock())
        if as_json:
            print(msgspec.json.encode({"schemas": done}).decode())
            return EXIT_DONE
        for schema in done:
            changed = (
                f"{schema.before or 'nothing'} → {schema.after}" if schema.before != schema.after else schema.after
            )
            output().print(Text.assemble((schema.service, "octo.title"), f"  {changed}"))
        return EXIT_DONE

    return run_command(work)


KILL_MARGIN_SECONDS = 10.0
"""What stopping may take beyond draining before the process just ends."""


def serve_command(target: str, port: int | None = None) -> int:
    """Serve one service, or the arm that ``module:name`` names, until a signal; ``port`` is for OCTOLLM_PORT."""
    console = messages()
    try:
        settings = command_settings()
        if port is not None:
            settings = replace(settings, port=port)
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
    from octollm.installation.services import serve_builtin_service  # noqa: PLC0415  brings in every service

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
