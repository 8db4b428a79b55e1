"""A model that holds what it writes until it is let go, and waiting for a task's end through any trouble."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
from whole import FINAL, answers

from octollm.testing import wait_until
from octollm.testing.fake_model import ScriptedReply, ScriptedRequest


class HoldingMind:
    """Writes code, and holds all but the first piece of it until ``go`` is set; ``writing`` says that it is at it."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.writing = asyncio.Event()

    def __call__(self, asked: ScriptedRequest) -> str | ScriptedReply:
        found = answers(asked)
        if asked.schema is None and "test cases" not in asked.system and "Python" in asked.system:
            assert isinstance(found, str)
            self.writing.set()
            return ScriptedReply(found, release=self.go)
        return found

    def hold(self) -> None:
        """Hold the next code."""
        self.go.clear()
        self.writing.clear()


async def ended(client: httpx.AsyncClient, task_id: str, seconds: float = 60) -> dict[str, Any]:
    """Return the task once it has ended, whatever the door does meanwhile."""
    found: dict[str, Any] = {}

    async def final() -> bool:
        try:
            answer = await client.get(f"/tasks/{task_id}")
        except httpx.HTTPError:
            return False
        found.update(answer.json() if answer.status_code == 200 else {})
        return found.get("status") in FINAL

    await wait_until(final, description=f"{task_id} ends", timeout=seconds, interval=0.1)
    return found
