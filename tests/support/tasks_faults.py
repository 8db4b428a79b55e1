"""What goes wrong in a run of faults on tasks: a schedule that a seed repeats, at the stage of `tasks_stage.py`."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import redis.asyncio as redis_py
import tasks_checker
from tasks_stage import Stage

HOUR = 3600.0
STOPPED_SECONDS = (2.5, 7.0)
"""Longer than a worker's lease (2 s), and some longer than every other (5 s)."""


@dataclass(frozen=True)
class Fault:
    """One fault: ``target`` is a process, or what stands outside; it is mended after ``seconds``."""

    at: float
    name: str
    target: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.at:6.1f} s  {self.name} {self.target} ({self.seconds:.1f} s)"


WEIGHTS = {
    "kill": 10,
    "stop": 5,
    "stop PostgreSQL": 1,
    "stop Redis": 1,
    "restart PostgreSQL": 1,
    "kill Redis": 1,
    "flush Redis": 1,
    "lose answers": 3,
    "hang": 1,
    "model": 2,
    "wrong clock": 1,
}
"""How often each fault is, relative to the others."""
MOODS = ("limited", "failing", "garbage", "endless", "mixed")


def schedule(seed: int, processes: Sequence[str]) -> Iterator[Fault]:
    """Yield faults without end, one for about each second, of which none begins before its target is mended."""
    chance = random.Random(seed)
    mended: dict[str, float] = {}
    at = 0.0
    while True:
        at += chance.uniform(0.6, 1.4)
        name = chance.choices(tuple(WEIGHTS), tuple(WEIGHTS.values()))[0]
        target = name.split(" ")[-1] if name not in ("kill", "stop", "wrong clock") else chance.choice(processes)
        seconds = chance.uniform(*STOPPED_SECONDS)
        if name in ("kill", "restart PostgreSQL", "kill Redis"):
            seconds = chance.uniform(0.1, 2.0)
        elif name == "model":
            target = chance.choice(MOODS)
        elif name == "wrong clock":
            target += chance.choice(("+", "-"))
            # Most of it is the start.
            seconds += 4.0
        busy = "model" if name == "model" else target.rstrip("+-")
        if mended.get(busy, 0.0) > at:
            continue
        # A process needs a while to be there again: what is always away meets no fault.
        mended[busy] = at + seconds + (4.0 if name in ("kill", "wrong clock") else 0.5)
        yield Fault(at, name, target, seconds)


async def inject(stage: Stage, fault: Fault) -> None:
    """Have a fault, wait until it is over, and mend what it broke."""
    processes, name, target = stage.processes, fault.name, fault.target
    if name == "kill":
        processes.kill(target)
        await asyncio.sleep(fault.seconds)
        processes.start(target)
    elif name == "wrong clock":
        processes.kill(target[:-1])
        processes.start(target[:-1], HOUR if target.endswith("+") else -HOUR)
        await asyncio.sleep(fault.seconds)
        processes.kill(target[:-1])
        processes.start(target[:-1])
    elif name == "stop":
        processes.signal(target, signal.SIGSTOP)
        try:
            await asyncio.sleep(fault.seconds)
        finally:
            processes.signal(target, signal.SIGCONT)
    elif name == "stop PostgreSQL":
        await _stop_session(stage.postgres.pid, fault.seconds)
    elif name == "stop Redis":
        stage.redis.pause()
        try:
            await asyncio.sleep(fault.seconds)
        finally:
            stage.redis.resume()
    elif name == "restart PostgreSQL":
        await asyncio.to_thread(stage.postgres.kill)
        await asyncio.sleep(fault.seconds)
        await asyncio.to_thread(stage.postgres.start)
    elif name == "kill Redis":
        stage.redis.kill()
        await asyncio.sleep(fault.seconds)
        await asyncio.to_thread(stage.redis.start)
    elif name == "flush Redis":
        with contextlib.suppress(redis_py.RedisError):
            async with redis_py.Redis.from_url(stage.redis.url) as client:
                await client.flushall()
    else:
        await _spoil(stage, fault)


async def _spoil(stage: Stage, fault: Fault) -> None:
    """Have what is outside misbehave for a while."""
    spoilt, mended = {
        "lose answers": ({"cut": 0.1}, {"cut": 0.0}),
        "hang": ({"hang": True}, {"hang": False}),
        "model": ({"model": fault.target}, {"model": "ok"}),
    }[fault.name]
    await stage.control(**spoilt)
    try:
        await asyncio.sleep(fault.seconds)
    finally:
        await stage.control(**mended)


async def _stop_session(leader: int, seconds: float) -> None:
    """Stop a server with all of its processes, as a machine that stands still."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(leader)], capture_output=True, text=True, check=False)
    stopped = [leader, *map(int, listed.stdout.split())]
    try:
        for pid in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(seconds)
    finally:
        for pid in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


@contextlib.asynccontextmanager
async def faults(stage: Stage, seed: int, number: int) -> AsyncGenerator[list[Fault]]:
    """Have up to ``number`` faults while the context is open, then mend all. Yields those that have begun."""
    begun: list[Fault] = []

    async def run() -> None:
        at = 0.0
        async with asyncio.TaskGroup() as group:
            for fault in itertools.islice(schedule(seed, stage.processes.names), number):
                await asyncio.sleep(fault.at - at)
                at = fault.at
                # A machine on which a start takes long would have nothing left that a fault could meet.
                while not stage.processes.mostly_serve():
                    await asyncio.sleep(0.1)
                begun.append(fault)
                stage.processes.revive()
                group.create_task(inject(stage, fault))

    running = asyncio.create_task(run())
    try:
        yield begun
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
        await mend(stage)
        (stage.folder / "faults.txt").write_text("".join(f"{fault}\n" for fault in begun))


async def mend(stage: Stage) -> None:
    """Have everything there again, with its clock right."""
    for server in (stage.redis, stage.postgres):
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.start)
    await stage.control(model="ok", cut=0.0, hang=False)
    for name in stage.processes.names:
        if stage.processes.is_wrong(name):
            stage.processes.kill(name)
        stage.processes.start(name)


def goal(chance: random.Random) -> dict[str, object]:
    """Return the body of a task of five steps: in a row, side by side, or both; some with more than an effect each."""
    needs = chance.choice(([[], [1], [2], [3], [4]], [[], [], [], [], []], [[], [1], [1], [2], [3, 4]]))
    arms = [chance.choice(("stamp", "mark")) for _ in needs]
    marks = [chance.choices(("", "ask", "submit"), (14, 5, 1))[0] for _ in needs]
    body: dict[str, object] = {
        "goal": "chaos-plan " + json.dumps({"arms": arms, "needs": needs, "marks": marks}),
        "budget": {"max_time_seconds": 120},
    }
    approval = chance.choices(({}, {"plan": True}, {"steps": ["stamp"]}), (8, 1, 1))[0]
    return {**body, "approval": approval} if approval else body


def check(*files: Path) -> str:
    """Run the checker as a program, and return its table; fail with what it found."""
    done = subprocess.run(
        [sys.executable, tasks_checker.__file__, *map(str, files)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout
