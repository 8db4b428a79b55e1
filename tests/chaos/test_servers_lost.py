"""Ten processes on PostgreSQL and Redis: either may be lost while a task runs, and nothing is lost with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from gateway_client import wait_for_task
from process_installation import PrivateServers, ProcessInstallation, private_servers, start_processes
from scripts import HoldingScript

from octollm.testing import wait_until

pytestmark = [pytest.mark.sandbox, pytest.mark.redis, pytest.mark.postgres, pytest.mark.timeout(300)]
GOAL = "Write a Python function double(number) with tests"


@dataclass
class Cluster:
    servers: PrivateServers
    installation: ProcessInstallation
    script: HoldingScript


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncGenerator[Cluster]:
    script = HoldingScript()
    async with (
        private_servers(tmp_path, script) as servers,
        start_processes(tmp_path / "installation", servers.environment) as installation,
    ):
        yield Cluster(servers, installation, script)


async def _begun(client: httpx.AsyncClient, script: HoldingScript) -> str:
    """Return a task whose code is being written."""
    script.hold()
    submitted = await client.post("/tasks", json={"goal": GOAL})
    assert submitted.status_code == 201, submitted.text
    async with asyncio.timeout(30):
        await script.writing.wait()
    return submitted.json()["task_id"]


async def test_the_database_is_lost_and_comes_back(cluster: Cluster) -> None:
    async with cluster.installation.client() as client:
        task_id = await _begun(client, cluster.script)
        cluster.servers.postgres.kill()

        async def refused() -> dict[str, Any] | None:
            answer = await client.get(f"/tasks/{task_id}")
            return answer.json() if answer.status_code == 503 else None

        await wait_until(refused, description="the gateway says that the database is away", timeout=30)
        problem = await refused()
        assert problem is not None
        assert problem["code"] in ("unavailable", "overloaded")
        assert "postgres@" not in problem["detail"]
        (orchestrator,) = cluster.installation.replicas["orchestrator"]
        async with httpx.AsyncClient(timeout=20) as plain:
            ready = await plain.get(f"{orchestrator.url}/ready")
        assert ready.status_code == 503
        assert "database" in ready.json()["dependencies"]
        cluster.script.go.set()
        cluster.servers.postgres.start()
        task = await wait_for_task(client, task_id)
        assert task["status"] == "completed", (task["error"], cluster.installation.logs())
        history = (await client.get(f"/tasks/{task_id}/history")).json()["events"]
        assert [event["version"] for event in history] == list(range(1, len(history) + 1))


async def test_redis_is_lost_and_comes_back(cluster: Cluster) -> None:
    async with cluster.installation.client() as client:
        task_id = await _begun(client, cluster.script)
        cluster.servers.redis.kill()
        cluster.script.go.set()
        task = await wait_for_task(client, task_id)
        assert task["status"] == "completed", (task["error"], cluster.installation.logs())
        (orchestrator,) = cluster.installation.replicas["orchestrator"]

        async def state() -> str:
            async with httpx.AsyncClient(timeout=20) as plain:
                return (await plain.get(f"{orchestrator.url}/ready")).json()["status"]

        # Without Redis tasks go on, and the orchestrator says what is slower.
        await wait_until(_is(state, "degraded"), description="the orchestrator is degraded", timeout=30)
        cluster.servers.redis.start()
        await wait_until(_is(state, "ready"), description="the orchestrator is ready again", timeout=30)
        events = (await client.get("/events?after=0&limit=500")).json()["events"]
        mine = [event for event in events if event["subject"] == f"task/{task_id}"]
        assert mine[-1]["event_type"] == "task.completed"
        assert [event["seq"] for event in events] == sorted({event["seq"] for event in events})


def _is(state, wanted: str):
    async def reached() -> bool:
        return await state() == wanted

    return reached
