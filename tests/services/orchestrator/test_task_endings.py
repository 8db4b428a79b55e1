"""Tasks that end from outside their worker: cancelled ones are counted, ad-hoc ones end when their token expires."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, cast

import msgspec
import pytest
from databases import Backend
from hypothesis import given, settings
from hypothesis import strategies as st
from orchestrator_kit import OrchestratorHarness
from sqlalchemy import select, update

from octollm.arm import Context
from octollm.clock import Uuid7Generator
from octollm.contracts.task import Budget, ExecuteResult, Task, Usage
from octollm.errors import OctoError
from octollm.events import EventLog, task_subject
from octollm.services.orchestrator.task_endings import ORPHAN_SECONDS, ApprovalDecisions, TaskExpiry
from octollm.storage import Database, open_database
from octollm.storage.migrations import migrate
from octollm.storage.tables import budgets, reservations, tasks
from octollm.tasks.approvals import ApprovalStore
from octollm.tasks.changes import NewTask
from octollm.tasks.clock_guard import ClockGuard
from octollm.tasks.ledger import BudgetLedger, ReservationRequest
from octollm.tasks.store import TaskStore
from octollm.telemetry import Metrics
from octollm.testing import ManualClock, wait_until

START = 1_800_000_000.0
LIFETIME = 60.0


class Replica:
    """What one orchestrator needs to end ad-hoc tasks, over a database that others share."""

    def __init__(self, db: Database, clock: ManualClock) -> None:
        self.db, self.clock = db, clock
        self.ids = Uuid7Generator(clock)
        self.log = EventLog(db, clock, self.ids)
        self.store = TaskStore(db, self.log, clock)
        self.ledger = BudgetLedger(db, clock, self.ids)
        self.metrics = Metrics("orchestrator")
        approvals = ApprovalStore(db, self.store, clock, default_seconds=86_400.0)
        # No task of these tests waits for an approval, so nothing stops a worker.
        decisions = ApprovalDecisions(approvals, cast("Any", None), cast("Any", None), clock, self.metrics)
        self.expiry = TaskExpiry(self.store, self.ledger, decisions, clock, self.metrics, ClockGuard(db))

    async def add(self, task_id: str, *, kind: str = "adhoc", lifetime: float = LIFETIME) -> None:
        await self.store.create(
            NewTask(
                task_id=task_id,
                tenant="acme",
                sub="user-1",
                cred="key-1",
                authority="models:chat",
                contract=Task("token for coder:execute", budget=Budget(max_tokens=1000)),
                correlation_id="corr-1",
                traceparent="",
                deadline_at=self.clock.now() + lifetime,
                kind=kind,
            )
        )

    async def reserve(self, task_id: str, key: str, completion: int = 100) -> str:
        request = ReservationRequest("acme", task_id, "", 0, None, key, "tiny", 20, completion)
        return (await self.ledger.reserve(request)).id

    async def row(self, task_id: str) -> Any:
        async with self.db.read() as conn:
            return await conn.first(select(tasks).where(tasks.c.task_id == task_id))

    async def budget(self, task_id: str) -> tuple[int, int]:
        """Return the reserved and the used tokens."""
        async with self.db.read() as conn:
            row = await conn.first(select(budgets).where(budgets.c.task_id == task_id))
        assert row is not None
        return row["reserved_tokens"], row["used_tokens"]

    async def events(self, task_id: str) -> list[Any]:
        return await self.log.read_subject(task_subject(task_id), tenant="acme")

    def counted(self, status: str) -> float:
        return self.metrics.tasks.labels(status)._value.get()


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(START)


@pytest.fixture
async def replica(backend: Backend, clock: ManualClock) -> AsyncGenerator[Replica]:
    async with open_database(backend.url("octollm_orchestrator"), clock=clock) as db:
        await migrate(db, "orchestrator")
        yield Replica(db, clock)


async def test_an_adhoc_task_ends_at_the_expiry_of_its_token_with_its_event(replica: Replica) -> None:
    await replica.add("adhoc-1")
    replica.clock.time += LIFETIME - 0.001
    assert await replica.expiry.sweep() == 0
    assert (await replica.row("adhoc-1"))["status"] == "running"
    replica.clock.time = START + LIFETIME
    assert await replica.expiry.sweep() == 1
    row = await replica.row("adhoc-1")
    assert (row["status"], row["finished_at"], row["progress"]) == ("completed", START + LIFETIME, 100.0)
    [event] = await replica.events("adhoc-1")
    assert (event.event_type, event.version) == ("task.completed", 1)
    assert event.data == {
        "task_id": "adhoc-1",
        "status": "completed",
        "duration_ms": 60_000,
        "reason": "The token that the task stood for has expired.",
        "progress": 100.0,
    }
    assert replica.counted("completed") == 1


async def test_it_ends_once_however_many_replicas_sweep(replica: Replica) -> None:
    other = Replica(replica.db, replica.clock)
    for number in range(5):
        await replica.add(f"adhoc-{number}")
    replica.clock.time += LIFETIME
    ended = await asyncio.gather(*(each.expiry.sweep() for each in (replica, other, replica, other)))
    assert sum(ended) == 5
    assert replica.counted("completed") + other.counted("completed") == 5
    for number in range(5):
        assert len(await replica.events(f"adhoc-{number}")) == 1
    assert await replica.expiry.sweep() == 0


async def test_open_reservations_settle_at_their_bound(replica: Replica) -> None:
    await replica.add("adhoc-1")
    settled, unsettled = await replica.reserve("adhoc-1", "a"), await replica.reserve("adhoc-1", "b")
    await replica.ledger.settle(settled, Usage(20, 5), None)
    assert await replica.budget("adhoc-1") == (120, 25)
    replica.clock.time += LIFETIME
    await replica.expiry.sweep()
    assert await replica.budget("adhoc-1") == (0, 145)
    async with replica.db.read() as conn:
        states = {row["state"] for row in await conn.all(select(reservations))}
    assert states == {"settled"}
    # The answer of a call that was in flight comes too late to change anything.
    await replica.ledger.settle(unsettled, Usage(20, 1), None)
    assert await replica.budget("adhoc-1") == (0, 145)
    with pytest.raises(OctoError) as caught:
        await replica.reserve("adhoc-1", "c")
    assert caught.value.code == "state_conflict"


async def test_an_orphaned_reservation_of_an_ended_task_settles_at_its_bound(replica: Replica) -> None:
    for name in ("task-ended", "task-running"):
        await replica.add(name, kind="task", lifetime=3600)
    settled, orphaned = await replica.reserve("task-ended", "a"), await replica.reserve("task-ended", "b")
    await replica.reserve("task-running", "c")
    await replica.ledger.settle(settled, Usage(20, 5), None)
    failure = {"status": "failed", "code": "internal", "reason": "The process died."}
    await replica.store.change(
        "task-ended", "task.failed", failure, new_status="failed", finished_at=replica.clock.now()
    )
    # A call that the end cut off still settles what it used.
    assert await replica.expiry.settle_orphans() == 0
    assert await replica.budget("task-ended") == (120, 25)
    replica.clock.time += ORPHAN_SECONDS
    other = Replica(replica.db, replica.clock)
    await asyncio.gather(replica.expiry.settle_orphans(), other.expiry.settle_orphans())
    assert await replica.budget("task-ended") == (0, 145)
    assert await replica.budget("task-running") == (120, 0)
    assert await replica.expiry.settle_orphans() == 0
    await replica.ledger.settle(orphaned, Usage(20, 1), None)
    assert await replica.budget("task-ended") == (0, 145)


async def test_a_submitted_task_is_left_to_its_worker(replica: Replica) -> None:
    await replica.add("task-1", kind="task")
    await replica.add("adhoc-long", lifetime=2 * LIFETIME)
    async with replica.db.transaction() as tx:
        await tx.execute(update(tasks).where(tasks.c.task_id == "task-1").values(status="running"))
    replica.clock.time += LIFETIME
    assert await replica.expiry.sweep() == 0
    assert [(await replica.row(name))["status"] for name in ("task-1", "adhoc-long")] == ["running", "running"]


@settings(max_examples=15)
@given(st.lists(st.tuples(st.booleans(), st.integers(16, 900)), max_size=6))
def test_every_reserved_token_is_used_once_the_task_has_ended(calls: list[tuple[bool, int]]) -> None:
    asyncio.run(reserve_and_expire(calls))


async def reserve_and_expire(calls: list[tuple[bool, int]]) -> None:
    clock = ManualClock(START)
    async with open_database("memory://", clock=clock) as db:
        await migrate(db, "orchestrator")
        replica = Replica(db, clock)
        await replica.add("adhoc-1")
        for number, (settle, completion) in enumerate(calls):
            try:
                reservation = await replica.reserve("adhoc-1", f"call-{number}", completion)
            except OctoError as error:
                assert error.code == "budget_exhausted"
                continue
            if settle:
                await replica.ledger.settle(reservation, Usage(20, 1), None)
        reserved, used = await replica.budget("adhoc-1")
        clock.time += LIFETIME
        assert await replica.expiry.sweep() == 1
        assert await replica.budget("adhoc-1") == (0, used + reserved)
        assert used + reserved <= 1000


async def test_the_orchestrator_ends_the_task_of_a_minted_token(orch: OrchestratorHarness) -> None:
    body = {"aud": "coder", "scope": "coder:execute", "lifetime_seconds": 1}
    answer = await orch.send("POST", "/tokens", body)
    task_id = msgspec.json.decode(answer.body)["task_id"]

    async def has_ended() -> bool:
        page = msgspec.json.decode((await orch.send("GET", "/events?limit=500")).body)
        return any(e["subject"] == f"task/{task_id}" and e["event_type"] == "task.completed" for e in page["events"])

    await wait_until(has_ended, timeout=30, description="the task of the expired token has ended")
    assert 'octollm_tasks_total{status="completed"} 1.0' in await scrape(orch)


async def test_a_cancelled_task_is_counted(orch: OrchestratorHarness) -> None:
    started = asyncio.Event()

    async def hang(_task: Task, _ctx: Context) -> ExecuteResult:
        started.set()
        await asyncio.Event().wait()
        raise AssertionError

    orch.script.execute = hang
    task = await orch.submit({"goal": "wait"})
    async with asyncio.timeout(20):
        await started.wait()
    assert 'status="cancelled"' not in await scrape(orch)
    assert (await orch.send("POST", f"/tasks/{task.task_id}/cancel")).status == 200
    assert (await orch.send("POST", f"/tasks/{task.task_id}/cancel")).status == 409
    assert 'octollm_tasks_total{status="cancelled"} 1.0' in await scrape(orch)


async def scrape(orch: OrchestratorHarness) -> str:
    return (await orch.harness.send("orchestrator", "GET", "/metrics")).body.decode()
