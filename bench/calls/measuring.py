"""How fast calls are: one after the other, many in flight, and at a constant rate."""

from __future__ import annotations

import asyncio
import math
import resource
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

Call = Callable[[], Awaitable[object]]


@dataclass(frozen=True)
class Found:
    """Calls per second, their times in milliseconds, and the CPU time of this process per call in microseconds."""

    rate: float
    p50: float
    p99: float
    cpu: float


async def in_flight(call: Call, many: int, seconds: float) -> Found:
    """Keep ``many`` calls under way for so long."""
    times: list[float] = []
    until = time.perf_counter() + seconds

    async def some() -> None:
        while (began := time.perf_counter()) < until:
            await call()
            times.append(time.perf_counter() - began)

    cpu, began = _cpu(), time.perf_counter()
    await asyncio.gather(*(some() for _ in range(many)))
    return _found(times, time.perf_counter() - began, _cpu() - cpu)


async def at_rate(call: Call, rate: float, seconds: float) -> Found:
    """Begin ``rate`` calls a second whatever becomes of them; a time counts from when its call was due.

    So a server that stalls is not spared the calls that would have come meanwhile (coordinated omission).
    """
    times: list[float] = []
    calls: set[asyncio.Task[None]] = set()
    cpu, began = _cpu(), time.perf_counter()

    async def one(due: float) -> None:
        await call()
        times.append(time.perf_counter() - due)

    for number in range(int(rate * seconds)):
        due = began + number / rate
        wait = due - time.perf_counter()
        if wait > 0:
            await asyncio.sleep(wait)
        task = asyncio.create_task(one(due))
        calls.add(task)
        task.add_done_callback(calls.discard)
    await asyncio.gather(*calls)
    return _found(times, time.perf_counter() - began, _cpu() - cpu)


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _found(times: list[float], seconds: float, cpu: float) -> Found:
    ranked = sorted(times)

    def at(share: float) -> float:
        return ranked[min(len(ranked) - 1, math.ceil(share * len(ranked)) - 1)] * 1000

    return Found(len(times) / seconds, at(0.5), at(0.99), cpu / len(times) * 1e6)
