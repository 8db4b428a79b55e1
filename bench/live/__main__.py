"""Watchers of one task: memory and idle CPU of each, event to client, and frames a second, beside a bare server."""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import uvloop
from reports import save_results

from live.servers import pin, run_bare, run_gateway, serve_on_core
from live.watchers import connect, wait_for

SERVERS: dict[str, Callable[[Connection], None]] = {"gateway": run_gateway, "bare websockets": run_bare}
IDLE_SECONDS = 10.0
SECONDS_AT_RATE = 10
MEASURED = 200
Row = dict[str, Any]


class Server:
    """A server in a process of its own, on a core of its own."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._pipe, other = multiprocessing.get_context("spawn").Pipe()
        self._process = multiprocessing.get_context("spawn").Process(
            target=serve_on_core, args=(SERVERS[name], other, 0)
        )
        self._process.start()
        self.port = int(self._pipe.recv())

    def usage(self) -> dict[str, float]:
        self._pipe.send(("usage",))
        return self._pipe.recv()

    async def emit(self, count: int, rate: float) -> None:
        self._pipe.send(("emit", count, rate))
        await asyncio.get_running_loop().run_in_executor(None, self._pipe.recv)

    def stop(self) -> None:
        self._pipe.send(("stop",))
        self._process.join(20)
        self._process.kill()


async def measure(server: Server, count: int, rate: float, burst: int) -> list[Row]:
    """Return the rows of one server with ``count`` watchers."""
    before = server.usage()
    watchers = await connect(server.port, count, measured=MEASURED)
    await asyncio.sleep(2)
    opened = server.usage()
    await asyncio.sleep(IDLE_SECONDS)
    idle = server.usage()
    # Each event reaches everybody before the next at this rate, unless the server cannot.
    events = int(rate * SECONDS_AT_RATE)
    await server.emit(events, rate)
    whole = await wait_for(lambda: all(each.frames >= events for each in watchers), 60)
    latencies = sorted(each for watcher in watchers for each in watcher.latencies)
    for watcher in watchers:
        watcher.latencies.clear()
    quiet, began = server.usage(), time.perf_counter()
    await server.emit(burst, 0)
    whole &= await wait_for(lambda: all(each.frames >= events + burst for each in watchers), 120)
    elapsed, used = time.perf_counter() - began, server.usage()["cpu"] - quiet["cpu"]
    lost = sum(watcher.is_lost for watcher in watchers)
    for watcher in watchers:
        watcher.close()
    await asyncio.sleep(1)
    return [
        _row(server, count, "bytes of a watcher", (opened["bytes"] - before["bytes"]) / count, "B"),
        _row(server, count, "idle, share of a core", (idle["cpu"] - opened["cpu"]) / IDLE_SECONDS * 100, "%"),
        _row(server, count, f"event to client, {rate:g} events/s, p50", _percentile(latencies, 50), "ms"),
        _row(server, count, f"event to client, {rate:g} events/s, p99", _percentile(latencies, 99), "ms"),
        _row(server, count, "frames a second", burst * count / elapsed, "1/s"),
        _row(server, count, "CPU of a frame", used / (burst * count) * 1e6, "µs"),
        _row(server, count, "closed or not served", lost if whole else count, ""),
    ]


def _row(server: Server, count: int, name: str, value: float, unit: str) -> Row:
    return {"name": f"{count:,} watchers: {name}", "server": server.name, "value": round(value, 2), "unit": unit}


def _percentile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100)[percent - 1] * 1000 if len(values) > 1 else float("nan")


def run(counts: list[int], rounds: int, burst_frames: int) -> list[Row]:
    found: dict[tuple[str, str], list[Row]] = {}
    for _ in range(rounds):
        for count in counts:
            for name in SERVERS:
                server = Server(name)
                try:
                    rate = max(1.0, min(20.0, 10_000 / count))
                    rows = uvloop.run(measure(server, count, rate, max(1, burst_frames // count)))
                finally:
                    server.stop()
                for row in rows:
                    found.setdefault((row["name"], name), []).append(row)
    medians = [rows[0] | {"value": statistics.median(row["value"] for row in rows)} for rows in found.values()]
    peers = {row["name"]: row["value"] for row in medians if row["server"] != "gateway"}
    for row in medians:
        if row["server"] == "gateway" and peers[row["name"]]:
            row["peer"] = "bare websockets"
            row["ratio"] = round(row["value"] / peers[row["name"]], 2)
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--watchers", type=int, nargs="+", default=[1000, 9000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--frames", type=int, default=300_000, help="frames of a burst")
    arguments = parser.parse_args()
    pin(1)
    rows = run(arguments.watchers, arguments.rounds, arguments.frames)
    for row in sorted(rows, key=lambda row: (row["name"], row["server"] != "gateway")):
        print(f"{row['name']:<58}{row['server']:<18}{row['value']:>12,.2f} {row['unit']:<4}{row.get('ratio', '')!s:>8}")
    save_results("live", rows)


if __name__ == "__main__":
    main()
