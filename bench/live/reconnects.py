"""Watchers that reconnect at random to two gateways while a task runs, and what each has lost or got twice."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import uvloop
from reconnect_kit import ReconnectResult, run_reconnects


def print_table(result: ReconnectResult, seconds: float) -> None:
    """Print one row for each figure."""
    rows = {
        "watchers": result.watchers,
        "reconnects": result.reconnects,
        "connections when a gateway was replaced": result.drained,
        "frames of events": result.frames,
        "frames lost": result.lost,
        "frames doubled": result.doubled,
        "watchers whose text differs": result.wrong_texts,
        "watchers without every event": result.incomplete,
        "seconds": round(seconds),
    }
    for name, value in rows.items():
        print(f"{name:<42}{value:>12,}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--watchers", type=int, default=1000)
    parser.add_argument("--cuts", type=int, default=20, help="reconnects of each watcher")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = uvloop.run(
            run_reconnects(Path(folder), watchers=arguments.watchers, cuts=arguments.cuts, seed=arguments.seed)
        )
    print_table(result, time.perf_counter() - began)
    if result.lost or result.doubled or result.wrong_texts or result.incomplete:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
