"""A client of the gateway with nothing but stock libraries."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec
import websockets

from octollm.installation.embedded import Installation
from octollm.testing import wait_until

FINAL_STATUSES = ("completed", "failed", "cancelled")


@dataclass
class GatewayClient:
    """A client of the public gateway with nothing but stock libraries."""

    system: Installation
    client: httpx.AsyncClient

    @property
    def url(self) -> str:
        return self.system.gateway_url

    async def submit(self, goal: str, files: dict[str, str] | None = None, **body: Any) -> str:
        listed = [{"name": name, "text": text} for name, text in (files or {}).items()]
        answer = await self.client.post("/tasks", json={"goal": goal, "context": {"files": listed}, **body})
        assert answer.status_code == 201, answer.text
        assert answer.headers["location"] == f"/tasks/{answer.json()['task_id']}"
        return answer.json()["task_id"]

    async def task(self, task_id: str) -> dict[str, Any]:
        answer = await self.client.get(f"/tasks/{task_id}")
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def finished(self, task_id: str, seconds: float = 60) -> dict[str, Any]:
        async with asyncio.timeout(seconds):
            while (task := await self.task(task_id))["status"] not in FINAL_STATUSES:
                await asyncio.sleep(0.05)
        return task

    async def run(self, goal: str, files: dict[str, str] | None = None, **body: Any) -> dict[str, Any]:
        return await self.finished(await self.submit(goal, files, **body))

    async def frames(self, task_id: str, query: str = "?after=0") -> tuple[list[dict[str, Any]], int]:
        """Watch a task to its end; return its frames and the close code."""
        url = self.url.replace("http", "ws", 1) + f"/ws/tasks/{task_id}{query}"
        found: list[dict[str, Any]] = []
        async with asyncio.timeout(60), websockets.connect(url) as ws:
            with contextlib.suppress(websockets.ConnectionClosedError):
                async for message in ws:
                    found.append(msgspec.json.decode(message))
            assert ws.close_code is not None
            return found, ws.close_code


async def wait_for_task(client: httpx.AsyncClient, task_id: str, seconds: float = 60) -> dict[str, Any]:
    """Return the task once it has ended, whatever the gateway does meanwhile."""
    found: dict[str, Any] = {}

    async def final() -> bool:
        try:
            answer = await client.get(f"/tasks/{task_id}")
        except httpx.HTTPError:
            return False
        found.update(answer.json() if answer.status_code == 200 else {})
        return found.get("status") in FINAL_STATUSES

    await wait_until(final, description=f"{task_id} ends", timeout=seconds, interval=0.1)
    return found
