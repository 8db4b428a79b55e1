"""`octollm events tail`: the event log as it grows."""

from __future__ import annotations

import contextlib

import msgspec
from rich.console import Console
from rich.text import Text

from octollm.cli.output import output
from octollm.cli.runtime import EXIT_DONE, command_settings, open_client, run_command
from octollm.client import AsyncClient
from octollm.contracts.events import Event

_PAGE = 500


def tail_command(after: int | None, *, as_json: bool) -> int:
    """Print events until interrupted, going on where a broken connection stopped."""

    async def work() -> int:
        console = output()
        async with open_client(command_settings()) as octo:
            # Asked first in any case: a door that is not there is told at once.
            position = await _last_position(octo) if after is None else after
            await octo.event_page(after=position, limit=1)
            async with contextlib.aclosing(octo.events(after=position)) as events:
                async for event in events:
                    _print_event(event, console, as_json=as_json)
        return EXIT_DONE

    return run_command(work)


async def _last_position(octo: AsyncClient) -> int:
    """Return the position of the last event that there is."""
    position = 0
    while (page := await octo.event_page(after=position, limit=_PAGE)).events:
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
