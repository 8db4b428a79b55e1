"""Faults on tasks: each ends once, nothing is done twice that must not be, no step is lost, and the ledger is exact.

``TASKS`` and ``SEEDS`` size a run, and ``SEED`` repeats one: `make chaos-tasks`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections import Counter
from pathlib import Path

import pytest
from tasks_faults import check, faults, goal
from tasks_stage import GROUPS, SMALL_GROUPS, Stage, open_stage

TASKS = int(os.environ.get("TASKS", "8"))
SEED = int(os.environ.get("SEED", "7"))
SEEDS = int(os.environ.get("SEEDS", "1"))
IS_LARGE = TASKS > 50
FAULTS = max(10, TASKS)
PARALLEL = 40
"""Tasks that are open at a time, so that faults meet all of them."""

pytestmark = [
    pytest.mark.redis,
    pytest.mark.postgres,
    # A minute and a half for the smallest run: the rules of the checker, and each fault found, have tests of their own.
    pytest.mark.skipif("TASKS" not in os.environ, reason="make chaos-tasks runs it"),
]


async def submit_all(stage: Stage, chance: random.Random) -> None:
    """Submit tasks as earlier ones end, and pause some."""
    for _ in range(TASKS):
        while len(stage.submitted) >= PARALLEL and await open_count(stage) >= PARALLEL:
            await asyncio.sleep(0.2)
        task_id = await stage.submit(goal(chance))
        if chance.random() < 0.1:
            await stage.send("POST", f"/tasks/{task_id}/pause")


async def open_count(stage: Stage) -> int:
    """Return the number of open tasks, as far as the database says."""
    with contextlib.suppress(*stage.OUTAGES):
        return len(await stage.open_tasks())
    return PARALLEL


@pytest.mark.timeout(300 + TASKS * 10)
@pytest.mark.parametrize("seed", range(SEED, SEED + SEEDS))
async def test_tasks_survive_faults(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    starting = time.monotonic()
    async with open_stage(tmp_path, seed, GROUPS if IS_LARGE else SMALL_GROUPS) as stage:
        print(f"seed {seed}: {time.monotonic() - starting:.0f} s to start")
        attending = asyncio.create_task(stage.attend())
        began = time.monotonic()
        async with faults(stage, seed, FAULTS) as begun:
            await submit_all(stage, chance)
            while await open_count(stage) > TASKS / 10 and len(begun) < FAULTS:
                await asyncio.sleep(0.2)
        faulty = time.monotonic() - began
        await stage.settle()
        attending.cancel()
        took = time.monotonic() - began
        counts = Counter(fault.name for fault in begun)
        print(f"seed {seed}: {faulty:.0f} s of faults ({dict(counts)}), all settled after {took:.0f} s")
        file = await stage.finish(f"seed {seed}")
        assert not stage.processes.died, (stage.processes.died, "".join(map(str, begun)))
        check(file)
