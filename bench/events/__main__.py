"""Benchmark of events beside peers, in rounds that take turns. Prints medians and targets, writes JSON."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Sequence

import uvloop
from reports import save_results

from events import ours, peers, webhooks

PAUSE = 0.005
LATENCY = "commit to durable handler"
ONE_BY_TEN = "1 subscriber, 10 a transaction"
CATCH_UP = "catch-up"
HOOKS = "webhook deliveries"


def quantile(values: Sequence[float], share: float) -> float:
    """Return a quantile in milliseconds."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] * 1000


class Rows:
    """What was measured, by name; the median of the rounds counts."""

    def __init__(self) -> None:
        self._values: dict[str, tuple[str, list[float]]] = {}

    def add(self, name: str, value: float, unit: str) -> None:
        """Add what one round measured."""
        self._values.setdefault(name, (unit, []))[1].append(value)

    def add_latencies(self, name: str, values: Sequence[float]) -> None:
        """Add the median and the 99th percentile."""
        self.add(f"{name}, p50", quantile(values, 0.5), "ms")
        self.add(f"{name}, p99", quantile(values, 0.99), "ms")

    def add_measured(self, name: str, found: ours.Measured) -> None:
        """Add a rate and what it cost."""
        self.add(f"OctoLLM: {name}", found.rate, "events/s")
        self.add(f"OctoLLM: {name}, CPU here", found.cpu, "µs")
        self.add(f"OctoLLM: {name}, CPU of PostgreSQL", found.server_cpu, "µs")

    def median(self, name: str) -> float:
        return statistics.median(self._values[name][1])

    def table(self) -> list[dict[str, object]]:
        """Print the table and return it."""
        rows: list[dict[str, object]] = []
        for name, (unit, values) in self._values.items():
            print(f"{name:<70}{self.median(name):>12,.2f} {unit}")
            rows.append({"name": name, "value": self.median(name), "unit": unit, "rounds": values})
        return rows


async def measure_peers(rows: Rows, redis_url: str, count: int) -> None:
    """Measure one round of the peers."""
    latencies, rate = await peers.redis_pubsub(redis_url, count, PAUSE)
    rows.add_latencies("Redis Pub/Sub (nothing stored): publish to handler", latencies)
    rows.add("Redis Pub/Sub: ten at a time", rate, "events/s")
    latencies, rate = await peers.redis_streams(redis_url, count, PAUSE)
    rows.add_latencies("Redis Streams with a group (not synced): add to handler", latencies)
    rows.add("Redis Streams: ten at a time, acknowledged", rate, "events/s")
    latencies, rate, caught_up = await peers.jetstream(count, PAUSE)
    synced = "synced" if peers.nats_syncs() else "not synced: the server cannot"
    rows.add_latencies(f"NATS JetStream ({synced}): stored to handler", latencies)
    rows.add("NATS JetStream: 50 in flight, acknowledged", rate, "events/s")
    rows.add("NATS JetStream: catch-up, acknowledged", caught_up, "events/s")


async def measure_ours(rows: Rows, database_url: str, redis_url: str, count: int) -> None:
    """Measure one round of ours."""
    async with ours.open_log(database_url, redis_url) as log:
        await ours.latencies(log, 20, PAUSE)  # warm
        rows.add_latencies(f"OctoLLM: {LATENCY}", await ours.latencies(log, count, PAUSE))
        for per_transaction, events in ((1, count * 4), (10, count * 20)):
            _, handled = await ours.throughput(log, 1, per_transaction, events)
            rows.add_measured(f"1 subscriber, {per_transaction} a transaction", handled)
        rows.add_measured(CATCH_UP, await ours.catch_up(log, log.written))
    for per_transaction, events in ((1, count * 2), (10, count * 20)):
        alone = await ours.publish(database_url, redis_url, per_transaction, events)
        rows.add_measured(f"transactions alone, {per_transaction} a transaction", alone)
    feeding, sending = await webhooks.deliveries(database_url, redis_url, count * 8)
    rows.add_measured("webhook feed", feeding)
    rows.add_measured(HOOKS, sending)


async def measure_subscribers(
    rows: Rows, database_url: str, redis_url: str, count: int, subscribers: Sequence[int]
) -> None:
    """Measure many subscribers, once."""
    async with ours.open_log(database_url, redis_url) as log:
        for number in subscribers:
            for per_transaction in (1, 10):
                events = max(1, count // 10) * per_transaction
                written, handled = await ours.throughput(log, number, per_transaction, events)
                name = f"{number} subscribers, {per_transaction} a transaction"
                rows.add(f"OctoLLM: {name}, committed", written, "events/s")
                rows.add_measured(f"{name}, handled by each", handled)


async def measure(
    database_url: str,
    redis_url: str,
    count: int,
    rounds: int,
    subscribers: Sequence[int] = (10, 100),
    lease: float = 5.0,
) -> Rows:
    """Measure everything."""
    rows = Rows()
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        await measure_peers(rows, redis_url, count)
        await measure_ours(rows, database_url, redis_url, count)
    await measure_subscribers(rows, database_url, redis_url, count * 4, subscribers)
    died = await ours.recovery(database_url, redis_url, lease)
    rows.add(f"OctoLLM: commit to handler after its publisher died, lease of {lease:g} s", died, "s")
    return rows


def report_targets(rows: Rows) -> None:
    """Print what was to be reached, and whether it was."""
    print("\ntargets")
    ten, catch_up = rows.median(f"OctoLLM: {ONE_BY_TEN}"), rows.median(f"OctoLLM: {CATCH_UP}")
    jetstream = rows.median("NATS JetStream: 50 in flight, acknowledged")
    for name, value, target, least in (
        (f"{LATENCY}, p50, ms", rows.median(f"OctoLLM: {LATENCY}, p50"), 1.5, False),
        (f"{LATENCY}, p99, ms", rows.median(f"OctoLLM: {LATENCY}, p99"), 5.0, False),
        (f"{ONE_BY_TEN}, events/s", ten, 5000.0, True),
        (f"{ONE_BY_TEN} ÷ NATS JetStream, 50 in flight", ten / jetstream, 1.0, True),
        ("catch-up, events/s", catch_up, 20_000.0, True),
        ("webhook deliveries/s", rows.median(f"OctoLLM: {HOOKS}"), 1000.0, True),
    ):
        met = value >= target if least else value <= target
        print(f"{name:<64}{value:>12,.2f}  {'≥' if least else '≤'} {target:<8g}{'met' if met else 'MISSED'}")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="events", description=__doc__)
    parser.add_argument("--count", type=int, default=500, help="single events per measure of latency")
    parser.add_argument("--rounds", type=int, default=int(os.environ.get("BENCH_ROUNDS", "3")))
    options = parser.parse_args()
    database = os.environ.get("OCTOLLM_TEST_DATABASE_URL", "postgresql://postgres@127.0.0.1:5432/postgres")
    redis = os.environ.get("OCTOLLM_TEST_REDIS_URL", "redis://127.0.0.1:6379/0")
    before = os.getloadavg()[0]
    rows = uvloop.run(measure(database, redis, options.count, options.rounds))
    load = f"{before:.1f} to {os.getloadavg()[0]:.1f}"
    table = rows.table()
    report_targets(rows)
    print(f"\nload {load}\n{save_results('events', table, load=load)}")


if __name__ == "__main__":
    main()
