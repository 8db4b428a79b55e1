"""`octollm events`: the event log as it grows, durable subscriptions, their lag and their dead letters."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from octollm.cli.output import output
from octollm.cli.runtime import EXIT_DONE, AsJson, async_command, command_settings, open_client, print_json
from octollm.client import APIError, AsyncClient
from octollm.contracts.events import Event
from octollm.contracts.subscriptions import DeadLetter, SinkView, SubscriptionRequest, SubscriptionView
from octollm.errors import OctoError

_PAGE = 500

SubscriptionArgument = Annotated[str, typer.Argument(help="The subscription's name.", metavar="NAME")]

app = typer.Typer()
events_app = typer.Typer(name="events", help="Follow the event log; durable subscriptions.", no_args_is_help=True)
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


@events_app.command("show")
@async_command
async def show(
    position: Annotated[int, typer.Argument(help="The event's position in the log.", min=1, metavar="SEQ")],
) -> int:
    """Print one event of the log as JSON."""
    async with open_client(command_settings()) as client:
        try:
            found = (await client.event_page(after=position - 1, limit=1)).events
        except APIError as error:
            # The detail is about the position before, after which a page would begin.
            if error.code not in ("position_unknown", "position_expired"):
                raise
            found = ()
    if not found or found[0].seq != position:
        raise OctoError(
            f"The log has no event of this tenant at position {position}. `octollm events tail --after 0` prints those"
            " that it has.",
            code="not_found",
        )
    print_json(found[0])
    return EXIT_DONE


@events_app.command("subscribe")
@async_command
async def subscribe(
    name: SubscriptionArgument,
    patterns: Annotated[list[str], typer.Argument(help="Channels such as events:task:*.", metavar="PATTERN...")],
    start: Annotated[str, typer.Option(help="For a new one: latest, earliest, or a position of the log.")] = "latest",
    on_poison: Annotated[str, typer.Option(help="After the last attempt: dead_letter or hold.")] = "dead_letter",
    create_only: Annotated[
        bool, typer.Option("--create-only", help="Create or change it, and print no events.")
    ] = False,
    as_json: AsJson = False,
) -> int:
    """Create or change a durable subscription, and print its events as they arrive, until Ctrl-C.

    An event is acknowledged once it is printed.
    """
    request = {
        "patterns": patterns,
        "start": int(start) if start.isdigit() else start,
        "on_poison": on_poison,
    }
    try:
        spec = msgspec.convert(request, SubscriptionRequest)
    except msgspec.ValidationError as error:
        raise OctoError(f"The subscription is wrong: {error}.", code="invalid_body") from error
    console = output()
    async with open_client(command_settings()) as client:
        view = await client.subscriptions.put(name, spec)
        if create_only:
            _print_views((view,), console, as_json=as_json)
            return EXIT_DONE
        async with contextlib.aclosing(client.subscriptions.events(name, consumer="cli")) as events:
            async for event in events:
                _print_event(event, console, as_json=as_json)
    return EXIT_DONE


@events_app.command("unsubscribe")
@async_command
async def unsubscribe(name: SubscriptionArgument, as_json: AsJson = False) -> int:
    """Delete a durable subscription with its position and dead letters."""
    async with open_client(command_settings()) as client:
        await client.subscriptions.delete(name)
    if as_json:
        print_json({"name": name, "state": "deleted"})
    else:
        output().print(Text(f"The subscription {name} is deleted."))
    return EXIT_DONE


@events_app.command("lag")
@async_command
async def show_lag(as_json: AsJson = False) -> int:
    """Show how far each durable subscription, and the event sink, is behind the log."""
    async with open_client(command_settings()) as client:
        views = await client.subscriptions.list()
        sink = await client.subscriptions.sink()
    _print_views(tuple(views), output(), sink, as_json=as_json)
    return EXIT_DONE


@events_app.command("consumers")
@async_command
async def show_consumers(name: SubscriptionArgument, as_json: AsJson = False) -> int:
    """Show the consumers of a durable subscription and the partitions that they hold."""
    async with open_client(command_settings()) as client:
        view = await client.subscriptions.read(name)
    if as_json:
        print_json(view.consumers)
        return EXIT_DONE
    table = Table("Consumer", "Partitions", "Lease", box=None)
    for consumer in view.consumers:
        table.add_row(Text(consumer.consumer), str(consumer.partitions), f"{consumer.lease_seconds:.1f} s")
    output().print(table)
    return EXIT_DONE


@events_app.command("replay")
@async_command
async def replay(
    name: SubscriptionArgument,
    after: Annotated[int | None, typer.Option(help="Continue after this position of the log.", min=0)] = None,
    since: Annotated[str | None, typer.Option(help="Continue from a time, such as 2025-11-10T10:30:00Z.")] = None,
    as_json: AsJson = False,
) -> int:
    """Deliver events again to a durable subscription."""
    async with open_client(command_settings()) as client:
        position = await client.subscriptions.replay(name, after=after, time=since)
    if as_json:
        print_json({"after": position})
    else:
        output().print(Text(f"The subscription {name} goes on after position {position}."))
    return EXIT_DONE


@events_app.command("dead")
@async_command
async def dead(
    subscription: Annotated[str, typer.Option(help="Only those of this subscription.")] = "",
    after: Annotated[int, typer.Option(help="Begin after this id.", min=0)] = 0,
    retry: Annotated[int | None, typer.Option(help="Have the dead letter with this id delivered again.")] = None,
    drop: Annotated[int | None, typer.Option(help="Drop the dead letter with this id.")] = None,
    as_json: AsJson = False,
) -> int:
    """List dead letters; retry or drop one."""
    async with open_client(command_settings()) as client:
        if retry is not None:
            await client.subscriptions.retry_dead_letter(retry)
        if drop is not None:
            await client.subscriptions.drop_dead_letter(drop)
        letters = await client.subscriptions.dead_letters(subscription, after=after, limit=200)
    if as_json:
        print_json(letters)
    else:
        _print_letters(letters)
    return EXIT_DONE


def _print_views(
    views: Sequence[SubscriptionView], console: Console, sink: SinkView | None = None, *, as_json: bool
) -> None:
    if as_json:
        print_json([*views, *filter(None, [sink])])
        return
    table = Table("Subscription", "Events", "Behind", "Age", "Delayed", "Held", "Dead", "Consumers", box=None)
    for view in views:
        lag = view.lag
        table.add_row(
            view.name,
            Text(" ".join(view.spec.patterns)),
            str(lag.positions),
            f"{lag.seconds:.0f} s",
            str(lag.delayed),
            str(lag.held),
            str(lag.dead),
            str(len(view.consumers)),
        )
    if sink is not None:
        table.add_row(sink.name, Text("all"), str(sink.lag.positions), f"{sink.lag.seconds:.0f} s")
    console.print(table)


def _print_letters(letters: Sequence[DeadLetter]) -> None:
    table = Table("Id", "Subscription", "State", "Position", "Event", "Attempts", "Reason", box=None)
    for letter in letters:
        table.add_row(
            str(letter.id),
            letter.subscription,
            letter.state,
            str(letter.event.seq),
            letter.event.event_type,
            str(letter.attempts),
            # As JSON text: a consumer chose it, and a terminal must not obey it.
            Text(msgspec.json.encode(letter.reason).decode()),
        )
    output().print(table)


async def _last_position(client: AsyncClient) -> int:
    """Return the position of the newest event in the log."""
    position = 0
    while (page := await client.event_page(after=position, limit=_PAGE)).events:
        position = page.after
    return position


def _print_event(event: Event, console: Console, *, as_json: bool) -> None:
    if as_json:
        print_json(event)
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
