"""An installation in this process: for ``up`` until it is stopped, for ``demo`` until its goal is done."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from pathlib import Path

from rich.console import Console
from rich.text import Text

from octollm.cli.goal import Order, carry_out
from octollm.cli.model_file import ensure_model
from octollm.client import connect
from octollm.clock import SystemClock, Uuid7Ids
from octollm.config import Settings
from octollm.installation.embedded import System, embedded_system
from octollm.installation.ports import is_loopback


@contextlib.asynccontextmanager
async def running_system(settings: Settings, console: Console) -> AsyncGenerator[System]:
    """Bring the model, start every service and wait until all are ready, telling so."""
    clock = SystemClock()
    entry = await ensure_model(settings, console)
    console.print(Text.assemble(("Model ", "octo.title"), entry.title if entry else settings.model))
    with console.status("Starting") as status:
        async with embedded_system(
            settings, clock=clock, ids=Uuid7Ids(clock), on_stage=lambda what: status.update(f"Starting {what}")
        ) as system:
            status.update("Waiting until every service is ready")
            await system.wait_ready()
            status.stop()
            console.print(
                Text.assemble(("Ready ", "octo.title"), f"{len(system.urls)} services; the public door: {system.door}")
            )
            console.print(Text.assemble(("Page  ", "octo.title"), f"{system.door}/"))
            yield system


async def stay_up(settings: Settings, console: Console) -> int:
    """Run an installation until it is cancelled."""
    async with running_system(settings, console) as system:
        if not is_loopback(settings.host):
            console.print(
                Text(f"      It listens on {settings.host}: other machines reach it, and need an API key", "octo.warn")
            )
        console.print(Text.assemble(("Home  ", "octo.title"), f"{system.home.root}"))
        console.print(Text.assemble(("Log   ", "octo.title"), f"{system.home.log_file}"))
        console.print(Text.assemble(("Next  ", "octo.title"), 'octollm run "GOAL" in another terminal; Ctrl-C stops'))
        await asyncio.Event().wait()
    return 0


async def show_demo(settings: Settings, goal: str, console: Console) -> int:
    """Run an installation for one goal; return the exit code of the goal."""
    return await do_one_goal(settings, Order(goal), console)


async def do_one_goal(settings: Settings, order: Order, console: Console, *, as_json: bool = False) -> int:
    """Run an installation for one order; return its exit code."""
    async with running_system(settings, console) as system:
        key = None if settings.local_trust and is_loopback(settings.host) else system.local_key
        page = f"{system.door}/ shows this task too, once `octollm up` runs"
        async with connect(system.door, key) as octo:
            return await carry_out(octo, order, console, root=Path.cwd(), page=page, as_json=as_json)
