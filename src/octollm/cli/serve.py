"""`octollm serve` and `migrate`: one service or arm in its own process, and the database schemas."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from octollm.arm import Arm
from octollm.cli.completion import complete_service
from octollm.cli.output import messages, output, show_error
from octollm.cli.runtime import (
    EXIT_DONE,
    AsJson,
    async_command,
    command_settings,
    exit_code_for,
    open_client,
    print_json,
    run_command,
)
from octollm.clock import SystemClock, Uuid7Generator
from octollm.config import Settings
from octollm.errors import OctoError
from octollm.installation.arm_host import load_arm, open_arm_keys, serve_arm
from octollm.installation.home import find_running
from octollm.installation.network import transport_from_settings
from octollm.installation.service_host import ServiceHost, tune_garbage_collector
from octollm.telemetry import configure_logging

KILL_MARGIN_SECONDS = 10.0
"""Time that stopping may take beyond ``shutdown_grace`` before the process just exits."""

app = typer.Typer()


@app.command(rich_help_panel="Start")
def serve(
    service: Annotated[
        str,
        typer.Argument(
            help="A built-in service, e.g. coder; or an arm of your own as module:name, e.g. my_arm:arm.",
            autocompletion=complete_service,
        ),
    ],
    port: Annotated[
        int | None,
        typer.Option(help="Listen on this port, in place of OCTOLLM_PORT.", min=1, max=65535, metavar="PORT"),
    ] = None,
) -> None:
    """Serve one service, or an arm of your own, until SIGTERM or Ctrl-C, which drains it.

    The configuration is in environment variables. The process waits for its dependencies (OCTOLLM_STARTUP_TIMEOUT),
    names the missing ones, and writes its log as JSON lines to standard error. An arm of your own enrols at its first
    start with OCTOLLM_ENROLMENT_TOKEN (`octollm keys enrol`). If your own installation runs on this machine, it needs
    no token.
    """
    console = messages()
    try:
        settings = command_settings()
        if port is not None:
            settings = replace(settings, port=port)
    except OctoError as error:
        show_error(error)
        raise typer.Exit(exit_code_for(error)) from None

    def report(names: str) -> None:
        console.print(Text(f"Waiting for {names}", "octo.quiet"))

    async def work() -> int:
        serving = (
            _serve_arm(service, settings, console, report)
            if ":" in service
            else _serve_builtin(service, settings, report)
        )
        async with serving as host:
            tune_garbage_collector()
            console.print(Text.assemble(("Ready ", "octo.title"), f"{host.name} on {host.address}"))
            await host.wait()
        return EXIT_DONE

    # A signal is the normal end of a service: container orchestrators treat any exit code but 0 as a crash.
    raise typer.Exit(
        run_command(work, kill_after=settings.shutdown_grace + KILL_MARGIN_SECONDS, interrupted_code=EXIT_DONE)
    )


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


async def with_enrolment_token(arm: Arm[Any], settings: Settings, console: Console) -> Settings:
    """Return the settings with an enrolment token, where this home's own installation can issue one.

    The owner of the home administers its installation; at another one, its administrator hands the token out.
    """
    if settings.enrolment_token is not None or settings.urls or await find_running(settings.home) is None:
        return settings
    if (await open_arm_keys(settings, arm.name, Uuid7Generator(SystemClock()))).is_enrolled:
        return settings
    async with open_client(settings) as client:
        token = await client.admin.create_enrolment_token(arm.name, calls=arm.declared_calls, lifetime_seconds=600)
    console.print(Text.assemble(("Enrol ", "octo.title"), f"{arm.name}, with the calls that it declares"))
    return replace(settings, enrolment_token=token.secret)


@app.command(rich_help_panel="Installation")
@async_command
async def migrate(as_json: AsJson = False) -> int:
    """Migrate the schemas of every service to this version, in the database that OCTOLLM_DATABASE_URL names.

    Run it once before services of a new version start; those of the previous version keep working meanwhile. Each
    schema changes in one transaction. Services on SQLite migrate at their start.
    """
    from octollm.storage.migrations import migrate_all  # noqa: PLC0415  brings in SQLAlchemy, which arms do not need

    migrations = await migrate_all(command_settings(), SystemClock())
    if as_json:
        print_json({"schemas": migrations})
        return EXIT_DONE
    for schema in migrations:
        changed = schema.before != schema.after
        text = f"{schema.before or 'nothing'} → {schema.after}" if changed else schema.after
        output().print(Text.assemble((schema.service, "octo.title"), f"  {text}"))
    return EXIT_DONE


@app.command(rich_help_panel="Installation")
@async_command
async def archive(as_json: AsJson = False) -> int:
    """Delete events, tasks, files and audit rows past their retention now; archive them in OCTOLLM_ARCHIVE_URL.

    A running orchestrator does this by itself each minute. It alone erases from the memory what deleted tasks left
    there. The settings are those of the orchestrator.
    """
    from octollm.services.orchestrator.retention import run_retention  # noqa: PLC0415  brings in SQLAlchemy

    clock = SystemClock()
    result = await run_retention(command_settings(), clock, Uuid7Generator(clock))
    if as_json:
        print_json(result)
    elif result is None:
        output().print("A running orchestrator is deleting now.")
    else:
        output().print(
            f"Deleted {result.events} events, {result.tasks} tasks, {result.files} files and {result.audit} audit rows."
        )
        if result.erasures_left:
            output().print(f"The orchestrator erases what {result.erasures_left} deleted tasks left in the memory.")
        if result.truncated:
            output().print(f"A durable subscription had not handled {result.truncated} of the events.")
    return EXIT_DONE
