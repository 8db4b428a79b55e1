"""Checks a run of faults: `python events_checker.py RUN…`, with files of :class:`Run` as JSON. Exit code 1 for a fault.

It compares, by id, what subscribers recorded with the database, over connections of its own, and imports nothing of
the product. It prints one line for each fault, and counts what happened to the events that were written during it.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg

COLUMNS = ("events", "lost", "doubled", "out of order", "gaps unsignalled", "longest stall (s)", "gaps signalled")
QUERY = "SELECT id, seq, subject, version, event_type, data FROM {schema}events WHERE tenant = 'faults' ORDER BY seq"
LETTERS = (
    "SELECT subscriptions.name AS name, dead_letters.seq AS seq FROM {schema}dead_letters AS dead_letters"
    " JOIN {schema}subscriptions AS subscriptions ON subscriptions.id = dead_letters.subscription_id"
)


@dataclass(frozen=True)
class Run:
    """Where a run is. ``acks_lost`` are the faults during which acknowledgements may be lost, so events be repeated.

    ``alive`` names the files of the processes that were there at the end.
    """

    name: str
    database: str
    folder: str
    durable: list[str]
    ephemeral: list[str]
    acks_lost: list[str]
    alive: list[str]


@dataclass(frozen=True)
class Written:
    """An event as the database has it; ``at`` is when it was written, by the clock that the records have."""

    id: str
    seq: int
    subject: str
    version: int
    channel: str
    fault: str
    at: float
    poison: bool


@dataclass
class Row:
    """What became of the events that were written during a fault."""

    events: int = 0
    lost: int = 0
    doubled: int = 0
    out_of_order: int = 0
    unsignalled: int = 0
    stall: float = 0.0
    signalled: int = 0

    def cells(self) -> list[str]:
        """Return the cells in the order of :data:`COLUMNS`."""
        counts = (self.events, self.lost, self.doubled, self.out_of_order, self.unsignalled)
        return [*map(str, counts), f"{self.stall:.2f}", str(self.signalled)]


@dataclass
class Report:
    """The table of a run, and in ``faults`` what must not be."""

    rows: dict[str, Row] = field(default_factory=lambda: defaultdict(Row))
    faults: list[str] = field(default_factory=list[str])

    def fault(self, text: str) -> None:
        """Add a fault, unless there are many."""
        if len(self.faults) < 50:
            self.faults.append(text)


def check_durable(
    report: Report, name: str, lines: Iterable[list[Any]], written: Mapping[str, Written], acks_lost: Iterable[str]
) -> None:
    """Check what the replicas of one durable subscription handled, in the order of time."""
    allowed = set(acks_lost)
    seen: set[str] = set()
    latest: dict[str, int] = {}
    for _kind, _name, seq, event_id, subject, version, at in sorted(lines, key=lambda line: line[-1]):
        event = written.get(event_id)
        if event is None or (event.seq, event.subject, event.version) != (seq, subject, version):
            report.fault(f"{name}: event {seq} with the id {event_id} is not as in the database")
            continue
        row = report.rows[event.fault]
        if event_id in seen:
            row.doubled += 1
            if event.fault not in allowed:
                report.fault(f"{name}: event {seq} came again during {event.fault!r}, without a lost acknowledgement")
            continue
        seen.add(event_id)
        row.stall = max(row.stall, at - event.at)
        if version < latest.get(subject, 0):
            row.out_of_order += 1
            report.fault(f"{name}: version {version} of {subject} came after {latest[subject]}")
        latest[subject] = max(version, latest.get(subject, 0))
    for event in written.values():
        if event.poison and event.id in seen:
            report.fault(f"{name}: the poison event {event.seq} was handled")
        if not event.poison and event.id not in seen:
            report.rows[event.fault].lost += 1
            report.fault(f"{name}: event {event.seq} of {event.fault!r} is lost")


def check_ephemeral(
    report: Report, name: str, lines: Iterable[list[Any]], written: Mapping[str, Written], *, alive: bool = True
) -> None:
    """Check that a live subscription signalled every gap in what it received.

    ``lines`` are those of one process, in its order; one that is ``alive`` has heard of the last events. A gap between
    two events of a channel is signalled when the subscriber was told, between these two, that events after a position
    below it may be missing.
    """
    by_channel: dict[str, list[Written]] = defaultdict(list)
    for event in written.values():
        by_channel[event.channel].append(event)
    # The next event of each channel that must arrive, as an index, and the positions told since the one before.
    due: dict[str, int] = {}
    told: dict[str, list[int]] = {channel: [] for channel in by_channel}
    head = 0
    for kind, _name, first, *more in lines:
        if kind == "ready":
            head = first
            due = {channel: sum(1 for event in events if event.seq <= head) for channel, events in by_channel.items()}
        elif kind == "gap":
            after, channel = more[0], more[1]
            for each in [channel] if channel else list(told):
                told.setdefault(each, []).append(after)
        else:
            event = written.get(more[0])
            if event is None or event.seq != first:
                report.fault(f"{name}: event {first} with the id {more[0]} is not as in the database")
                continue
            events = by_channel[event.channel]
            index = due[event.channel]
            while index < len(events) and events[index].seq < first:
                missing = events[index]
                row = report.rows[missing.fault]
                if any(after < missing.seq for after in told[event.channel]):
                    row.signalled += 1
                else:
                    row.unsignalled += 1
                    report.fault(f"{name}: event {missing.seq} of {missing.fault!r} is missing, and no gap says so")
                index += 1
            if index < len(events) and events[index].seq == first:
                due[event.channel] = index + 1
                told[event.channel] = []
            elif first > head:
                report.fault(f"{name}: event {first} of {event.channel} came again, or late")
    for channel, events in by_channel.items() if alive else ():
        for missing in events[due.get(channel, len(events)) :]:
            if not any(after < missing.seq for after in told[channel]):
                report.rows[missing.fault].unsignalled += 1
                report.fault(f"{name}: event {missing.seq} is missing at the end, and no gap says so")


def check_letters(report: Report, durable: Iterable[str], letters: Iterable[tuple[str, int]], poison: set[int]) -> None:
    """Check that each durable subscription has every poison event, and nothing else, as a dead letter."""
    found: dict[str, list[int]] = defaultdict(list)
    for name, seq in letters:
        found[name].append(seq)
    for name in durable:
        if sorted(found[name]) != sorted(poison):
            report.fault(f"{name}: dead letters {sorted(found[name])[:10]}, and the poison is {sorted(poison)[:10]}")


def check_versions(report: Report, written: Iterable[Written]) -> None:
    """Check that the log itself has no hole: versions of each subject from 1, in the order of positions."""
    latest: dict[str, int] = defaultdict(int)
    for event in written:
        latest[event.subject] += 1
        if event.version != latest[event.subject]:
            report.fault(f"the log has version {event.version} of {event.subject} in place {latest[event.subject]}")
            latest[event.subject] = event.version


def check(run: Run, written: Mapping[str, Written], letters: Iterable[tuple[str, int]]) -> Report:
    """Return the report of a run."""
    report = Report()
    for event in written.values():
        report.rows[event.fault].events += 1
    check_versions(report, written.values())
    files = {file.name: list(read_lines(file)) for file in sorted(Path(run.folder).glob("*.jsonl"))}
    for name in run.durable:
        lines = [line for file in files.values() for line in file if line[:2] == ["durable", name]]
        check_durable(report, name, lines, written, run.acks_lost)
    for name in run.ephemeral:
        for file, found in files.items():
            if lines := [line[:-1] for line in found if line[0] != "durable" and line[1] == name]:
                check_ephemeral(report, name, lines, written, alive=file in run.alive)
    check_letters(report, run.durable, letters, {event.seq for event in written.values() if event.poison})
    return report


def read_lines(file: Path) -> Iterator[list[Any]]:
    """Yield the lines of a record; the last one is left out when a kill has cut it."""
    with file.open() as lines:
        for line in lines:
            if line.endswith("]\n"):
                yield json.loads(line)


def read_database(url: str) -> tuple[dict[str, Written], list[tuple[str, int]]]:
    """Return the events by id, in order of position, and the dead letters by subscription."""
    if url.startswith("postgresql"):
        rows, letters = asyncio.run(_read_postgres(url))
    else:
        with sqlite3.connect(f"file:{url}?mode=ro", uri=True) as connection:
            rows = connection.execute(QUERY.format(schema="")).fetchall()
            letters = connection.execute(LETTERS.format(schema="")).fetchall()
    written: dict[str, Written] = {}
    for event_id, seq, subject, version, event_type, text in rows:
        data = json.loads(text)
        channel = "events:" + event_type.replace(".", ":")
        written[event_id] = Written(
            event_id, seq or 0, subject, version, channel, data["fault"], data["written"], data["poison"]
        )
    return written, [(name, seq) for name, seq in letters]


async def _read_postgres(url: str) -> tuple[list[Any], list[Any]]:
    connection = await asyncpg.connect(url)
    try:
        schema = "octollm_orchestrator."
        return await connection.fetch(QUERY.format(schema=schema)), await connection.fetch(
            LETTERS.format(schema=schema)
        )
    finally:
        await connection.close()


def print_table(reports: Mapping[str, Report]) -> None:
    """Print a Markdown table of all runs."""
    print(f"| fault | {' | '.join(COLUMNS)} |")
    print(f"|---|{'---:|' * len(COLUMNS)}")
    for name, report in reports.items():
        for fault, row in report.rows.items():
            print(f"| {fault} ({name}) | {' | '.join(row.cells())} |")


def main(files: list[str]) -> int:
    """Check the runs that these files describe."""
    reports: dict[str, Report] = {}
    for file in files:
        run = Run(**json.loads(Path(file).read_text()))
        reports[run.name] = check(run, *read_database(run.database))
    print_table(reports)
    faults = [f"{name}: {fault}" for name, report in reports.items() for fault in report.faults]
    for fault in faults:
        print(f"FAULT {fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
