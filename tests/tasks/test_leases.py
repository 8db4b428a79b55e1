"""Task leases: claims, expiry and takeover, and the thread that renews them."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from task_kit import ManualClock, TaskKit

from octollm.clock import SystemClock, Uuid7Generator
from octollm.contracts.task import Task
from octollm.errors import OctoError
from octollm.events import EventLog
from octollm.storage import Database, Transaction, open_database
from octollm.storage.migrations import migrate
from octollm.tasks.changes import NewTask
from octollm.tasks.leases import (
    LEASE_SECONDS,
    RENEW_DEADLINE_SECONDS,
    RENEW_SECONDS,
    ExpiredLease,
    LeaseRenewer,
    TaskLeases,
)
from octollm.tasks.store import TaskStore
from octollm.testing import wait_until

NONE: frozenset[str] = frozenset()


async def test_one_of_two_workers_gets_a_task(kit: TaskKit) -> None:
    task_id = await kit.submit()
    assert await TaskLeases(kit.db, "a").acquire(exclude=NONE) == (task_id, 1)
    assert await TaskLeases(kit.db, "b").acquire(exclude=NONE) is None


async def test_claims_go_by_priority_then_age(kit: TaskKit) -> None:
    created: list[tuple[int, str]] = []
    for priority in (0, 5, 0, 5, -1):
        created.append((priority, await kit.submit(priority=priority)))
        kit.clock.advance(1)
    leases = TaskLeases(kit.db, "a")
    claims = [await leases.acquire(exclude=NONE) for _ in created]
    # The sort is stable: tasks of the same priority stay in the order of their creation.
    expected = [task_id for _, task_id in sorted(created, key=lambda each: -each[0])]
    assert [claim and claim[0] for claim in claims] == expected


async def test_excluded_tasks_are_not_claimed_again(kit: TaskKit) -> None:
    task_id = await kit.submit()
    leases = TaskLeases(kit.db, "a")
    await leases.acquire(exclude=NONE)
    kit.clock.advance(LEASE_SECONDS + 1)
    assert await leases.acquire(exclude=frozenset({task_id})) is None
    assert await leases.acquire(exclude=NONE) == (task_id, 2)


async def test_a_lease_can_be_taken_over_only_after_it_expired(kit: TaskKit) -> None:
    task_id = await kit.submit()
    first, second = TaskLeases(kit.db, "a"), TaskLeases(kit.db, "b")
    await first.acquire(exclude=NONE)
    kit.clock.advance(LEASE_SECONDS)
    assert await second.acquire(exclude=NONE) is None
    assert await first.renew({task_id: 1}) == {task_id}
    kit.clock.advance(LEASE_SECONDS + 0.001)
    assert await second.acquire(exclude=NONE) == (task_id, 2)
    assert await first.renew({task_id: 1}) == NONE
    # The release of the earlier holder does not end the lease of the present one.
    await first.release(task_id, 1)
    assert await first.acquire(exclude=NONE) is None


async def test_a_lease_of_a_dead_holder_does_not_outlive_a_clock_that_was_set_back(kit: TaskKit) -> None:
    task_id = await kit.submit()
    await TaskLeases(kit.db, "dead").acquire(exclude=NONE)
    kit.clock.advance(-3600)
    assert await TaskLeases(kit.db, "heir").acquire(exclude=NONE) == (task_id, 2)


async def test_only_a_takeover_of_an_expired_lease_is_reported(kit: TaskKit) -> None:
    reported: list[ExpiredLease] = []

    async def on_takeover(tx: Transaction, task: ExpiredLease) -> None:
        assert isinstance(tx, Transaction)
        reported.append(task)

    task_id = await kit.submit()
    leases = TaskLeases(kit.db, "a", on_takeover)
    await leases.acquire(exclude=NONE)
    await leases.release(task_id, 1)
    assert await leases.acquire(exclude=NONE) == (task_id, 2)
    assert reported == []
    kit.clock.advance(LEASE_SECONDS + 1)
    assert await leases.acquire(exclude=NONE) == (task_id, 3)
    assert reported == [ExpiredLease(task_id, "acme", 2)]


async def test_failed_takeover_hook_rolls_the_claim_back(kit: TaskKit) -> None:
    async def fail(_tx: Transaction, _task: ExpiredLease) -> None:
        raise OctoError("No revocation.", code="unavailable")

    task_id = await kit.submit()
    await TaskLeases(kit.db, "a").acquire(exclude=NONE)
    kit.clock.advance(LEASE_SECONDS + 1)
    with pytest.raises(OctoError):
        await TaskLeases(kit.db, "b", fail).acquire(exclude=NONE)
    assert (await kit.store.get(task_id)).epoch == 1


async def test_ended_tasks_are_neither_renewed_nor_claimed(kit: TaskKit) -> None:
    task_id = await kit.submit()
    leases = TaskLeases(kit.db, "a")
    await leases.acquire(exclude=NONE)
    await kit.store.change(task_id, "task.cancelled", {"status": "cancelled"}, new_status="cancelled")
    assert await leases.renew({task_id: 1}) == NONE
    kit.clock.advance(LEASE_SECONDS + 1)
    assert await leases.acquire(exclude=NONE) is None


class ScriptedLeases:
    """In the place of ``TaskLeases``: each renewal is a function of the leases that it is given."""

    def __init__(self, renew: Callable[[Mapping[str, int]], frozenset[str]]) -> None:
        self._renew = renew

    async def renew(self, held: Mapping[str, int]) -> frozenset[str]:
        return self._renew(held)


class Renewals:
    """A renewer without its thread: :meth:`renew` does one round."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.lost: list[str] = []
        self.renewer = LeaseRenewer(_no_connection, "a", self.clock, self.lost.append)

    async def renew(self, script: Callable[[Mapping[str, int]], frozenset[str]]) -> None:
        leases = cast("TaskLeases", ScriptedLeases(script))
        await self.renewer._renew(leases, lambda report: report())


