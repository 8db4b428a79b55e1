"""`octollm events tail`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec
from rich.console import Console
from rich.text import Text

from octollm.cli.door import Door, open_door
from octollm.cli.environment import command_settings
from octollm.cli.exits import EXIT_DONE
from octollm.cli.running import run_command
from octollm.cli.terminal import output
from octollm.contracts.api import EventList
from octollm.contracts.events import Event
from octollm.errors import OctoError
from octollm.rpc.http import TransportError
from octollm.rpc.problems import error_from_response

_PAGE = 500
_STREAM_SECONDS = 3600.0
_RETRY_SECONDS = 1.0
_GIVE_UP_TRIES = 30
_MAX_EVENT = 4 * 1024 * 1024


def tail_command(after: int | None, *, as_json: bool) -> int:
    """Print events until interrupted, going on where a broken connection stopped."""

    async def work() -> int:
        console = output()
        async with open_door(command_settings()) as door:
            position = await _newest(door) if after is None else after
            tries = 0
            while tries < _GIVE_UP_TRIES:
                try:
                    async for event in _follow(door, position):
                        tries, position = 0, event.seq
                        _print(event, console, as_json=as_json)
                except TransportError as error:
                    if position == after and not error.began:
                        raise door.away(error) from error
                tries += 1
                await asyncio.sleep(_RETRY_SECONDS)
            raise OctoError(f"{door.url} has been away too long.", code="unavailable")
        return EXIT_DONE

    return run_command(work)


async def _newest(door: Door) -> int:
    """Return the position of the last event that there is."""
    position = 0
    while True:
        page = await door.get(f"/events?after={position}&limit={_PAGE}", EventList)
        if not page.events:
            return position
        position = page.after


async def _follow(door: Door, after: int) -> AsyncIterator[Event]:
    """Yield events behind ``after`` from the server-sent stream (WHATWG HTML section 9.2)."""
    headers = {**door.headers, "Accept": "text/event-stream"}
    async with door.http.stream(
        "GET", f"{door.url}/events?after={after}", headers, None, seconds=_STREAM_SECONDS
    ) as streamed:
        rest = b""
        async for chunk in streamed.chunks:
            *lines, rest = (rest + chunk).split(b"\n")
            if streamed.status >= 400:
                raise error_from_response("The public door", streamed.status, rest or chunk, None)
            if len(rest) > _MAX_EVENT:
                raise OctoError(f"{door.url} sent an event that is too long.", code="peer_protocol")
            for line in lines:
                if line.startswith(b"data:"):
                    yield _decoded(line[5:], door)


def _decoded(data: bytes, door: Door) -> Event:
    try:
        return msgspec.json.decode(data, type=Event)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise OctoError(f"{door.url} sent an event that is not understood.", code="peer_protocol") from error


def _print(event: Event, console: Console, *, as_json: bool) -> None:
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
