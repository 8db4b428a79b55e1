"""The ADR's own clients run against a real installation; only the model's words are scripted."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest
from redis_process import RedisProcess

from octollm.installation.embedded import Installation
from octollm.testing.fake_model import ScriptedRequest, scripted_model
from octollm.testing.system import installation

EXAMPLE = Path(__file__).parents[2] / "examples" / "adr_clients.py"
CODE = "def add(a: int, b: int) -> int:\n    return a + b"


def answers(asked: ScriptedRequest) -> str:
    if asked.schema is not None and "steps" in str(asked.schema):
        return '{"steps": [{"title": "Write add", "criteria": ["It adds."]}]}'
    if asked.system.startswith("You judge"):
        return '{"accepted": true, "reason": ""}'
    if "test cases" in asked.system:
        return "assert add(1, 2) == 3\nassert add(0, 0) == 0\nassert add(-1, 1) == 0\nassert add(5, 7) == 12"
    return f"```python\n{CODE}\n```"


@pytest.fixture
async def model_url():
    async with scripted_model(answers) as model:
        yield model.url


async def client(system: Installation, name: str, **settings: str) -> str:
    """Run one of the clients; return what it printed."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OCTOLLM_")}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(EXAMPLE),
        name,
        env={
            **kept,
            "OCTOLLM_URL": system.gateway_url,
            "OCTOLLM_CODER_URL": system.urls["coder"],
            "OCTOLLM_JUDGE_URL": system.urls["judge"],
            **settings,
        },
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(90):
            out, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, out.decode()
    return out.decode()


@pytest.mark.sandbox
async def test_a_client_calls_arms_and_watches(tmp_path, model_url):
    settings = {"OCTOLLM_MODEL": "openai:scripted", "OCTOLLM_MODEL_URL": model_url}
    async with installation(tmp_path / "home", environment=settings) as system:
        assert CODE in await client(system, "execute")
        assert await client(system, "validate") == "True\n"
        lines = (await client(system, "progress")).splitlines()
    shown = [float(line.removeprefix("Task progress: ").removesuffix("%")) for line in lines]
    assert shown == sorted(shown)
    assert shown[-1] == 100


@pytest.mark.sandbox
@pytest.mark.redis
async def test_a_client_subscribes_to_a_pattern(tmp_path, model_url):
    redis = RedisProcess(tmp_path)
    redis.start()
    try:
        settings = {
            "OCTOLLM_MODEL": "openai:scripted",
            "OCTOLLM_MODEL_URL": model_url,
            "OCTOLLM_REDIS_URL": redis.url,
        }
        async with installation(tmp_path / "home", environment=settings) as system:
            lines = (await client(system, "events", OCTOLLM_REDIS_URL=redis.url)).splitlines()
    finally:
        redis.kill()
    types = [line.split()[0] for line in lines]
    assert types[:3] == ["task.accepted", "task.planning", "task.planned"]
    assert types[-1] == "task.completed"
