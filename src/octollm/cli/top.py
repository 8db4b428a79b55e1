"""`octollm top`: the services and the open tasks, live at a terminal, once in a pipe."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import termios
import tty
from collections.abc import Generator, Sequence
from typing import Annotated, cast

import msgspec
import typer
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from octollm.cli.doctor import probe_services
from octollm.cli.output import make_visible, output, table_cell
from octollm.cli.progress import parse_time
from octollm.cli.runtime import (
    EXIT_DONE,
    AsJson,
    async_command,
    command_settings,
    open_client,
    open_transport,
    print_json,
)
from octollm.cli.task_tree import format_duration
from octollm.cli.views import can_redraw
from octollm.client import APIError, AsyncClient
from octollm.client._transport import GatewayTransport
from octollm.clock import Clock, SystemClock
from octollm.concurrency import run_until_first
from octollm.config import Settings
from octollm.contracts.api import TaskSummary
from octollm.contracts.observability import HealthState
from octollm.contracts.task import TaskStatus
from octollm.errors import OctoError

OPEN_STATUSES: tuple[TaskStatus, ...] = ("running", "planning", "waiting", "paused", "accepted")
MAX_TASKS = 100
"""Tasks of one status that are read."""
REFRESHES_PER_SECOND = 4
_STYLES = {"up": "octo.good", "degraded": "octo.warn", "down": "octo.bad", "waiting": "octo.warn"}
_HEAD = "octo.title"
_ID_WIDTH = 37
_NARROW = 90
"""Columns below which a task's id is cut to its end."""

app = typer.Typer()


class ServiceFigures(msgspec.Struct, frozen=True):
    """A service: its state, and its figures of the last minute over all instances, ``None`` where unknown."""

    service: str
    state: HealthState = "unknown"
    instances: int = 0
    in_flight: int | None = None
    requests_per_second: float | None = None
    error_ratio: float | None = None
    p95_ms: float | None = None
    detail: str = ""


class _ServiceList(msgspec.Struct, frozen=True):
    services: tuple[ServiceFigures, ...]


class Snapshot(msgspec.Struct, frozen=True):
    """What is shown, as of ``at`` (seconds since the epoch). ``notes`` say what could not be read, and why."""

    at: float
    services: tuple[ServiceFigures, ...]
    tasks: tuple[TaskSummary, ...]
    notes: tuple[str, ...] = ()


@app.command(rich_help_panel="Installation")
@async_command
async def top(
    interval: Annotated[float, typer.Option(help="Seconds between two readings.", min=0.5, max=3600)] = 2.0,
    as_json: AsJson = False,
) -> int:
    """Show the services and the open tasks live; q quits. Without a terminal: once."""
    settings, console, clock = command_settings(), output(), SystemClock()
    async with open_client(settings) as client, open_transport(settings) as transport:
        snapshot = await read_snapshot(client, transport, settings, clock)
        if as_json:
            print_json(snapshot)
        elif can_redraw(console, os.environ) and sys.stdin.isatty():
            screen = _Screen(console, snapshot, clock)
            with screen.open(), _single_keys() as keyboard:
                await run_until_first(
                    screen.keep_reading(client, transport, settings, interval), _wait_for_key(keyboard, "q")
                )
        else:
            for line in draw_top(snapshot, width=console.width, height=None, now=clock.now()):
                console.print(line)
    return EXIT_DONE


async def read_snapshot(client: AsyncClient, transport: GatewayTransport, settings: Settings, clock: Clock) -> Snapshot:
    """Read the services and the open tasks. Raises :class:`APIError` when the tasks cannot be read."""
    pages = await asyncio.gather(*(client.task_page(limit=MAX_TASKS, status=status) for status in OPEN_STATUSES))
    tasks = [task for page in pages for task in page.tasks]
    notes = [
        f"More than {MAX_TASKS} tasks are {status}: the newest are shown."
        for status, page in zip(OPEN_STATUSES, pages, strict=True)
        if page.cursor is not None
    ]
    try:
        answer = await transport.send("GET", "/services")
        services = msgspec.json.decode(answer.body, type=_ServiceList).services
    except (APIError, msgspec.DecodeError) as error:
        # Without the monitor, or the right to read it, what can be reached from here says how it is.
        reason = error.detail if isinstance(error, APIError) else "its answer is not understood."
        notes.append(f"No figures from the monitor: {reason} The states are those that the services report themselves.")
        services = tuple(
            ServiceFigures(result.check, _STATES[result.level], 1, detail=result.found)
            for result in await probe_services(settings, transport)
        )
    # A task that changes its status between two requests is in two pages.
    unique = {task.task_id: task for task in tasks}
    return Snapshot(clock.now(), services, tuple(unique.values()), tuple(notes))


_STATES: dict[str, HealthState] = {"ok": "up", "warning": "degraded", "broken": "down"}


class _Screen:
    """The alternate screen of the terminal, which a thread redraws from the last snapshot."""

    def __init__(self, console: Console, snapshot: Snapshot, clock: Clock) -> None:
        self._console = console
        # Replaced as a whole, never changed: the drawing thread reads it at any time.
        self._snapshot = snapshot
        self._clock = clock

    @contextlib.contextmanager
    def open(self) -> Generator[None]:
        with Live(
            console=self._console,
            screen=True,
            get_renderable=self._draw,
            refresh_per_second=REFRESHES_PER_SECOND,
        ):
            yield

    async def keep_reading(
        self, client: AsyncClient, transport: GatewayTransport, settings: Settings, interval: float
    ) -> None:
        while True:
            await asyncio.sleep(interval)
            try:
                self._snapshot = await read_snapshot(client, transport, settings, self._clock)
            except OctoError as error:
                age = format_duration(self._clock.now() - self._snapshot.at)
                note = f"No answer, this is {age} old: {error.detail}"
                self._snapshot = msgspec.structs.replace(self._snapshot, notes=(note,))

    def _draw(self) -> Group:
        width, height = self._console.size
        return Group(*draw_top(self._snapshot, width=width, height=height, now=self._clock.now(), hint="q quits"))