@contextlib.asynccontextmanager
async def _no_connection() -> AsyncGenerator[Database]:
    raise OctoError("The database is away.", code="unavailable")
    yield


def _fail(_held: Mapping[str, int]) -> frozenset[str]:
    raise OctoError("The database is away.", code="unavailable")


async def test_a_lease_of_a_newer_claim_survives_the_loss_of_the_older_one() -> None:
    renewals = Renewals()
    renewals.renewer.add("t", 1)

    def claim_again(held: Mapping[str, int]) -> frozenset[str]:
        # While the statement runs, the event loop drops the task and claims it anew.
        renewals.renewer.remove("t", 1)
        renewals.renewer.add("t", 2)
        return NONE

    await renewals.renew(claim_again)
    assert renewals.lost == []
    await renewals.renew(lambda held: frozenset(held) if held == {"t": 2} else NONE)
    assert renewals.lost == []


async def test_removing_an_older_claim_leaves_the_newer_one() -> None:
    renewals = Renewals()
    renewals.renewer.add("t", 2)
    renewals.renewer.remove("t", 1)
    seen: list[dict[str, int]] = []
    await renewals.renew(lambda held: seen.append(dict(held)) or frozenset(held))
    assert seen == [{"t": 2}]


async def test_a_slow_renewal_counts_from_its_start() -> None:
    renewals = Renewals()
    renewals.renewer.add("t", 1)

    def slow(held: Mapping[str, int]) -> frozenset[str]:
        renewals.clock.advance(1.0)
        return frozenset(held)

    await renewals.renew(slow)
    renewals.clock.advance(RENEW_DEADLINE_SECONDS - 1.0)
    await renewals.renew(_fail)
    assert renewals.lost == ["t"]
    assert renewals.renewer.failure == "The database is away."


STEPS = st.lists(st.tuples(st.booleans(), st.floats(0, 1, allow_nan=False)), max_size=12)


