"""A running installation publishes and subscribes to every declared Redis channel, and to no other."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator
from fnmatch import fnmatchcase
from pathlib import Path

import httpx
import pytest
import redis.asyncio as redis_py
from gateway_client import GatewayClient
from redis_process import RedisProcess
from scripts import HoldingScript, ReplaceableScript

from octollm.storage.keys import REDIS_KEYS
from octollm.testing import wait_until

pytestmark = [pytest.mark.sandbox, pytest.mark.redis]
CHANNELS = {
    info.name: re.compile(re.sub(r"\\\{[^}]*\\\}", "[^:]+", re.escape(info.name)))
    for info in REDIS_KEYS
    if info.kind == "channel"
}
OF_REPLICAS = {"octollm:acks", "octollm:commits"}
"""Channels that need a second replica of the orchestrator: `tests/events/test_outbox.py`."""


class PubSubRecorder:
    """The channels that clients of a server publish and subscribe to, as its MONITOR command reports them."""

    def __init__(self) -> None:
        self.published: set[str] = set()
        self.subscribed: set[str] = set()

    def record(self, command: str) -> None:
        name, *arguments = command.split(" ")
        match name.upper():
            case "PUBLISH":
                self.published.add(arguments[0])
            case "SUBSCRIBE" | "PSUBSCRIBE":
                self.subscribed.update(arguments)
            case _:
                pass


@pytest.fixture
async def redis_server(tmp_path: Path) -> AsyncGenerator[RedisProcess]:
    server = RedisProcess(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.fixture
async def recorder(redis_server: RedisProcess) -> AsyncGenerator[PubSubRecorder]:
    recorded = PubSubRecorder()
    async with redis_py.Redis.from_url(redis_server.url) as client, client.monitor() as monitor:

        async def follow() -> None:
            async for command in monitor.listen():
                recorded.record(command["command"])

        following = asyncio.create_task(follow())
        yield recorded
        following.cancel()
        await asyncio.wait({following})


@pytest.fixture
def environment(redis_server: RedisProcess, recorder: PubSubRecorder) -> dict[str, str]:
    # With room for one task, a second one is announced to the workers of other replicas.
    return {"OCTOLLM_REDIS_URL": redis_server.url, "OCTOLLM_MAX_RUNNING_TASKS": "1"}


async def test_every_declared_channel_has_a_publisher_and_a_subscriber(
    gateway: GatewayClient, recorder: PubSubRecorder, script: ReplaceableScript
) -> None:
    script.reply = held = HoldingScript()
    task_id = await gateway.submit("Write a Python function double(number) with tests")
    async with asyncio.timeout(60):
        await held.writing.wait()
    other = await gateway.submit("Write a Python function double(number) with tests")
    async with httpx.AsyncClient(base_url=gateway.url) as client:
        assert (await client.post(f"/tasks/{other}/cancel")).status_code == 200
    held.go.set()
    await gateway.frames(task_id)

    def without(names: set[str]) -> list[str]:
        """Return the declared channels that none of the names stands for; a name may be a pattern of Redis."""
        sample = {name: re.sub(r"\{[^}]*\}", "x", name) for name in CHANNELS}
        return [
            name
            for name, pattern in CHANNELS.items()
            if name not in OF_REPLICAS
            if not any(pattern.fullmatch(each) or fnmatchcase(sample[name], each) for each in names)
        ]

    await wait_until(lambda: not without(recorder.published), description="each channel is published to")
    assert without(recorder.subscribed) == []
    undeclared = [name for name in recorder.published if not any(each.fullmatch(name) for each in CHANNELS.values())]
    assert undeclared == []
