"""Cancelling at random moments: each task ends once, a repeat is answered the same, and the model's connection closes.

``CANCELS`` sizes a run, and ``SEED`` repeats one: `make chaos-cancels`.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import time
import uuid
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import websockets
from tasks_faults import check
from tasks_stage import ARMS, SMALL_GROUPS, Groups, Stage, open_stage

from octollm.testing import wait_until

CANCELS = int(os.environ.get("CANCELS", "12"))
SEED = int(os.environ.get("SEED", "7"))
WAYS = ("api", "websocket", "parent", "deadline")
PARALLEL = 6

pytestmark = [pytest.mark.redis, pytest.mark.postgres]


@dataclass
class Cancelled:
    """A cancelled task: how, and when the request was sent; a deadline needs none."""

    task_id: str
    way: str
    at: float = 0.0


@dataclass
class Cancels:
    """Cancels tasks, a few at a time."""

    stage: Stage
    chance: random.Random
    done: list[Cancelled] = field(default_factory=list[Cancelled])

    async def run(self, number: int) -> None:
        """Submit a task whose first step has no end, and cancel it at a random moment."""
        way, after = WAYS[number % len(WAYS)], self.chance.uniform(0.0, 2.0)
        marks = ["nest" if way == "parent" else "endless", "", "", "", ""]
        plan = {"arms": ["mark"] * 5, "needs": [[], [1], [1], [2], [3]], "marks": marks}
        seconds = after + 1.0 if way == "deadline" else 300.0
        body = {"goal": f"chaos-plan {json.dumps(plan)}", "budget": {"max_time_seconds": seconds}}
        cancelled = Cancelled(await self.stage.submit(body), way)
        self.done.append(cancelled)
        if way != "deadline":
            if number // len(WAYS) % 2:
                # On a busy machine most of the others are cancelled before the model writes.
                await self.stage.wait_until_writing(cancelled.task_id)
            # The moment is what is tested: no state is waited for.
            await asyncio.sleep(after)
            cancelled.at = time.monotonic()
            await (self._by_websocket if way == "websocket" else self._by_request)(cancelled.task_id)

    async def _by_request(self, task_id: str) -> None:
        key = {"Idempotency-Key": uuid.uuid4().hex}
        path = f"/tasks/{task_id}/cancel"
        first, second = await asyncio.gather(*(self.stage.client.post(path, headers=key) for _ in range(2)))
        third = await self.stage.client.post(path, headers=key)
        assert (first.status_code, first.json()["status"]) == (200, "cancelled"), first.text
        assert first.json() == second.json() == third.json()
        other = await self.stage.client.post(path)
        assert (other.status_code, other.json()["code"]) == (409, "state_conflict")

    async def _by_websocket(self, task_id: str) -> None:
        client = self.stage.client
        url = str(client.base_url.copy_with(scheme="ws", path=f"/ws/tasks/{task_id}"))
        headers = {"Authorization": client.headers["Authorization"]}
        async with asyncio.timeout(30), websockets.connect(url, additional_headers=headers) as socket:
            await socket.send('{"type": "cancel"}')
            async for frame in socket:
                if json.loads(frame)["data"].get("status") == "cancelled":
                    return
        raise AssertionError("the socket closed without saying that the task is cancelled")


def read_model_calls(file: Path) -> dict[str, list[tuple[float, float, str]]]:
    """Return the model calls of each task: when the last word was sent, when the call ended, and how."""
    begun: dict[int, str] = {}
    calls: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
    for line in map(json.loads, file.read_text().splitlines()):
        if line[0] == "begun":
            begun[line[1]] = line[3].partition(" ")[0]
        else:
            _, number, how, last_word, ended = line
            calls[begun.pop(number)].append((last_word, ended, how))
    assert not begun, "a connection to the model is open"
    return calls


async def end_of_subtasks(stage: Stage) -> dict[str, str]:
    """Return the parent of each sub-task."""
    rows = await stage.connection.fetch(
        "SELECT task_id, parent_task_id FROM octollm_orchestrator.tasks WHERE parent_task_id IS NOT NULL"
    )
    return {row["task_id"]: row["parent_task_id"] for row in rows}


@pytest.mark.timeout(240 + CANCELS * 5)
async def test_cancelling_at_random_moments(tmp_path: Path) -> None:
    async with open_stage(tmp_path, SEED, SMALL_GROUPS) as stage:
        await stage.processes.wait_ready(stage.processes.names)
        cancels = Cancels(stage, random.Random(SEED))
        places = asyncio.Semaphore(PARALLEL)

        async def run(number: int) -> None:
            async with places:
                await cancels.run(number)

        async with asyncio.TaskGroup() as group:
            for number in range(CANCELS):
                group.create_task(run(number))
        await stage.settle()

        async def connections_closed() -> bool:
            return (await stage.outside.get("/state")).json()["active"] == 0

        await wait_until(connections_closed, description="the model's connections are closed", timeout=30)
        rows = await stage.connection.fetch("SELECT task_id, status, error FROM octollm_orchestrator.tasks")
        status = {row["task_id"]: (row["status"], json.loads(row["error"] or "{}").get("code")) for row in rows}
        parents = await end_of_subtasks(stage)
        for each in cancels.done:
            ended, code = status[each.task_id]
            if each.way == "deadline":
                # On a busy machine, a service that could not be reached until then is the reason that is given.
                assert (ended, bool(code)) == ("failed", True), each
            else:
                assert (ended, code) == ("cancelled", None), each
        assert {status[task_id][0] for task_id in parents} <= {"cancelled"}
        print(check(await stage.finish(f"{CANCELS} cancels")))
        report_latency(cancels.done, parents, read_model_calls(tmp_path / "model.jsonl"))


VICTIMS: Groups = {
    "orchestrator": (("orchestrator",), 1),
    "models": (("models",), 1),
    "arms": (("planner", "judge", *ARMS), 1),
    "reflex": (("reflex",), 1),
}


@pytest.mark.timeout(300)
async def test_what_a_dead_process_had_reserved_is_settled(tmp_path: Path) -> None:
    """Kill the caller of a model, ``models`` and the orchestrator, each between reservation and settlement."""
    async with open_stage(tmp_path, SEED, VICTIMS) as stage:
        plan = {"arms": ["mark"], "needs": [[]], "marks": ["endless"]}
        for victim in ("arms-1", "models-1", "orchestrator-1"):
            task_id = await stage.submit({"goal": f"chaos-plan {json.dumps(plan)}"})
            await stage.wait_until_writing(task_id)
            stage.processes.kill(victim)
            stage.processes.start(victim)
            await stage.processes.wait_ready([victim])
            answer = await stage.send("POST", f"/tasks/{task_id}/cancel")
            assert answer is not None, victim
            assert answer.status_code == 200, (victim, answer.text)
        # A call that is under way may settle for a minute after its task's end: here that minute is over.
        await stage.connection.execute("UPDATE octollm_orchestrator.tasks SET finished_at = finished_at - 120")
        await stage.settle()
        reserved = await stage.connection.fetchval("SELECT sum(used_tokens) FROM octollm_orchestrator.reservations")
        assert reserved > 0
        check(await stage.finish("reservations"))


def report_latency(
    done: list[Cancelled], parents: dict[str, str], calls: dict[str, list[tuple[float, float, str]]]
) -> None:
    """Print the time from a cancel to the last word and to the end of the connection; fail for a text that went on."""
    latencies: dict[str, list[tuple[float, float]]] = defaultdict(list)
    children = {parent: child for child, parent in parents.items()}
    for each in done:
        for last_word, ended, how in calls[children.get(each.task_id, each.task_id)]:
            assert how == "left", each
            if each.at and ended > each.at:
                latencies[each.way].append((max(0.0, last_word - each.at), ended - each.at))
    print("| cancelled by | model calls | last word, median | last word, worst | connection closed, worst |")
    print("|---|---:|---:|---:|---:|")
    for way, found in latencies.items():
        words, ends = zip(*found, strict=True)
        cells = (statistics.median(words), max(words), max(ends))
        print(f"| {way} | {len(found)} | {' | '.join(f'{1000 * each:.0f} ms' for each in cells)} |")
    assert latencies, "no task was cancelled while the model wrote"
