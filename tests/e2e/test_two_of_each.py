"""Two processes of every service in mutual TLS: goals complete while one of each is stopped, and started anew."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from servers import own_servers
from spread import Spread, spread_out
from two_of_each import GOALS, completed
from whole import answers
from wires import certificates

from octollm.contracts.services import SERVICES

pytestmark = [pytest.mark.sandbox, pytest.mark.redis, pytest.mark.postgres, pytest.mark.timeout(300)]


async def _roll(spread: Spread) -> dict[str, int]:
    """Stop and start the first process of each service, one after the other; return their exit codes."""
    codes: dict[str, int] = {}
    for name in SERVICES:
        first = spread.replicas[name][0]
        codes[name] = await first.stop()
        await first.start()
        await first.ready()
    return codes


def secured() -> dict[str, str]:
    tls = certificates()
    files = {"CERT": tls.certificate, "KEY": tls.key, "CA": tls.ca}
    settings = {f"OCTOLLM_TLS_{name}": str(path) for name, path in files.items()}
    # Three goals are looked at ten times a second, for as long as a slow machine takes.
    return {**settings, "OCTOLLM_MTLS": "on", "OCTOLLM_RATE_LIMIT": "10000/minute"}


async def test_goals_complete_while_one_of_each_is_stopped_and_started(tmp_path: Path) -> None:
    async with (
        own_servers(tmp_path, answers) as servers,
        spread_out(tmp_path / "spread", {**servers.environment, **secured()}, replicas=2) as spread,
    ):
        rolling = asyncio.create_task(_roll(spread))
        done: list[dict[str, Any]] = []
        while not rolling.done() or len(done) < len(GOALS):
            done += await asyncio.gather(*(completed(spread, goal, files, door=1) for goal, files in GOALS))
        codes = await rolling
        for task in done:
            assert task["status"] == "completed", (task["goal"], task["error"], spread.logs())
        # Stopping is no failure.
        assert codes == dict.fromkeys(SERVICES, 0)
        await _both_doors_know(spread, done[0]["task_id"])


async def _both_doors_know(spread: Spread, task_id: str) -> None:
    for door in (0, 1):
        async with spread.client(door) as client:
            answer: httpx.Response = await client.get(f"/tasks/{task_id}")
            assert answer.json()["status"] == "completed"
