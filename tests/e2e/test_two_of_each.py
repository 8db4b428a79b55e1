"""Two processes of every service in mutual TLS: goals complete while one of each is stopped, and started anew."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from process_installation import GOALS, ProcessInstallation, complete_goal, private_servers, start_processes
from scripts import default_reply
from wires import certificates

from octollm.contracts.services import SERVICES

pytestmark = [pytest.mark.sandbox, pytest.mark.redis, pytest.mark.postgres, pytest.mark.timeout(300)]


async def _roll(installation: ProcessInstallation) -> dict[str, int]:
    """Stop and start the first process of each service, one after the other; return their exit codes."""
    codes: dict[str, int] = {}
    for name in SERVICES:
        first = installation.replicas[name][0]
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
        private_servers(tmp_path, default_reply) as servers,
        start_processes(tmp_path / "installation", {**servers.environment, **secured()}, replicas=2) as installation,
    ):
        rolling = asyncio.create_task(_roll(installation))
        done: list[dict[str, Any]] = []
        while not rolling.done() or len(done) < len(GOALS):
            done += await asyncio.gather(
                *(complete_goal(installation, goal, files, gateway=1) for goal, files in GOALS)
            )
        codes = await rolling
        for task in done:
            assert task["status"] == "completed", (task["goal"], task["error"], installation.logs())
        # Stopping is no failure.
        assert codes == dict.fromkeys(SERVICES, 0)
        await _both_gateways_know(installation, done[0]["task_id"])


async def _both_gateways_know(installation: ProcessInstallation, task_id: str) -> None:
    for gateway in (0, 1):
        async with installation.client(gateway) as client:
            answer: httpx.Response = await client.get(f"/tasks/{task_id}")
            assert answer.json()["status"] == "completed"
