"""Leases are renewed beside a busy loop, lost to a newer run, and let go when the database stays away."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import select, update

from octollm.clock import SystemClock, Uuid7Generator
from octollm.contracts.task import Task
from octollm.errors import OctoError
from octollm.events import EventLog
from octollm.storage import Database, Transaction, open_database
from octollm.storage.migrations import migrate
from octollm.storage.tables import tasks
from octollm.tasks import leases
from octollm.tasks.leases import LEASE_SECONDS, ExpiredLease, LeaseRenewer, TaskLeases
from octollm.tasks.store import NewTask, TaskStore
from octollm.testing import wait_until

CLOCK = SystemClock()
IDS = Uuid7Generator(CLOCK)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'orchestrator.db'}"


@pytest.fixture
async def db(url: str) -> AsyncGenerator[Database]:
    async with open_database(url, clock=CLOCK) as database:
        await migrate(database, "orchestrator")
        yield database


async def accepted(db: Database) -> str:
    store = TaskStore(db, EventLog(db, CLOCK, IDS), CLOCK)
    task_id = f"task-{IDS.hex()}"
    await store.create(NewTask(task_id, "t", "s", "c", "", Task("do it"), "corr", "", CLOCK.now() + 600, "task"))
    return task_id


async def expire_lease(db: Database, task_id: str) -> None:
    async with db.transaction() as tx:
        await tx.execute(update(tasks).where(tasks.c.task_id == task_id).values(lease_until=await tx.now() - 0.001))


async def test_of_two_holders_one_gets_a_task(db: Database):
    task_id = await accepted(db)
    first, second = TaskLeases(db, "a"), TaskLeases(db, "b")
    assert await first.acquire(exclude=frozenset()) == (task_id, 1)
    assert await second.acquire(exclude=frozenset()) is None


async def test_a_take_over_is_told_with_what_the_last_holder_had_and_nothing_else_is(db: Database):
    told: list[ExpiredLease] = []

    async def taken_over(tx: Transaction, task: ExpiredLease) -> None:
        assert isinstance(tx, Transaction)
        told.append(task)

    task_id = await accepted(db)
    first, second = TaskLeases(db, "a", taken_over), TaskLeases(db, "b", taken_over)
    assert await first.acquire(exclude=frozenset()) == (task_id, 1)
    assert told == [], "nobody had it before"
    await first.release(task_id, 1)
    assert await second.acquire(exclude=frozenset()) == (task_id, 2)
    assert told == [], "it was given back"
    assert await first.acquire(exclude=frozenset()) is None
    await expire_lease(db, task_id)
    assert await first.acquire(exclude=frozenset()) == (task_id, 3)
    assert told == [ExpiredLease(task_id, "t", 2)]


async def test_a_holder_that_says_nothing_loses_its_task(db: Database):
    task_id = await accepted(db)
    assert await TaskLeases(db, "a").acquire(exclude=frozenset()) == (task_id, 1)
    async with db.read() as connection:
        until = await connection.scalar(select(tasks.c.lease_until).where(tasks.c.task_id == task_id))
        now = await connection.now()
    assert now < until <= now + LEASE_SECONDS
    await expire_lease(db, task_id)
    assert await TaskLeases(db, "b").acquire(exclude=frozenset()) == (task_id, 2)
    # The older run is not renewed any more.
    assert await TaskLeases(db, "a").renew({task_id: 1}) == frozenset()


async def test_a_busy_loop_is_no_death(db: Database, url: str):
    task_id = await accepted(db)
    assert await TaskLeases(db, "a").acquire(exclude=frozenset()) == (task_id, 1)
    lost: list[str] = []
    held = LeaseRenewer(partial(open_database, url, clock=CLOCK), "a", CLOCK, lost.append)
    async with held.run(lambda error: pytest.fail(str(error))):
        held.add(task_id, 1)
        end = time.monotonic() + LEASE_SECONDS + 0.5
        while time.monotonic() < end:
            sum(range(1000))  # the loop gets no turn
        assert await TaskLeases(db, "b").acquire(exclude=frozenset()) is None
    assert lost == []


async def test_a_task_that_was_taken_over_or_ended_is_told(db: Database, url: str):
    task_id = await accepted(db)
    await TaskLeases(db, "a").acquire(exclude=frozenset())
    lost: list[str] = []
    held = LeaseRenewer(partial(open_database, url, clock=CLOCK), "a", CLOCK, lost.append)
    async with held.run(lambda error: pytest.fail(str(error))):
        held.add(task_id, 0)  # an older run than the one that holds it
        await wait_until(lambda: lost == [task_id], description="the loss is told", timeout=5)


async def test_a_holder_that_cannot_renew_stops_before_its_lease_ends(monkeypatch: pytest.MonkeyPatch):
    @contextlib.asynccontextmanager
    async def away() -> AsyncGenerator[Database]:
        raise OctoError("The database is away.", code="unavailable")
        yield

    lost: list[tuple[str, float]] = []
    began = CLOCK.monotonic()
    held = LeaseRenewer(away, "a", CLOCK, lambda task_id: lost.append((task_id, CLOCK.monotonic() - began)))
    async with held.run(lambda error: pytest.fail(str(error))):
        held.add("task-1", 1)
        await wait_until(lambda: bool(lost), description="the task is let go", timeout=10)
        assert held.failure == "The database is away."
    ((task_id, after),) = lost
    assert task_id == "task-1"
    assert after >= leases.RENEW_DEADLINE_SECONDS
    assert leases.RENEW_DEADLINE_SECONDS + leases.RENEW_SECONDS <= LEASE_SECONDS


async def test_what_the_thread_dies_of_is_told():
    @contextlib.asynccontextmanager
    async def broken() -> AsyncGenerator[Database]:
        raise ZeroDivisionError
        yield

    failures: list[BaseException] = []
    async with LeaseRenewer(broken, "a", CLOCK, print).run(failures.append):
        await wait_until(lambda: bool(failures), description="the failure is told")
    assert isinstance(failures[0], ZeroDivisionError)
    await asyncio.sleep(0)
