"""What the tests of several replicas share: three goals, and how they are given and waited for."""

from __future__ import annotations

import uuid
from typing import Any

from spread import Spread
from whole import FINAL, NOTES, SALES

from octollm.testing import wait_until

GOALS: list[tuple[str, dict[str, str]]] = [
    ("Write a Python function double(number) with tests", {}),
    ("How many rows have amount > 100, and their total?", {"sales.csv": SALES}),
    ("How often does it retry?", {"notes.md": NOTES}),
]


async def completed(spread: Spread, goal: str, files: dict[str, str], door: int = 0) -> dict[str, Any]:
    """Give a goal to a door that stays, and return its task once it has ended."""
    listed = [{"name": name, "text": text} for name, text in files.items()]
    async with spread.client(door) as client:
        body = {"goal": goal, "context": {"files": listed}}
        submitted = await client.post("/tasks", json=body, headers={"Idempotency-Key": uuid.uuid4().hex})
        assert submitted.status_code == 201, submitted.text
        found: dict[str, Any] = submitted.json()

        async def final() -> bool:
            found.update((await client.get(f"/tasks/{found['task_id']}")).json())
            return found["status"] in FINAL

        await wait_until(final, description=f"“{goal}” ends", timeout=90, interval=0.1)
    return found
