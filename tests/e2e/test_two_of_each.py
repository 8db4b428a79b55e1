"""Two processes of every service in mutual TLS: goals complete while one of each is stopped, and started anew.

Those that are started anew speak HTTP/2: so an installation is switched, one process at a time.
"""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from typing import Any

import httpx
import pytest
from servers import own_servers
from spread import Spread, spread_out, trusting
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
        first.environment["OCTOLLM_HTTP"] = "2"
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
        await _both_versions_are_spoken(spread)


async def _both_doors_know(spread: Spread, task_id: str) -> None:
    for door in (0, 1):
        async with spread.client(door) as client:
            answer: httpx.Response = await client.get(f"/tasks/{task_id}")
            assert answer.json()["status"] == "completed"


def offering_both(spread: Spread) -> ssl.SSLContext:
    context = trusting(spread.environment)
    assert isinstance(context, ssl.SSLContext)
    context.set_alpn_protocols(["h2", "http/1.1"])
    return context


async def _both_versions_are_spoken(spread: Spread) -> None:
    for replica, version in zip(spread.replicas["judge"], ("HTTP/2", "HTTP/1.1"), strict=True):
        async with httpx.AsyncClient(http2=True, verify=offering_both(spread)) as client:
            assert (await client.get(f"{replica.url}/health")).http_version == version
