"""Benchmark of capability tokens: mint, verify cold and warm, against raw signatures. Prints a table, writes JSON."""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from reports import save_results

from capabilities.chains import CLOCK, Chain, Minter, chain_of
from octollm.capability import CapabilityError, Verifier

DEPTHS = (1, 3, 5)
MESSAGE = b"x" * 500
TITLES = (
    ("parts", 6),
    ("bytes", 7),
    ("mint µs", 9),
    ("raw µs", 9),
    ("cold µs", 9),
    ("÷ raw", 7),
    ("warm µs", 9),
    ("÷ check", 9),
)
CACHED = 2_000
"""The number of cached bearer strings whose memory is measured."""


def measure_microseconds(work: Callable[[], object], seconds: float) -> float:
    """Return the mean microseconds of ``work``, over at least ``seconds``."""
    count, began = 0, time.perf_counter()
    while True:
        for _ in range(20):
            work()
        count += 20
        passed = time.perf_counter() - began
        if passed >= seconds:
            return passed / count * 1e6


def benchmarks(chains: dict[int, tuple[Chain, Minter]]) -> dict[str, Callable[[], object]]:
    """Return the functions to measure, by name; rounds alternate, so that noise affects all alike."""
    key = Ed25519PrivateKey.generate()
    public, signature = key.public_key(), key.sign(MESSAGE)
    functions: dict[str, Callable[[], object]] = {
        "raw: one signature made": lambda: key.sign(MESSAGE),
        "raw: one signature checked": lambda: public.verify(signature, MESSAGE),
    }
    for depth, (chain, minter) in chains.items():
        warm = chain.verifier()
        warm.verify(chain.bearer)

        def raw(chain: Chain = chain) -> None:
            for owner, made, message in chain.signed:
                assert owner.verify(made, message)

        def cold(chain: Chain = chain) -> None:
            chain.verifier().verify(chain.bearer)

        def again(chain: Chain = chain, warm: Verifier = warm) -> None:
            warm.verify(chain.bearer)

        functions |= {
            f"depth {depth}: mint": minter.mint,
            f"depth {depth}: raw checks": raw,
            f"depth {depth}: verify cold": cold,
            f"depth {depth}: verify warm": again,
        }
    return functions


def rejection_of_a_megabyte() -> Callable[[], object]:
    """Return a function that verifies an invalid token of 1 MB."""
    text = "a" * 1_000_000
    verifier = Verifier("coder", {}, CLOCK)

    def reject() -> None:
        with contextlib.suppress(CapabilityError):
            verifier.verify(text)

    return reject


def measure_cache_memory() -> float:
    """Return the bytes that the cache needs for one bearer string of three hops."""
    chain, minter = chain_of(3)
    bearers = [minter.mint() for _ in range(CACHED)]
    verifier = Verifier(chain.audience, chain.roots, CLOCK)
    gc.collect()
    tracemalloc.start()
    for bearer in bearers:
        verifier.verify(bearer)
    gc.collect()
    used, _peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return used / CACHED


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="capabilities", description=__doc__)
    parser.add_argument("--rounds", type=int, default=int(os.environ.get("BENCH_ROUNDS", "7")))
    parser.add_argument("--seconds", type=float, default=0.2, help="duration of each measurement in a round")
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[-1]})
    chains = {depth: chain_of(depth) for depth in DEPTHS}
    functions = {**benchmarks(chains), "a token of 1 MB rejected": rejection_of_a_megabyte()}
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(options.rounds):
        for name, work in functions.items():
            samples[name].append(measure_microseconds(work, options.seconds))
        print(f"\rround {number + 1} of {options.rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    _show(chains, medians, measure_cache_memory())


def _show(chains: dict[int, tuple[Chain, Minter]], medians: dict[str, float], memory: float) -> None:
    check, sign = medians["raw: one signature checked"], medians["raw: one signature made"]
    print(f"one raw signature made {sign:.0f} µs, checked {check:.0f} µs\n")
    print(f"{'hops':<6}" + "".join(f"{title:>{width}}" for title, width in TITLES))
    rows: list[dict[str, object]] = []
    for depth, (chain, _minter) in chains.items():
        mint, raw, cold, warm = (
            medians[f"depth {depth}: {name}"] for name in ("mint", "raw checks", "verify cold", "verify warm")
        )
        print(
            f"{depth:<6}{len(chain.signed):>6}{len(chain.bearer):>7}{mint:>9.0f}{raw:>9.0f}{cold:>9.0f}"
            f"{cold / raw:>7.2f}{warm:>9.1f}{warm / check:>9.3f}"
        )
        for name, value, peer, unit in (
            ("mint", mint, sign, "µs"),
            ("verify cold", cold, raw, "µs"),
            ("verify warm", warm, check, "µs"),
            ("bearer string", len(chain.bearer), None, "bytes"),
        ):
            rows.append(
                {
                    "name": f"{name}, {depth} hops",
                    "value": round(value, 2),
                    "unit": unit,
                    "peer": "raw signature operations" if peer else None,
                    "ratio": round(value / peer, 3) if peer else None,
                    "command": "make bench-capabilities",
                }
            )
    large = medians["a token of 1 MB rejected"]
    print(f"\na token of 1 MB is rejected in {large:.1f} µs")
    print(f"the cache needs {memory / 1000:.1f} kB for a bearer string of 3 hops")
    print("\ntargets")
    cold = max(medians[f"depth {depth}: verify cold"] / medians[f"depth {depth}: raw checks"] for depth in DEPTHS)
    warm = max(medians[f"depth {depth}: verify warm"] / check for depth in DEPTHS)
    for name, value, target in (
        ("cold verification ÷ its raw checks, the worst", cold, 2.0),
        ("warm verification ÷ one raw check, the worst", warm, 1 / 8),
        ("bearer string of the third hop, kB", len(chains[3][0].bearer) / 1000, 3.5),
        ("rejection of a token of 1 MB, ms", large / 1000, 1.0),
    ):
        print(f"{name:<56}{value:>8.3f}  ≤ {target:<6g}{'met' if value <= target else 'MISSED'}")
    print(f"\n{save_results('capabilities', rows, cache_bytes=round(memory))}")


if __name__ == "__main__":
    main()
