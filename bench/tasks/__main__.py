"""Tasks side by side with DBOS: ``make bench-tasks``.

Every variant has processes of its own, which idle until it is their turn; they take turns in rounds, so that whatever
else the machine does meets all, and what is told are medians over the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from calls.databases import postgres_database
from ports import free_port, free_shift

from tasks import ours, peers

RESULTS = Path(__file__).parents[1] / "results" / "tasks.json"
IN_FLIGHT = 16
ONE_STEP = "one-step tasks"
THREE_STEPS = "three-step tasks"
SQLITE = "embedded, SQLite"
ONE_WORKER = "PostgreSQL and Redis, 1 worker"
THREE_WORKERS = "PostgreSQL and Redis, 3 workers"
DBOS_PLAIN = "DBOS, steps are functions"
DBOS_HTTP = "DBOS, steps call over HTTP"


@dataclass
class Found:
    """What was measured: values by the name of a measure and its unit, one for each round."""

    values: dict[tuple[str, str, str], list[float]] = field(default_factory=dict[tuple[str, str, str], list[float]])

    def add(self, variant: str, measure: str, unit: str, value: float) -> None:
        self.values.setdefault((variant, measure, unit), []).append(value)

    def median(self, variant: str, measure: str, unit: str) -> float | None:
        found = self.values.get((variant, measure, unit))
        return statistics.median(found) if found else None


async def measure_flows(name: str, system: ours.System, found: Found, tasks: int) -> None:
    """Run one-step and three-step tasks to their end."""
    for measure, planned in ((ONE_STEP, False), (THREE_STEPS, True)):
        flow = await ours.flow(system, tasks if not planned else tasks // 2, IN_FLIGHT, planned=planned)
        found.add(name, measure, "tasks/s", flow.rate)
        found.add(name, measure, "ms CPU a task", flow.cpu)
        if not planned:
            found.add(name, "POST /tasks, 16 in flight", "ms p50", flow.p50)
            found.add(name, "POST /tasks, 16 in flight", "ms p99", flow.p99)


async def measure_idle(name: str, system: ours.System, found: Found, tasks: int, seconds: float) -> None:
    """Measure one task at a time, and what an idle installation uses."""
    waits = sorted([await ours.first_step(system) for _ in range(tasks)])
    found.add(name, "submit to first step, idle", "ms p50", waits[len(waits) // 2])
    await asyncio.sleep(1)
    cpu, began = system.cpu_seconds(), time.perf_counter()
    await asyncio.sleep(seconds)
    found.add(name, "idle", "% of a core", (system.cpu_seconds() - cpu) / (time.perf_counter() - began) * 100)


async def measure_dbos(dbos: peers.Dbos, found: Found, workflows: int) -> None:
    for name, over_http in ((DBOS_PLAIN, False), (DBOS_HTTP, True)):
        rate, cpu = await dbos.flow(workflows, IN_FLIGHT, over_http=over_http)
        found.add(name, THREE_STEPS, "tasks/s", rate)
        found.add(name, THREE_STEPS, "ms CPU a task", cpu)


@contextlib.asynccontextmanager
async def variants(folder: Path, urls: list[str | None]) -> AsyncGenerator[dict[str, ours.System | peers.Dbos]]:
    """Start everything; without PostgreSQL only the embedded variant."""
    async with contextlib.AsyncExitStack() as stack:
        found: dict[str, ours.System | peers.Dbos] = {}
        found[SQLITE] = await stack.enter_async_context(ours.embedded(folder / "embedded", free_shift()))
        one, three, dbos = urls
        if one is not None and three is not None and dbos is not None:
            found[ONE_WORKER] = await stack.enter_async_context(ours.apart(folder / "one", one, 1))
            found[THREE_WORKERS] = await stack.enter_async_context(ours.apart(folder / "three", three, 3))
            found[DBOS_PLAIN] = await stack.enter_async_context(peers.dbos(folder, dbos, free_port()))
        yield found


async def measure(folder: Path, urls: list[str | None], rounds: int, tasks: int) -> Found:
    found = Found()
    async with variants(folder, urls) as running:
        works: list[Callable[[Found], Awaitable[None]]] = []
        for name, system in running.items():
            if isinstance(system, peers.Dbos):
                works.append(lambda to, dbos=system: measure_dbos(dbos, to, tasks))
            else:
                works.append(lambda to, name=name, system=system: measure_flows(name, system, to, tasks))
        for work in works:
            await work(Found())  # warms up
        for number in range(rounds):
            shift = number % len(works)
            for work in works[shift:] + works[:shift]:
                await work(found)
            for name, system in running.items():
                if not isinstance(system, peers.Dbos):
                    await measure_idle(name, system, found, 20, 3)
            print(f"\rround {number + 1} of {rounds}", end="", file=sys.stderr, flush=True)
        await measure_waiting(running, found)
    print(file=sys.stderr)
    return found


async def measure_waiting(running: dict[str, ours.System | peers.Dbos], found: Found) -> None:
    """Measure what a thousand waiting tasks cost a claim, and a list among the finished ones."""
    for name, system in running.items():
        if isinstance(system, peers.Dbos):
            continue
        times: list[float] = []
        for _ in range(20):
            began = time.perf_counter()
            await system.read("/tasks?limit=50&status=completed")
            times.append((time.perf_counter() - began) * 1000)
        found.add(name, "list 50 among all finished", "ms p50", statistics.median(times))
        flow = await ours.flow(system, 1000, 64, planned=False)
        found.add(name, "1,000 tasks submitted at once", "tasks/s", flow.rate)


def report(found: Found) -> list[dict[str, object]]:
    """Print the table, and return its rows for the file of results."""
    rows: list[dict[str, object]] = []
    for measure_name, unit in dict.fromkeys((name, unit) for _, name, unit in found.values):
        print(f"\n{measure_name}, {unit}")
        peer = found.median(DBOS_PLAIN, measure_name, unit)
        for variant in dict.fromkeys(variant for variant, _, _ in found.values):
            value = found.median(variant, measure_name, unit)
            if value is None:
                continue
            ratio = value / peer if peer else None
            beside = "" if ratio is None else f"{ratio:>10.2f} × DBOS"
            print(f"  {variant:<40}{value:>10.1f}{beside}")
            rows.append(
                {
                    "name": f"{variant}: {measure_name}",
                    "value": round(value, 2),
                    "unit": unit,
                    "peer": None if peer is None else DBOS_PLAIN,
                    "ratio": None if ratio is None else round(ratio, 3),
                    "command": "make bench-tasks",
                }
            )
    return rows


def report_targets(found: Found) -> None:
    print("\ntargets")

    def target(what: str, value: float | None, bound: float, *, least: bool) -> None:
        if value is not None:
            met = value >= bound if least else value <= bound
            print(f"{what:<70}{value:>9.2f}  {'≥' if least else '≤'} {bound:<6g}{'met' if met else 'MISSED'}")

    for workers in (ONE_WORKER, THREE_WORKERS):
        own = found.median(workers, THREE_STEPS, "tasks/s")
        for peer in (DBOS_PLAIN, DBOS_HTTP):
            other = found.median(peer, THREE_STEPS, "tasks/s")
            if own is not None and other is not None:
                target(f"three-step tasks/s, {workers} ÷ {peer}", own / other, 2, least=True)
        target(f"one-step tasks/s, {workers}", found.median(workers, ONE_STEP, "tasks/s"), 60, least=True)
    target(f"one-step tasks/s, {SQLITE}", found.median(SQLITE, ONE_STEP, "tasks/s"), 40, least=True)
    for name in (SQLITE, ONE_WORKER, THREE_WORKERS):
        post = "POST /tasks, 16 in flight"
        target(f"{post}, ms p50, {name}", found.median(name, post, "ms p50"), 15, least=False)
        target(f"{post}, ms p99, {name}", found.median(name, post, "ms p99"), 60, least=False)
        first = found.median(name, "submit to first step, idle", "ms p50")
        target(f"submit to first step, idle, ms p50, {name}", first, 20, least=False)
    target(f"idle, % of a core, {SQLITE}", found.median(SQLITE, "idle", "% of a core"), 2, least=False)


def main() -> None:
    parser = argparse.ArgumentParser(prog="tasks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=int(os.environ.get("BENCH_ROUNDS", "5")))
    parser.add_argument("--tasks", type=int, default=100, help="tasks of a measure of one round")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        urls = [stack.enter_context(postgres_database()) for _ in range(3)]
        if urls[0] is None:
            print("No PostgreSQL is here: only the embedded variant is measured.", file=sys.stderr)
        found = asyncio.run(measure(Path(folder), urls, options.rounds, options.tasks))
    rows = report(found)
    report_targets(found)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    RESULTS.parent.mkdir(exist_ok=True)
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    RESULTS.write_text(json.dumps({"date": date, "machine": machine, "commit": commit, "rows": rows}, indent=1) + "\n")
    print(f"\n{RESULTS}")


if __name__ == "__main__":
    main()
