"""Retention in a running installation: a deleted task leaves nothing behind, in the memory either."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from gateway_client import GatewayClient

from octollm.services.orchestrator import retention
from octollm.testing import wait_until

pytestmark = pytest.mark.sandbox


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    monkeypatch.setattr(retention, "ROUND_SECONDS", 0.2)
    return {
        "OCTOLLM_TASK_RETENTION_DAYS": "30",
        "OCTOLLM_AUDIT_RETENTION_DAYS": "30",
        "OCTOLLM_ARCHIVE_URL": f"file://{tmp_path}/archive",
    }


def let_it_be_long_ago(database: Path, task_id: str) -> None:
    with contextlib.closing(sqlite3.connect(database, timeout=30, isolation_level=None)) as db:
        db.execute("UPDATE tasks SET finished_at = 1.0 WHERE task_id = ?", (task_id,))


async def test_what_a_deleted_task_left_in_the_memory_is_erased(gateway: GatewayClient, tmp_path: Path) -> None:
    notes = {"notes.txt": "The office opens at nine. The canteen closes at three."}
    task = await gateway.run("When does the canteen close?", notes)
    kept = await gateway.client.put("/memory/facts/kept", json={"value": 1})
    assert kept.status_code == 201, kept.text
    documents = (await gateway.client.get("/memory/documents")).json()["documents"]
    assert [each["name"] for each in documents] == ["notes.txt"]
    database = tmp_path / "home/data/orchestrator.db"
    # In a thread: the orchestrator in this event loop may be in the middle of a transaction, which it has to end.
    await asyncio.to_thread(let_it_be_long_ago, database, task["task_id"])

    async def erased() -> bool:
        return (await gateway.client.get("/memory/documents")).json()["documents"] == []

    await wait_until(erased, description="the document of the task is erased", timeout=30)
    assert (await gateway.client.get(f"/tasks/{task['task_id']}")).status_code == 404
    archived = json.loads((tmp_path / f"archive/tasks/local/{task['task_id']}.json").read_text())
    assert archived["task"]["goal"] == "When does the canteen close?"
    facts: list[dict[str, Any]] = (await gateway.client.get("/memory/facts")).json()["facts"]
    assert [fact["name"] for fact in facts] == ["kept"]

    async def recorded() -> list[str]:
        rows = (await gateway.client.get("/audit?limit=500")).json()["rows"]
        return [row["target"] for row in rows if row["action"] == "memory.erased" and row["sub"] == "orchestrator"]

    await wait_until(recorded, description="the erasure is in the audit log", timeout=20)
    assert await recorded() == [f"task {task['task_id']}"]
