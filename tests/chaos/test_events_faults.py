"""Faults on events: durable subscribers lose nothing and keep the order, and live ones hear of every gap.

``EVENTS`` and ``SEED`` size and repeat a run, and ``PAUSE`` says how long Redis is suspended: `make chaos-events`.
"""

from __future__ import annotations

import ast
import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import events_checker
import pytest
from events_checker import Report, Run, Written
from events_faults import postgres_faults, sqlite_faults
from events_stage import DURABLE, EPHEMERAL, Size, open_stage
from postgres_process import PostgresProcess

from octollm.clock import SystemClock
from octollm.config import read_settings
from octollm.storage import open_database
from octollm.storage.migrations import migrate, migrate_all

EVENTS = int(os.environ.get("EVENTS", "3200"))
SEED = int(os.environ.get("SEED", "7"))
SIZE = Size.of(EVENTS)
POSTGRES_SHARE = 13 / 16
CHECKER = Path(events_checker.__file__)


@pytest.fixture
def private_postgres() -> Iterator[PostgresProcess]:
    server = PostgresProcess()
    server.start()
    yield server
    server.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, which a test may fill."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        if os.environ.get("CI"):
            pytest.fail("only root mounts a file system")
        pytest.skip("only root mounts a file system")
    megabytes = 16 + EVENTS // 1000
    subprocess.run([mount, "-t", "tmpfs", "-o", f"size={megabytes}m", "octollm-disk", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def check(*files: Path) -> str:
    """Run the checker as a program, and return its table; fail with what it found."""
    done = subprocess.run(
        [sys.executable, str(CHECKER), *map(str, files)], capture_output=True, text=True, timeout=300, check=False
    )
    print(done.stdout)
    assert done.returncode == 0, f"SEED={SEED}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.redis
@pytest.mark.postgres
@pytest.mark.timeout(300 + EVENTS / 50)
async def test_processes_on_postgresql(private_postgres: PostgresProcess, tmp_path: Path) -> None:
    await migrate_all(read_settings({"OCTOLLM_DATABASE_URL": private_postgres.url}, ()), SystemClock())
    url = f"{private_postgres.url}?search_path=octollm_orchestrator"
    async with open_stage(tmp_path / "postgresql", url, SIZE, SEED, postgres=private_postgres) as stage:
        start = stage.processes.start
        for letter in "ab":
            start(f"publisher-{letter}", role="publisher")
            start(f"durable-{letter}", role="durable", durable=DURABLE[:-1])
        start("durable-alone", role="durable", durable=DURABLE[-1:])
        start("ephemeral", role="ephemeral", ephemeral=EPHEMERAL)
        faults = postgres_faults(SIZE)
        await stage.wait_for_subscribers(DURABLE)
        for name, seconds, fault in faults:
            await stage.run_fault(name, int(EVENTS * POSTGRES_SHARE / len(faults)), seconds, fault)
        acks_lost = ["durable subscribers killed", "subscriber away for an hour", "PostgreSQL restarted"]
        run = Run("PostgreSQL", private_postgres.url, str(stage.folder), [*DURABLE], [*EPHEMERAL], acks_lost, [])
        file = await stage.finish(run, ["ephemeral"])
        table = check(file)
    assert all(name in table for name, *_ in faults)


@pytest.mark.redis
@pytest.mark.timeout(300 + EVENTS / 50)
async def test_one_process_on_sqlite(small_disk: Path, tmp_path: Path) -> None:
    database = small_disk / "orchestrator.db"
    url = f"sqlite:///{database}"
    async with open_database(url, clock=SystemClock()) as db:
        await migrate(db, "orchestrator")
    async with open_stage(tmp_path / "sqlite", url, SIZE, SEED, disk=small_disk) as stage:
        stage.processes.start("host", role="host", durable=DURABLE, ephemeral=EPHEMERAL)
        faults = sqlite_faults(SIZE)
        await stage.wait_for_subscribers(DURABLE)
        for name, seconds, fault in faults:
            await stage.run_fault(name, int(EVENTS * (1 - POSTGRES_SHARE) / len(faults)), seconds, fault)
        acks_lost = ["disk full", "process killed", "clock going backwards"]
        run = Run("SQLite", str(database), str(stage.folder), [*DURABLE], [*EPHEMERAL], acks_lost, [])
        table = check(await stage.finish(run, ["host"]))
    assert all(name in table for name, *_ in faults)


def test_the_checker_imports_nothing_of_the_product() -> None:
    tree = ast.parse(CHECKER.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) == {"asyncpg"}


def written(count: int, *, poison: int = 0) -> dict[str, Written]:
    """Events of one subject on two channels in turn."""
    return {
        f"id-{seq}": Written(f"id-{seq}", seq, "s", seq, f"c{seq % 2}", "nothing", float(seq), poison=seq == poison)
        for seq in range(1, count + 1)
    }


def durable_lines(*seqs: int) -> list[list[Any]]:
    return [["durable", "d", seq, f"id-{seq}", "s", seq, 10.0 + place] for place, seq in enumerate(seqs)]


def durable_report(lines: list[list[Any]], events: dict[str, Written], *acks_lost: str) -> Report:
    report = Report()
    events_checker.check_durable(report, "d", lines, events, acks_lost)
    return report


def test_the_checker_finds_what_a_durable_subscriber_lost_doubled_or_reordered() -> None:
    events = written(4)
    good = durable_report(durable_lines(1, 2, 3, 4), events)
    assert (good.faults, good.rows["nothing"].stall) == ([], 9.0)
    lost = durable_report(durable_lines(1, 2, 4), events)
    assert (lost.rows["nothing"].lost, len(lost.faults)) == (1, 1)
    doubled = durable_report(durable_lines(1, 2, 2, 3, 4), events)
    assert (doubled.rows["nothing"].doubled, len(doubled.faults)) == (1, 1)
    again = durable_report(durable_lines(1, 2, 3, 2, 3, 4), events, "nothing")
    assert (again.rows["nothing"].doubled, again.faults) == (2, [])
    reordered = durable_report(durable_lines(1, 3, 2, 4), events)
    assert (reordered.rows["nothing"].out_of_order, len(reordered.faults)) == (1, 1)
    foreign = durable_report([*durable_lines(1, 2, 3, 4), ["durable", "d", 2, "id-1", "s", 2, 9.0]], events)
    assert len(foreign.faults) == 1
    poisoned = durable_report(durable_lines(1, 2, 3, 4), written(4, poison=3))
    assert len(poisoned.faults) == 1


def live_report(*lines: tuple[Any, ...], alive: bool = True) -> tuple[int, int, int]:
    report = Report()
    events_checker.check_ephemeral(report, "e", [list(line) for line in lines], written(6), alive=alive)
    row = report.rows["nothing"]
    return row.unsignalled, row.signalled, len(report.faults)


def test_the_checker_finds_a_gap_that_a_live_subscriber_was_not_told_of() -> None:
    ready = ("ready", "e", 1)

    def arrived(*seqs: int) -> list[tuple[Any, ...]]:
        return [("event", "e", seq, f"id-{seq}") for seq in seqs]

    assert live_report(ready, *arrived(2, 3, 4, 5, 6)) == (0, 0, 0)
    assert live_report(ready, *arrived(2, 3, 5, 6)) == (1, 0, 1)
    assert live_report(ready, *arrived(2, 3, 5), ("gap", "e", "missed", 2, "c0"), *arrived(6)) == (0, 1, 0)
    # A gap on another channel, one that begins too late, or one that was told before the last event is none.
    assert live_report(ready, *arrived(2, 3, 5), ("gap", "e", "missed", 2, "c1"), *arrived(6)) == (1, 0, 1)
    assert live_report(ready, *arrived(2, 3, 5), ("gap", "e", "missed", 4, "c0"), *arrived(6)) == (1, 0, 1)
    assert live_report(ready, ("gap", "e", "reconnected", 0, ""), *arrived(2, 3, 5, 6)) == (1, 0, 1)
    assert live_report(ready, *arrived(2, 3), ("gap", "e", "reconnected", 3, ""), *arrived(5, 6)) == (0, 1, 0)
    assert live_report(ready, *arrived(2, 3, 4)) == (2, 0, 2)
    assert live_report(ready, *arrived(2, 3, 4), alive=False) == (0, 0, 0)
    assert live_report(ready, *arrived(2, 3, 3, 4, 5, 6)) == (0, 0, 1)


def test_the_checker_finds_holes_in_the_log_and_missing_dead_letters(tmp_path: Path) -> None:
    report = Report()
    events_checker.check_versions(report, [event for event in written(4).values() if event.seq != 2])
    assert len(report.faults) == 1
    events_checker.check_letters(report, ["a", "b"], [("a", 3), ("b", 3), ("b", 4)], {3})
    assert len(report.faults) == 2
    (tmp_path / "one.jsonl").write_text('["durable", "d", 1]\n["durable", "d"')
    assert list(events_checker.read_lines(tmp_path / "one.jsonl")) == [["durable", "d", 1]]
    with contextlib.redirect_stdout(None):
        events_checker.print_table({"x": report})
