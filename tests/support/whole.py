"""What the end-to-end tests share: a model that knows three answers, and a client of the public door."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec
import websockets

from octollm.installation.embedded import Installation
from octollm.testing.fake_model import ScriptedReply, ScriptedRequest

FINAL = ("completed", "failed", "cancelled")
CODE = 'def double(number: int) -> int:\n    """Return twice the number."""\n    return number * 2'
EXAMPLES = "assert double(2) == 4\nassert double(0) == 0\nassert double(-3) == -6\nassert double(10) == 20"
QUERY = "SELECT count(*) AS rows, sum(amount) AS total FROM sales WHERE amount > 100"
SALES = "region,amount\nnorth,150\nsouth,90\neast,250\nwest,100\n"
NOTES = "# Notes\n\nThe service retries a failed call three times.\n\nCats sleep through most of the day.\n"


def answers(asked: ScriptedRequest) -> str | ScriptedReply:
    """Answer as a good model would: by what the prompt asks for."""
    if asked.schema is not None and "steps" in str(asked.schema):
        return '{"steps": [{"title": "Do the work", "criteria": ["It is done."]}]}'
    if asked.system.startswith("You judge"):
        return '{"accepted": true, "reason": ""}'
    if "SQL" in asked.system:
        return f"```sql\n{QUERY}\n```"
    if "test cases" in asked.system:
        return EXAMPLES
    if "Python" in asked.system:
        return f"```python\n{CODE}\n```"
    return "The service retries a failed call three times."


@dataclass
class Door:
    """A client of the public door with nothing but stock libraries."""

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
            while (task := await self.task(task_id))["status"] not in FINAL:
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
