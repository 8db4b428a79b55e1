"""Submitting a task costs few queries: the registry is read from memory, and what was written is not read back."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest
from databases import Backend
from orchestrator_kit import OrchestratorHarness, Script, problem
from sqlalchemy import event
from sqlalchemy.engine import Engine

from octollm.arm import Context
from octollm.clock import SystemClock, Uuid7Generator
from octollm.context import current_context
from octollm.contracts.api import TaskView
from octollm.contracts.task import Budget, ExecuteResult, FileRef, Task, TaskContext
from octollm.events import EventLog
from octollm.storage import open_database
from octollm.storage.migrations import migrate
from octollm.tasks.changes import NewTask
from octollm.tasks.store import TaskStore


class TickingClock(SystemClock):
    """Every reading is a second later, so that two of them for one moment show."""

    def __init__(self) -> None:
        self._readings = 0

    def now(self) -> float:
        self._readings += 1
        return 1_790_000_000.0 + self._readings


CLOCK = TickingClock()
IDS = Uuid7Generator(CLOCK)
REQUEST = "req-" + "0" * 32
REGISTRY_TABLES = re.compile(r"\b(admissions|arm_instances|arm_keys|arms)\b")


@contextmanager
def statements_of(request_id: str) -> Iterator[list[str]]:
    """Collect the SQL statements that one request executes; the loops beside it have other contexts."""
    statements: list[str] = []

    def record(_conn: object, _cursor: object, statement: str, *_more: object) -> None:
        if current_context().request_id == request_id:
            statements.append(statement)

    event.listen(Engine, "before_cursor_execute", record)
    try:
        yield statements
    finally:
        event.remove(Engine, "before_cursor_execute", record)


async def hang(_task: Task, _ctx: Context) -> ExecuteResult:
    await asyncio.Event().wait()
    raise AssertionError


async def test_a_submission_reads_the_registry_from_memory(orch: OrchestratorHarness, script: Script) -> None:
    script.execute = hang
    body = {"goal": "do it", "assigned_arm": "coder", "context": {"files": [{"name": "a.txt", "text": "x"}]}}
    with statements_of(REQUEST) as statements:
        answer = await orch.send("POST", "/tasks", body, X_Request_ID=REQUEST)
    assert answer.status == 201, answer.body
    assert not [each for each in statements if REGISTRY_TABLES.search(each)]
    # The submitter's scopes, and the file to check its kind: nothing else is read, but for the log's state when the
    # event gets its position in this transaction.
    reads = [each for each in statements if each.lstrip().startswith("SELECT") and "FROM relay_state" not in each]
    assert len(reads) == 1, reads


async def test_an_unknown_arm_is_looked_for_once_more(orch: OrchestratorHarness) -> None:
    answer = await orch.send("POST", "/tasks", {"goal": "do it", "assigned_arm": "nobody"})
    assert (answer.status, problem(answer)["code"]) == (400, "arm_unknown")
    assert "coder" in problem(answer)["detail"]


CONTRACTS = [
    Task("do it"),
    Task(
        "read it",
        priority=3,
        budget=Budget(max_tokens=10, max_cost_usd=0.5, max_time_seconds=9.5, max_retries=2),
        context=TaskContext(files=(FileRef("a.txt", "0" * 64),)),
    ),
]


@pytest.mark.parametrize("contract", CONTRACTS, ids=["plain", "full"])
@pytest.mark.parametrize("traceparent", ["", f"00-{'a' * 32}-{'b' * 16}-01"])
async def test_a_created_task_is_returned_as_it_is_read(backend: Backend, contract: Task, traceparent: str) -> None:
    async with open_database(backend.url("octollm_orchestrator"), clock=CLOCK) as db:
        await migrate(db, "orchestrator")
        store = TaskStore(db, EventLog(db, CLOCK, IDS), CLOCK)
        new = NewTask(
            task_id="task-1",
            tenant="acme",
            sub="user-1",
            cred="key-1",
            authority="tasks:create",
            contract=contract,
            correlation_id="corr-1",
            traceparent=traceparent,
            deadline_at=CLOCK.now() + 60,
        )
        created = await store.create(new)
        read = await store.view("task-1", "acme")
        [accepted] = (await store.history("task-1", "acme", 0, 10)).events
    assert decoded(created) == decoded(read)
    assert (accepted.event_type, accepted.version, created.version) == ("task.accepted", 1, 1)


def decoded(view: TaskView) -> Any:
    return msgspec.json.decode(msgspec.json.encode(view))
