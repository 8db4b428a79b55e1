"""`octollm up` and `demo`: an installation in this process, until it is stopped or its goal is done."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from octollm.arm import Arm
from octollm.cli.goals import GoalRequest, run_goal, validate_goal
from octollm.cli.models import ensure_model
from octollm.cli.output import output
from octollm.cli.runtime import async_command, command_settings
from octollm.cli.serve import with_enrolment_token
from octollm.client import connect
from octollm.clock import SystemClock, Uuid7Generator
from octollm.config import Settings
from octollm.installation.arm_host import load_arms, serve_arm
from octollm.installation.embedded import Installation, embedded_installation
from octollm.installation.network import is_loopback
from octollm.installation.service_host import ServiceHost, supervise_hosts, tune_garbage_collector

DEMO_GOAL = "Write a Python function is_palindrome(text) with tests"
"""The goal of `octollm demo` without an argument."""
ARM_DRAIN_SECONDS = 0.5
"""How long an arm's calls in flight may take to end on shutdown: their callers in this process stop, too."""

app = typer.Typer()


@app.command(rich_help_panel="Start")
@async_command
async def demo(
    goal: Annotated[str, typer.Argument(help="The goal, in plain language.")] = DEMO_GOAL,
) -> int:
    """Start every service in this process, run one goal, save the result, and stop."""
    return await run_single_goal(command_settings(), GoalRequest(validate_goal(goal)), output())


@app.command(rich_help_panel="Start")
@async_command
async def up(
    arm: Annotated[
        list[str] | None,
        typer.Option(
            "--arm", help="An arm of your own as module:name, served too; may be given several times.", metavar="ARM"
        ),
    ] = None,
) -> int:
    """Run every service on this machine until Ctrl-C."""
    return await run_until_stopped(command_settings(), output(), load_arms(arm or ()))


@contextlib.asynccontextmanager
async def running_installation(settings: Settings, console: Console) -> AsyncGenerator[Installation]:
    """Fetch the model, start every service and wait until all are ready, printing each stage."""
    clock = SystemClock()
    entry = await ensure_model(settings, console)
    console.print(Text.assemble(("Model ", "octo.title"), entry.title if entry else settings.model))
    with console.status("Starting") as status:
        async with embedded_installation(
            settings, clock=clock, ids=Uuid7Generator(clock), on_stage=lambda name: status.update(f"Starting {name}")
        ) as system:
            status.update("Waiting until every service is ready")
            await system.wait_ready()
            status.stop()
            tune_garbage_collector()
            console.print(
                Text.assemble(
                    ("Ready ", "octo.title"), f"{len(system.urls)} services; the gateway: {system.gateway_url}"
                )
            )
            console.print(Text.assemble(("Page  ", "octo.title"), f"{system.gateway_url}/"))
            yield system


async def run_until_stopped(settings: Settings, console: Console, arms: Sequence[Arm[Any]] = ()) -> int:
    """Run an installation and ``arms`` beside it, until cancelled or until one of the arms ends."""
    async with contextlib.AsyncExitStack() as stack:
        system = await stack.enter_async_context(running_installation(settings, console))
        hosts = [await stack.enter_async_context(_serve_own_arm(arm, system, console)) for arm in arms]
        if not is_loopback(settings.host):
            console.print(
                Text(f"      It listens on {settings.host}: other machines reach it, and need an API key", "octo.warn")
            )
        console.print(Text.assemble(("Home  ", "octo.title"), f"{system.home.root}"))
        console.print(Text.assemble(("Log   ", "octo.title"), f"{system.home.log_file}"))
        console.print(Text.assemble(("Next  ", "octo.title"), 'octollm run "GOAL" in another terminal; Ctrl-C stops'))
        async with supervise_hosts(hosts):
            await asyncio.Event().wait()
    return 0


@contextlib.asynccontextmanager
async def _serve_own_arm(arm: Arm[Any], system: Installation, console: Console) -> AsyncGenerator[ServiceHost]:
    """Serve an arm of the user's in this process. It enrols and calls as it would from a process of its own."""
    settings = replace(
        system.settings,
        service_urls={**{name: (url,) for name, url in system.urls.items()}, **system.settings.service_urls},
        shutdown_grace=ARM_DRAIN_SECONDS,
        port=0,
        advertise_url=None,
        urls=(),
    )
    clock = SystemClock()
    settings = await with_enrolment_token(arm, settings, console)
    async with serve_arm(
        arm, settings, system.http, clock=clock, ids=Uuid7Generator(clock), on_wait=lambda _names: None
    ) as host:
        console.print(Text.assemble(("Arm   ", "octo.title"), f"{host.name} on {host.address}"))
        yield host


async def run_single_goal(settings: Settings, request: GoalRequest, console: Console, *, as_json: bool = False) -> int:
    """Run an installation for one goal; return the exit code of the goal."""
    async with running_installation(settings, console) as system:
        key = None if settings.trust_loopback and is_loopback(settings.host) else system.local_key
        page_url = f"{system.gateway_url}/ shows this task too, once `octollm up` runs"
        async with connect(system.gateway_url, key) as client:
            return await run_goal(client, request, console, root=Path.cwd(), page_url=page_url, as_json=as_json)
