"""Ten processes: each is killed in turn in the middle of a task, started again, and the task completes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis_process import RedisProcess
from spread import Spread, spread_out
from whole import FINAL, answers

from octollm.contracts.services import SERVICES
from octollm.testing import wait_until
from octollm.testing.scripted_model import Asked, Reply, scripted_model

pytestmark = [pytest.mark.sandbox, pytest.mark.redis, pytest.mark.timeout(300)]
GOAL = "Write a Python function double(number) with tests"


class Mind:
    """Writes code, and holds the first piece of it until it is let go."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.writing = asyncio.Event()

    def __call__(self, asked: Asked) -> str | Reply:
        found = answers(asked)
        if asked.schema is None and "test cases" not in asked.system and "Python" in asked.system:
            assert isinstance(found, str)
            self.writing.set()
            return Reply(found, until=self.go)
        return found

    def hold(self) -> None:
        self.go.clear()
        self.writing.clear()


@pytest.fixture
async def mind() -> Mind:
    return Mind()


@pytest.fixture
async def spread(tmp_path: Path, mind: Mind) -> AsyncGenerator[Spread]:
    redis = RedisProcess(tmp_path)
    redis.start()
    try:
        async with scripted_model(mind) as model:
            environment = {
                "OCTOLLM_MODEL": "openai:scripted",
                "OCTOLLM_MODEL_URL": model.url,
                "OCTOLLM_REDIS_URL": redis.url,
            }
            async with spread_out(tmp_path / "spread", environment) as found:
                yield found
    finally:
        redis.kill()


async def ended(client: httpx.AsyncClient, task_id: str) -> dict[str, Any]:
    """Return the task once it has ended, whatever the door does meanwhile."""
    found: dict[str, Any] = {}

    async def final() -> bool:
        try:
            answer = await client.get(f"/tasks/{task_id}")
        except httpx.HTTPError:
            return False
        found.update(answer.json() if answer.status_code == 200 else {})
        return found.get("status") in FINAL

    await wait_until(final, description=f"{task_id} ends", timeout=60, interval=0.1)
    return found


async def test_a_task_outlives_every_process(spread: Spread, mind: Mind) -> None:
    async with spread.client() as client:
        for name in SERVICES:
            mind.hold()
            submitted = await client.post("/tasks", json={"goal": GOAL})
            assert submitted.status_code == 201, (name, submitted.text)
            task_id = submitted.json()["task_id"]
            async with asyncio.timeout(30):
                await mind.writing.wait()
            (replica,) = spread.replicas[name]
            await replica.kill()
            mind.go.set()
            await replica.start()
            task = await ended(client, task_id)
            assert task["status"] == "completed", (name, task["error"], spread.logs())
            assert task["usage"]["prompt_tokens"] > 0
            history = (await client.get(f"/tasks/{task_id}/history")).json()["events"]
            assert [event["version"] for event in history] == list(range(1, len(history) + 1)), name
            # A take-over is no retry: the step went on with the attempt that it was at.
            attempts = {e["data"]["attempt"] for e in history if e["event_type"] == "step.started"}
            assert attempts == {1}, name
            await replica.ready()