@given(steps=STEPS)
@settings(max_examples=100)
def test_a_task_is_reported_lost_once_the_last_renewal_is_too_old(steps: list[tuple[bool, float]]) -> None:
    async def check() -> None:
        renewals = Renewals()
        renewals.renewer.add("t", 1)
        renewed_at, is_lost = renewals.clock.now(), False
        for succeeds, seconds in steps:
            renewals.clock.advance(seconds)
            await renewals.renew(frozenset if succeeds else _fail)
            if is_lost:
                continue
            if succeeds:
                renewed_at = renewals.clock.now()
            is_lost = not succeeds and renewals.clock.now() - renewed_at >= RENEW_DEADLINE_SECONDS
        assert renewals.lost == (["t"] if is_lost else [])

    asyncio.run(check())


def test_a_holder_gives_up_before_its_lease_can_be_taken() -> None:
    assert RENEW_DEADLINE_SECONDS + RENEW_SECONDS <= LEASE_SECONDS


async def test_the_renewal_thread_reports_leases_that_it_cannot_renew() -> None:
    clock = ManualClock()
    lost: list[str] = []
    renewer = LeaseRenewer(_no_connection, "a", clock, lost.append)
    async with renewer.run(lambda error: pytest.fail(str(error))):
        renewer.add("task-1", 1)
        clock.advance(RENEW_DEADLINE_SECONDS)
        await wait_until(lambda: lost == ["task-1"], description="the loss is reported")
        assert renewer.failure == "The database is away."


async def test_a_connection_attempt_that_lasts_longer_than_a_lease_reports_its_loss() -> None:
    accepts = threading.Event()

    @contextlib.asynccontextmanager
    async def slow() -> AsyncGenerator[Database]:
        await wait_until(accepts.is_set, description="the database accepts", timeout=30)
        raise OctoError("The database is away.", code="unavailable")
        yield

    clock = ManualClock()
    lost: list[str] = []
    renewer = LeaseRenewer(slow, "a", clock, lost.append)
    async with renewer.run(lambda error: pytest.fail(str(error))):
        renewer.add("task-1", 1)
        clock.advance(RENEW_DEADLINE_SECONDS)
        await wait_until(lambda: lost == ["task-1"], description="the loss is reported")
        assert "does not accept" in renewer.failure
        accepts.set()


async def test_an_exception_that_ends_the_renewal_thread_is_reported() -> None:
    @contextlib.asynccontextmanager
    async def broken() -> AsyncGenerator[Database]:
        raise ZeroDivisionError
        yield

    failures: list[BaseException] = []
    lost: list[str] = []
    renewer = LeaseRenewer(broken, "a", SystemClock(), lost.append)
    renewer.add("task-1", 1)
    async with renewer.run(failures.append):
        await wait_until(lambda: bool(failures and lost), description="the failure is reported")
    assert isinstance(failures[0], ZeroDivisionError)
    assert lost == ["task-1"], "its work stops, since nothing renews its lease"
    assert "ZeroDivisionError" in renewer.failure


async def test_a_blocked_event_loop_loses_no_lease(tmp_path: Path) -> None:
    """The real thread over a real connection and clock, while the loop gets no turn for longer than a lease."""
    clock, url = SystemClock(), f"sqlite:///{tmp_path / 'orchestrator.db'}"
    async with open_database(url, clock=clock) as db:
        await migrate(db, "orchestrator")
        store = TaskStore(db, EventLog(db, clock, Uuid7Generator(clock)), clock)
        await store.create(NewTask("task-1", "acme", "ada", "c", "", Task("do it"), "corr", "", None))
        lost: list[str] = []
        renewer = LeaseRenewer(partial(open_database, url, clock=clock), "a", clock, lost.append)
        async with renewer.run(lambda error: pytest.fail(str(error))):
            claim = await TaskLeases(db, "a").acquire(exclude=NONE)
            assert claim == ("task-1", 1)
            renewer.add(*claim)
            end = time.monotonic() + LEASE_SECONDS + 0.5
            while time.monotonic() < end:
                sum(range(1000))
            assert await TaskLeases(db, "b").acquire(exclude=NONE) is None
        assert lost == []
