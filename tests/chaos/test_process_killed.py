"""The whole process is killed in the middle of a task: started again, it finishes the task."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from command_line import CommandLine
from scripts import SALES, default_reply

from octollm.testing import wait_until
from octollm.testing.fake_model import ScriptedReply, ScriptedRequest, scripted_model

pytestmark = pytest.mark.sandbox
GOAL = "How many rows have amount > 100, and their total?"


async def test_a_task_survives_kill_nine(tmp_path: Path) -> None:
    held = True

    def slow(asked: ScriptedRequest) -> str | ScriptedReply:
        if asked.schema is None and "SQL" in asked.system and held:
            return ScriptedReply("SELECT ", hangs=True)
        return default_reply(asked)

    async with scripted_model(slow) as model:
        command_line = CommandLine(tmp_path, {"OCTOLLM_MODEL": "openai:scripted", "OCTOLLM_MODEL_URL": model.url})
        up = await command_line.up()
        try:
            async with httpx.AsyncClient(base_url=command_line.gateway_url, timeout=30) as client:
                body: dict[str, Any] = {"goal": GOAL, "context": {"files": [{"name": "sales.csv", "text": SALES}]}}
                task_id = (await client.post("/tasks", json=body)).json()["task_id"]
                # The planner asks first, with a schema; the query is the step's.
                await wait_until(
                    lambda: model.active and model.requests[-1].schema is None,
                    description="the model is writing the query",
                    timeout=30,
                )
            up.kill()
            await up.wait()
            held = False
            await wait_until(lambda: model.active == 0, description="the model's client is gone")
            up = await command_line.up()
            async with httpx.AsyncClient(base_url=command_line.gateway_url, timeout=30) as client, asyncio.timeout(60):
                while (task := (await client.get(f"/tasks/{task_id}")).json())["status"] not in ("completed", "failed"):
                    await asyncio.sleep(0.1)
                history = (await client.get(f"/tasks/{task_id}/history")).json()["events"]
            assert task["status"] == "completed", task["error"]
            assert "400" in task["output"]
            assert [event["version"] for event in history] == list(range(1, len(history) + 1))
            # The step goes on with the attempt that it was at: a take-over is no retry. A machine that stands still for
            # as long as a lease may bring about a further one.
            started = [event["data"] for event in history if event["event_type"] == "step.started"]
            assert {data["attempt"] for data in started} == {1}
            assert [data["run"] for data in started] in ([1, 2], [1, 2, 3])
        finally:
            await command_line.interrupt(up)
