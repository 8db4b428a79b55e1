"""Ten processes: each is killed in turn in the middle of a task, started again, and the task completes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
from gateway_client import wait_for_task
from process_installation import ProcessInstallation, private_servers, start_processes
from scripts import HoldingScript

from octollm.contracts.services import SERVICES

pytestmark = [pytest.mark.sandbox, pytest.mark.redis, pytest.mark.postgres, pytest.mark.timeout(300)]
GOAL = "Write a Python function double(number) with tests"


@pytest.fixture
async def script() -> HoldingScript:
    return HoldingScript()


@pytest.fixture
async def installation(tmp_path: Path, script: HoldingScript) -> AsyncGenerator[ProcessInstallation]:
    async with (
        private_servers(tmp_path, script) as servers,
        start_processes(tmp_path / "installation", servers.environment) as found,
    ):
        yield found


async def test_a_task_outlives_every_process(installation: ProcessInstallation, script: HoldingScript) -> None:
    async with installation.client() as client:
        for name in SERVICES:
            script.hold()
            submitted = await client.post("/tasks", json={"goal": GOAL})
            assert submitted.status_code == 201, (name, submitted.text)
            task_id = submitted.json()["task_id"]
            async with asyncio.timeout(30):
                await script.writing.wait()
            (replica,) = installation.replicas[name]
            await replica.kill()
            script.go.set()
            await replica.start()
            task = await wait_for_task(client, task_id)
            assert task["status"] == "completed", (name, task["error"], installation.logs())
            assert task["usage"]["prompt_tokens"] > 0
            history = (await client.get(f"/tasks/{task_id}/history")).json()["events"]
            assert [event["version"] for event in history] == list(range(1, len(history) + 1)), name
            # A take-over is no retry: the step goes on with the attempt that it was at, but for one whose callers
            # waited in vain because a slow machine took longer to start the process than their patience lasts.
            attempts = {e["data"]["attempt"] for e in history if e["event_type"] == "step.started"}
            assert attempts in ({1}, {1, 2}), name
            await replica.ready()