def draw_top(snapshot: Snapshot, *, width: int, height: int | None, now: float, hint: str = "") -> list[Text]:
    """Return the lines: at most ``height``, none wider than ``width`` cells. ``now`` is in seconds since the epoch."""
    services = [_service_line(each) for each in sorted(snapshot.services, key=lambda each: each.state == "up")]
    tasks = [_task_line(each, width, now) for each in _in_order(snapshot.tasks)]
    counts = {status: sum(task.status == status for task in snapshot.tasks) for status in OPEN_STATUSES}
    summary = ", ".join(f"{count} {status}" for status, count in counts.items() if count) or "no open tasks"
    title = Text.assemble(("OctoLLM", _HEAD), f"  {summary}")
    if hint:
        title.append(f"  ({hint})", "octo.quiet")
    notes = [Text(table_cell(note).plain, "octo.warn") for note in snapshot.notes]
    head = [title, *notes]
    if height is not None:
        room = max(0, height - len(head) - 4)
        # Services that are not up come first, so that they are seen when the terminal is small.
        services = _cut(services, max(room - min(len(tasks), room // 2), 0))
        tasks = _cut(tasks, room - len(services))
    lines = [*head, Text(), _service_head(), *services]
    if tasks:
        lines += [Text(), _task_head(width), *tasks]
    for line in lines:
        line.no_wrap = True
        line.plain = make_visible(line.plain)
        line.truncate(width, overflow="ellipsis")
    return lines if height is None else lines[:height]


def _in_order(tasks: Sequence[TaskSummary]) -> list[TaskSummary]:
    order = {status: number for number, status in enumerate(OPEN_STATUSES)}
    return sorted(tasks, key=lambda task: (order.get(task.status, len(order)), task.created_at))


def _cut(lines: list[Text], room: int) -> list[Text]:
    if len(lines) <= room:
        return lines
    shown = lines[: max(0, room - 1)]
    return [*shown, Text(f"… {len(lines) - len(shown)} more", "octo.quiet")][:room]


def _service_head() -> Text:
    return Text(
        f"{'Service':<14}{'State':<10}{'Replicas':>8}{'In flight':>11}{'Req/s':>8}{'Errors':>9}{'p95':>10}", _HEAD
    )


def _service_line(figures: ServiceFigures) -> Text:
    in_flight = "–" if figures.in_flight is None else str(figures.in_flight)
    rate = "–" if figures.requests_per_second is None else f"{figures.requests_per_second:.1f}"
    errors = "–" if figures.error_ratio is None else f"{figures.error_ratio:.1%}"
    p95 = "–" if figures.p95_ms is None else f"{figures.p95_ms:.1f} ms"
    line = Text(f"{table_cell(figures.service).plain:<14}")
    line.append(f"{figures.state:<10}", _STYLES.get(figures.state, "octo.quiet"))
    line.append(f"{figures.instances:>8}{in_flight:>11}{rate:>8}")
    line.append(f"{errors:>9}", "octo.bad" if figures.error_ratio else "")
    line.append(f"{p95:>10}")
    if figures.state != "up" and figures.detail:
        line.append(f"  {table_cell(figures.detail).plain}", "octo.quiet")
    return line


def _task_head(width: int) -> Text:
    return Text(f"{'Task':<{_id_width(width)}}  {'Status':<9}{'%':>4}{'Age':>9}  Goal", _HEAD)


def _task_line(task: TaskSummary, width: int, now: float) -> Text:
    created = parse_time(task.created_at)
    age = "–" if created is None else format_duration(now - created)
    line = Text(f"{table_cell(task.task_id).plain[-_id_width(width) :]:<{_id_width(width)}}  ")
    line.append(f"{task.status:<9}", _STYLES.get(task.status, ""))
    return line.append(f"{task.progress:>4.0f}{age:>9}  ").append_text(table_cell(task.goal))


def _id_width(width: int) -> int:
    return _ID_WIDTH if width >= _NARROW else 8


@contextlib.contextmanager
def _single_keys() -> Generator[int]:
    """Have the terminal hand over each key at once and without an echo; yield its descriptor. Ctrl-C stays a signal."""
    descriptor = sys.stdin.fileno()
    before = cast("list[object]", termios.tcgetattr(descriptor))
    tty.setcbreak(descriptor)
    try:
        yield descriptor
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)  # pyright: ignore[reportArgumentType]  its own result


async def _wait_for_key(descriptor: int, key: str) -> None:
    """Return when the key was pressed, in either case, or when there are no more."""
    loop = asyncio.get_running_loop()
    pressed = asyncio.Event()

    def read() -> None:
        typed = os.read(descriptor, 64)
        if not typed or key in typed.decode(errors="replace").lower():
            pressed.set()

    loop.add_reader(descriptor, read)
    try:
        await pressed.wait()
    finally:
        loop.remove_reader(descriptor)
