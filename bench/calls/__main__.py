"""Service calls side by side: ``make bench-calls``.

Every variant has a process that serves and one that calls, each pinned to a core; they take turns in rounds, so that
whatever else the machine does meets all, and what is told are medians over the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Generator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import uvloop
from reports import save_results

from calls import measuring, octo
from calls.databases import postgres_database
from calls.variants import BARE, FULL_GRPC, MINTED, REFERENCE, REUSED, Variant, variants

KIB = 1000
RATE = 1000.0
DAPR_P50, DAPR_P99 = 1.06, 3.89


@dataclass(frozen=True)
class Measure:
    """One thing that is measured of every variant."""

    name: str
    kind: str
    many: int
    size: int


MEASURES = [
    Measure("one after the other, 1 KB", "flight", 1, KIB),
    Measure("16 in flight, 1 KB", "flight", 16, KIB),
    Measure("64 in flight, 1 KB", "flight", 64, KIB),
    Measure("16 in flight, 64 KB", "flight", 16, 64 * KIB),
    Measure("1,000 a second, 1 KB", "rate", 0, KIB),
]
MAIN = MEASURES[1].name


def _pin(core: int) -> None:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[core % len(cores)]})


async def _run(work: Awaitable[None]) -> None:
    await work


def _server(variant: Variant, port: int) -> None:
    _pin(0)
    uvloop.run(_run(variant.serve(port)))


def _beside(variant: Variant) -> None:
    _pin(0)
    assert variant.beside is not None
    uvloop.run(_run(variant.beside()))


def _client(variant: Variant, port: int, server: int, pipe: Connection) -> None:
    _pin(1)

    async def run() -> None:
        loop = asyncio.get_running_loop()
        async with contextlib.AsyncExitStack() as stack:
            calls: dict[int, Any] = {}
            while (order := await loop.run_in_executor(None, pipe.recv)) is not None:
                measure, seconds = order
                if measure.size not in calls:
                    calls[measure.size] = await stack.enter_async_context(variant.calling(port, measure.size))
                    await measuring.in_flight(calls[measure.size], 4, seconds / 4)
                before = _cpu_of(server)
                if measure.kind == "rate":
                    found = await measuring.at_rate(calls[measure.size], RATE, seconds)
                else:
                    found = await measuring.in_flight(calls[measure.size], measure.many, seconds)
                served = (_cpu_of(server) - before) / (found.rate * seconds) * 1e6
                pipe.send({**asdict(found), "server_cpu": served})

    uvloop.run(run())


def _cpu_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def _running(every: list[Variant]) -> Generator[dict[str, Connection]]:
    """Start both processes of each variant; they idle until it is their turn."""
    context = multiprocessing.get_context("fork")
    processes: list[Any] = []
    pipes: dict[str, Connection] = {}
    try:
        for variant in every:
            port = _free_port()
            if variant.beside is not None:
                beside = context.Process(target=_beside, args=(variant,), daemon=True)
                beside.start()
                processes.append(beside)
            server = context.Process(target=_server, args=(variant, port), daemon=True)
            server.start()
            processes.append(server)
            until = time.monotonic() + 30
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                if time.monotonic() > until or not server.is_alive():
                    sys.exit(f"The server of {variant.name!r} did not start.")
                time.sleep(0.05)
            here, there = context.Pipe()
            client = context.Process(target=_client, args=(variant, port, server.pid, there), daemon=True)
            client.start()
            processes.append(client)
            pipes[variant.name] = here
        yield pipes
    finally:
        for process in processes:
            process.kill()


def _measured(every: list[Variant], rounds: int, seconds: float) -> dict[tuple[str, str], list[dict[str, float]]]:
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    with _running(every) as pipes:
        for number in range(rounds):
            for measure in MEASURES:
                shift = number % len(every)
                for variant in every[shift:] + every[:shift]:
                    if variant.slow and measure.kind == "rate":
                        continue  # it cannot: what it would show is its queue
                    pipes[variant.name].send((measure, seconds))
                    if not pipes[variant.name].poll(60 + 10 * seconds):
                        sys.exit(f"{variant.name!r} did not answer.")
                    found.setdefault((measure.name, variant.name), []).append(pipes[variant.name].recv())
                print(f"\rround {number + 1} of {rounds}: {measure.name:<30}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return found


def _table(every: list[Variant], medians: dict[tuple[str, str], dict[str, float]]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for measure in MEASURES:
        print(f"\n{measure.name}")
        print(f"{'':<38}{'calls/s':>9}{'× grpc':>8}{'p50 ms':>9}{'p99 ms':>9}{'CPU µs, client/server':>24}")
        for variant in every:
            one = medians.get((measure.name, variant.name))
            if one is None:
                continue
            ratio = one["rate"] / medians[measure.name, REFERENCE]["rate"]
            print(
                f"{variant.name:<38}{one['rate']:>9,.0f}{ratio:>8.2f}{one['p50']:>9.2f}{one['p99']:>9.2f}"
                f"{one['cpu']:>14.0f} /{one['server_cpu']:>7.0f}"
            )
            for unit, key in (
                ("calls/s", "rate"),
                ("ms p50", "p50"),
                ("ms p99", "p99"),
                ("µs CPU client", "cpu"),
                ("µs CPU server", "server_cpu"),
            ):
                peer = medians[measure.name, REFERENCE][key]
                rows.append(
                    {
                        "name": f"{variant.name}: {measure.name}",
                        "value": round(one[key], 3),
                        "unit": unit,
                        "peer": REFERENCE,
                        "ratio": round(one[key] / peer, 3) if peer else None,
                        "command": "make bench-calls",
                    }
                )
    return rows


def _targets(every: list[Variant], medians: dict[tuple[str, str], dict[str, float]]) -> None:
    print("\ntargets")

    def report(what: str, measured: float, target: float, *, least: bool) -> None:
        met = measured >= target if least else measured <= target
        print(f"{what:<64}{measured:>8.2f}  {'≥' if least else '≤'} {target:<6g}{'met' if met else 'MISSED'}")

    for variant in every:
        for other, ratio in variant.targets:
            if (MAIN, other) in medians:
                rate = medians[MAIN, variant.name]["rate"] / medians[MAIN, other]["rate"]
                report(f"{variant.name} ÷ {other}, 16 in flight", rate, ratio, least=True)
    ours = REUSED
    one = MEASURES[0].name
    report(
        f"{ours}, p50 one after the other ÷ {REFERENCE}",
        medians[one, ours]["p50"] / medians[one, REFERENCE]["p50"],
        0.65,
        least=False,
    )
    steady = MEASURES[-1].name
    added = medians[steady, ours]["p50"] - medians[steady, BARE]["p50"]
    report(f"{ours}, p50 added to {BARE} at 1,000 a second, ms", added, DAPR_P50, least=False)
    report(f"{ours}, p99 of the whole hop at 1,000 a second, ms", medians[steady, ours]["p99"], DAPR_P99, least=False)


def main() -> None:
    parser = argparse.ArgumentParser(prog="calls", description=__doc__)
    parser.add_argument("--rounds", type=int, default=int(os.environ.get("BENCH_ROUNDS", "5")))
    parser.add_argument("--seconds", type=float, default=1.0, help="how long a measure of one round takes")
    parser.add_argument("--only", help="variants whose name has this text, and the reference")
    options = parser.parse_args()
    if len(os.sched_getaffinity(0)) < 2:
        print("One core only: client and server share it.", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder, postgres_database() as postgres:
        if postgres is None:
            print("No PostgreSQL is here: keys in it are left out.", file=sys.stderr)
        every = variants(octo.Keys.make(), f"sqlite:///{folder}/keys.db", postgres, _free_port())
        if options.only:
            every = [each for each in every if options.only in each.name or each.name in (REFERENCE, FULL_GRPC, BARE)]
        found = _measured(every, options.rounds, options.seconds)
    medians = {
        key: {name: statistics.median(one[name] for one in each) for name in each[0]} for key, each in found.items()
    }
    if (MAIN, MINTED) in medians:
        minted, peer = medians[MAIN, MINTED]["rate"], medians[MAIN, FULL_GRPC]["rate"]
        print(f"\n{MINTED}: {minted:,.0f} calls/s, {minted / peer:.2f} × {FULL_GRPC} (16 in flight, 1 KB)")
    rows = _table(every, medians)
    if not options.only:
        _targets(every, medians)
        print(f"\n{save_results('calls', rows)}")


if __name__ == "__main__":
    main()
