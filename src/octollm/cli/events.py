"""`octollm events tail`: the event log as it grows."""

from __future__ import annotations

import contextlib
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.text import Text

from octollm.cli.output import output
from octollm.cli.runtime import EXIT_DONE, async_command, command_settings, open_client
from octollm.client import AsyncClient
from octollm.contracts.events import Event

_PAGE = 500

app = typer.Typer()
events_app = typer.Typer(name="events", help="Follow the event log.", no_args_is_help=True)
app.add_typer(events_app, rich_help_panel="Tasks")


@events_app.command("tail")
@async_command
async def tail(
    after: Annotated[
        int | None, typer.Option(help="Begin after this position of the log; 0 is its start.", min=0)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print each event's envelope as one line of JSON.")] = False,
) -> int:
    """Print events as they happen, until Ctrl-C."""
    console = output()
    async with open_client(command_settings()) as client:
        # Read a page first: events() would retry for a minute before it reports a gateway that is not there.
        position = await _last_position(client) if after is None else after
        await client.event_page(after=position, limit=1)
        async with contextlib.aclosing(client.events(after=position)) as events:
            async for event in events:
                _print_event(event, console, as_json=as_json)
    return EXIT_DONE


async def _last_position(client: AsyncClient) -> int:
    """Return the position of the newest event in the log."""
    position = 0
    while (page := await client.event_page(after=position, limit=_PAGE)).events:
        position = page.after
    return position


def _print_event(event: Event, console: Console, *, as_json: bool) -> None:
    if as_json:
        print(msgspec.json.encode(event).decode(), flush=True)
        return
    data = msgspec.json.encode(event.data).decode()
    console.print(
        Text.assemble(
            (f"{event.seq:>6} ", "octo.quiet"),
            (f"{event.timestamp} ", "octo.quiet"),
            (f"{event.event_type:<18}", "octo.title"),
            f" {event.subject} ",
            (data if len(data) <= 160 else data[:159] + "…", "octo.quiet"),
        )
    )
