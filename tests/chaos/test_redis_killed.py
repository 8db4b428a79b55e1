"""Redis dies in the middle of a task: the task goes on, and nothing that happened is lost."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import redis.asyncio as redis_py
from gateway_client import GatewayClient
from redis_process import RedisProcess
from scripts import SALES, default_reply

from octollm.testing import wait_until
from octollm.testing.fake_model import ScriptedModel, ScriptedReply, ScriptedRequest, scripted_model
from octollm.testing.system import installation

pytestmark = [pytest.mark.redis, pytest.mark.sandbox]
GOAL = "How many rows have amount > 100, and their total?"


@pytest.fixture
def server(tmp_path: Path) -> Any:
    process = RedisProcess(tmp_path)
    process.start()
    yield process
    process.kill()


@contextlib.asynccontextmanager
async def listening(url: str, pattern: str) -> AsyncGenerator[list[dict[str, Any]]]:
    """The ADR's subscriber: a stock redis-py client and a pattern."""
    heard: list[dict[str, Any]] = []
    async with redis_py.Redis.from_url(url) as client, client.pubsub() as pubsub:
        await pubsub.psubscribe(pattern)

        async def listen() -> None:
            with contextlib.suppress(redis_py.RedisError):
                async for message in pubsub.listen():
                    if message["type"] == "pmessage":
                        heard.append(msgspec.json.decode(message["data"]))

        task = asyncio.create_task(listen())
        try:
            yield heard
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def on_server(model: ScriptedModel, server: RedisProcess) -> dict[str, str]:
    return {
        "OCTOLLM_MODEL": "openai:scripted",
        "OCTOLLM_MODEL_URL": model.url,
        "OCTOLLM_REDIS_URL": server.url,
    }


async def events_of(gateway: GatewayClient, task_id: str) -> list[str]:
    found: list[dict[str, Any]] = []
    after = 0
    while True:
        page = (await gateway.client.get("/events", params={"after": after})).json()
        found += page["events"]
        if not page["events"]:
            break
        after = page["after"]
    return [event["event_type"] for event in found if event["subject"] == f"task/{task_id}"]


async def test_a_task_outlives_redis_and_all_events_are_in_the_log(tmp_path: Path, server: RedisProcess) -> None:
    go_on = asyncio.Event()

    def slow(asked: ScriptedRequest) -> str | ScriptedReply:
        if asked.schema is None and "SQL" in asked.system and not go_on.is_set():
            return ScriptedReply("SELECT ", hangs=True)
        return default_reply(asked)

    async with scripted_model(slow) as model:
        settings = on_server(model, server)
        async with (
            installation(tmp_path / "home", environment=settings) as system,
            httpx.AsyncClient(base_url=system.gateway_url, timeout=30) as client,
            listening(server.url, "events:task:*") as heard,
        ):
            gateway = GatewayClient(system, client)
            task_id = await gateway.submit(GOAL, {"sales.csv": SALES})
            await wait_until(lambda: model.active, description="the model is writing")
            await wait_until(
                lambda: "task.started" in [event["event_type"] for event in heard], description="events are heard"
            )
            server.kill()
            cancelled = await client.post(f"/tasks/{task_id}/cancel")
            assert cancelled.status_code == 200
            go_on.set()
            task = await gateway.run(GOAL, {"sales.csv": SALES})
            assert task["status"] == "completed", task["error"]
            ready = (await client.get(system.urls["orchestrator"] + "/ready")).json()
            assert ready["dependencies"]["redis"]["ok"] is False
            assert ready["status"] == "degraded"

            server.start()
            async with listening(server.url, "events:task:*") as after_restart:
                # The backlog may be published before this subscriber is connected. A new task cannot be.
                later = await gateway.run(GOAL, {"sales.csv": SALES})

                def is_published() -> bool:
                    completed = [event for event in after_restart if event["event_type"] == "task.completed"]
                    return later["task_id"] in [event["data"]["task_id"] for event in completed]

                await wait_until(is_published, description="the publisher continues after the restart", timeout=30)

            async def is_complete() -> bool:
                return (await events_of(gateway, task["task_id"]))[-1:] == ["task.completed"]

            await wait_until(is_complete, description="the log has the second task")
            assert (await events_of(gateway, task_id))[-1] == "task.cancelled"
            events = await events_of(gateway, task["task_id"])
            # On a busy machine a worker can lose its lease. The step then starts again in a newer run.
            assert events[4] == "step.started"
            assert [event for event in events if event not in ("task.progress", "step.started")] == [
                "task.accepted",
                "task.planning",
                "task.planned",
                "task.started",
                "step.completed",
                "task.completed",
            ]


async def test_a_pattern_subscription_hears_the_envelope_of_the_decision_record(
    tmp_path: Path, server: RedisProcess
) -> None:
    async with scripted_model(default_reply) as model:
        settings = on_server(model, server)
        async with (
            installation(tmp_path / "home", environment=settings) as system,
            httpx.AsyncClient(base_url=system.gateway_url, timeout=30) as client,
            listening(server.url, "events:task:*") as heard,
        ):
            task_id = await GatewayClient(system, client).submit(GOAL, {"sales.csv": SALES})
            await wait_until(
                lambda: "task.completed" in [event["event_type"] for event in heard],
                description="completion is heard",
                timeout=60,
            )
    (completed,) = (event for event in heard if event["event_type"] == "task.completed")
    assert {"event_type", "timestamp", "source", "data"} <= set(completed)
    assert completed["source"] == "orchestrator"
    assert completed["timestamp"].endswith("Z")
    assert (completed["data"]["task_id"], completed["data"]["status"]) == (task_id, "completed")
    assert isinstance(completed["data"]["duration_ms"], int)
    assert [event["seq"] for event in heard] == sorted(event["seq"] for event in heard)


async def test_an_installation_starts_and_works_without_its_redis(tmp_path: Path, server: RedisProcess) -> None:
    server.kill()
    async with scripted_model(default_reply) as model:
        settings = on_server(model, server)
        async with (
            installation(tmp_path / "home", environment=settings) as system,
            httpx.AsyncClient(base_url=system.gateway_url, timeout=30) as client,
        ):
            task = await GatewayClient(system, client).run(GOAL, {"sales.csv": SALES})
    assert task["status"] == "completed", task["error"]
