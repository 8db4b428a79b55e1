"""Changes in batches: each is decided as if it were written alone, on both databases."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import get_args

import msgspec
import pytest
from databases import Backend
from hypothesis import given
from hypothesis import strategies as st
from task_kit import plan_step

from octollm.clock import SystemClock, Uuid7Generator
from octollm.contracts.task import Plan, Task, TaskStatus
from octollm.errors import OctoError
from octollm.events import EventLog
from octollm.storage import open_database
from octollm.storage.migrations import migrate
from octollm.tasks.changes import (
    Applied,
    NewTask,
    PendingChanges,
    TaskChange,
    TaskState,
    decide,
    plan_change,
    planning_change,
)
from octollm.tasks.leases import TaskLeases
from octollm.tasks.records import TaskRecord
from octollm.tasks.scheduling import SharePolicy, places_of
from octollm.tasks.state import TASK_TRANSITIONS, is_final
from octollm.tasks.store import TaskStore

CLOCK = SystemClock()
IDS = Uuid7Generator(CLOCK)
STATUSES: tuple[TaskStatus, ...] = get_args(TaskStatus)


@given(
    st.sampled_from(STATUSES),
    st.integers(0, 3),
    st.one_of(st.none(), st.integers(0, 3)),
    st.lists(st.sampled_from(STATUSES), max_size=3),
    st.floats(0, 100),
    st.one_of(st.none(), st.floats(0, 100)),
)
@pytest.mark.unit
def test_a_change_holds_the_fence_and_the_state_machine(
    status: TaskStatus, epoch: int, held: int | None, path: list[TaskStatus], before: float, progress: float | None
) -> None:
    state = TaskState("acme", epoch, status, before, None, "", "")
    change = TaskChange("task-1", (), held, tuple(path), progress)
    try:
        after = decide(state, change)
    except OctoError as error:
        if held is not None and held != epoch:
            assert error.code == "fence_lost"
        else:
            assert error.code == "state_conflict"
            legal = [
                following in TASK_TRANSITIONS[each] for each, following in zip((status, *path), path, strict=False)
            ]
            assert is_final(status) or not all(legal)
        return
    assert held in (None, epoch)
    assert after.status == (path[-1] if path else status)
    assert after.progress == max(before, progress or 0.0)


@contextlib.asynccontextmanager
async def opened(
    backend: Backend,
    shares: SharePolicy = SharePolicy(),  # noqa: B008  frozen
) -> AsyncGenerator[tuple[TaskStore, TaskLeases]]:
    async with open_database(backend.url("tasks"), clock=CLOCK) as db:
        await migrate(db, "orchestrator")
        yield TaskStore(db, EventLog(db, CLOCK, IDS), CLOCK), TaskLeases(db, "w1", shares=shares)


def new(tenant: str = "acme", *, priority: int = 0) -> NewTask:
    task = Task("do it", priority=priority)
    return NewTask(f"task-{IDS.hex()}", tenant, "ada", "key-1", "", task, "corr", "", CLOCK.now() + 600)


async def claim(leases: TaskLeases, places: int) -> list[TaskRecord]:
    """Claim up to as many tasks of each generation."""
    return [task for task, _ in await leases.claim(places_of(places, places))]


async def test_a_whole_task_in_batches(backend: Backend) -> None:
    async with opened(backend) as (store, leases):
        created = [new() for _ in range(5)]
        await asyncio.gather(*(store.create(each) for each in created))
        records = await claim(leases, 10)
        assert {record.task_id for record in records} == {each.task_id for each in created}
        assert {record.epoch for record in records} == {1}
        assert all(record.contract == created[0].contract for record in records)
        plan = Plan((plan_step("a"), plan_step("b", "a")))

        async def run(task_id: str) -> None:
            changes = PendingChanges(store.apply)
            changes.defer(planning_change(task_id, 1))
            changes.defer(plan_change(task_id, plan, 1, replan=False, reasons=()))
            for step in plan.steps:
                data = {"step": step.id, "title": step.title, "arm": step.arm, "attempt": 1, "run": 1}
                values = {"status": "running", "attempt": 1, "run": 1}
                await changes.apply(TaskChange(task_id, (("step.started", data),), 1, steps=((step.id, values),)))
                done = {"step": step.id, "attempt": 1, "output": "", "artifacts": [], "usage": {}, "text_length": 0}
                changes.defer(
                    TaskChange(task_id, (("step.completed", done),), 1, steps=((step.id, {"status": "completed"}),))
                )
            ended = {"status": "completed", "duration_ms": 1, "output": "", "artifacts": [], "usage": {}}
            assert await changes.apply(
                TaskChange(task_id, (("task.completed", ended),), 1, ("completed",), 100.0, {"output": "done"})
            )

        await asyncio.gather(*(run(each.task_id) for each in created))
        for each in created:
            view = await store.view(each.task_id, "acme")
            assert (view.status, view.output, view.progress, view.version) == ("completed", "done", 100.0, 8)
            assert [step.status for step in view.steps] == ["completed", "completed"]
            history = await store.history(each.task_id, "acme", 0, 100)
            assert [event.version for event in history.events] == list(range(1, 9))
            assert history.events[1].event_type == "task.planned"
        assert await claim(leases, 10) == []


async def test_one_refused_change_leaves_the_others_of_its_batch(backend: Backend) -> None:
    async with opened(backend) as (store, _):
        created = [new() for _ in range(4)]
        await asyncio.gather(*(store.create(each) for each in created))
        good, fenced, ended, wrong = (each.task_id for each in created)
        await store.change(ended, "task.cancelled", {"status": "cancelled"}, new_status="cancelled")
        progress = (("task.progress", {}),)
        found = await asyncio.gather(
            store.apply(TaskChange(good, progress, 0, progress=7.0)),
            store.apply(TaskChange(fenced, progress, 9)),
            store.apply(TaskChange(ended, progress, 0)),
            # The database refuses it: a status of more than 16 characters on PostgreSQL, no column on either.
            store.apply(TaskChange(wrong, progress, 0, columns={"no_such_column": 1})),
            store.apply(TaskChange("task-none", progress, 0)),
            return_exceptions=True,
        )
        assert found[0] == Applied(7.0)
        codes = [error.code for error in found[1:] if isinstance(error, OctoError)]
        assert codes == ["fence_lost", "state_conflict", "internal", "task_not_found"]
        assert (await store.view(good, "acme")).progress == 7.0


async def test_none_of_the_changes_of_an_item_is_written_when_one_may_not_be(backend: Backend) -> None:
    async with opened(backend) as (store, _):
        created = new()
        await store.create(created)
        with pytest.raises(OctoError) as caught:
            await store.apply(
                TaskChange(created.task_id, (("task.progress", {}),), 0, progress=50.0),
                TaskChange(created.task_id, (("task.progress", {}),), 0, ("completed",)),
            )
        assert caught.value.code == "state_conflict"
        view = await store.view(created.task_id, "acme")
        assert (view.progress, view.version) == (0.0, 1)


async def test_tenants_take_turns_and_priority_counts_within_one(backend: Backend) -> None:
    async with opened(backend) as (store, leases):
        flood = [new("flood", priority=100) for _ in range(6)]
        small = [new("small", priority=-100), new("small", priority=5)]
        for each in (*flood, *small):
            await store.create(each)
        claimed = await claim(leases, 4)
        assert [record.tenant for record in claimed] == ["flood", "small", "flood", "small"]
        assert [record.task_id for record in claimed if record.tenant == "small"] == [
            small[1].task_id,
            small[0].task_id,
        ]


async def test_two_workers_never_claim_one_task(backend: Backend) -> None:
    async with opened(backend) as (store, leases):
        await asyncio.gather(*(store.create(new(f"tenant-{number % 3}")) for number in range(30)))
        batches = await asyncio.gather(*(claim(leases, 5) for _ in range(8)))
        ids = [record.task_id for batch in batches for record in batch]
        assert len(ids) == len(set(ids))
        while more := await claim(leases, 7):
            ids += [record.task_id for record in more]
        assert len(ids) == len(set(ids)) == 30


async def test_limits_of_concurrency_hold_between_workers(backend: Backend) -> None:
    """Workers that claim at the same moment do not each find the last place."""
    async with opened(backend, SharePolicy(max_per_tenant=3, max_per_key=2)) as (store, leases):
        await asyncio.gather(*(store.create(new()) for _ in range(12)))
        batches = await asyncio.gather(*(claim(leases, 1) for _ in range(8)))
        assert sum(map(len, batches)) == 2
        await asyncio.gather(*(store.create(replace(new(), cred="key-2")) for _ in range(4)))
        batches = await asyncio.gather(*(claim(leases, 2) for _ in range(4)))
        (only,) = (record for batch in batches for record in batch)
        assert only.cred == "key-2"
        await leases.release(only.task_id, only.epoch)
        assert len(await claim(leases, 5)) == 1


async def test_a_subtask_runs_beside_a_full_tenant(backend: Backend) -> None:
    async with opened(backend, SharePolicy(max_per_tenant=1, max_per_key=1)) as (store, leases):
        parent, other = new(), new()
        await store.create(parent)
        (held,) = await claim(leases, 5)
        await store.create(other)
        part = new()
        contract = msgspec.structs.replace(part.contract, parent_task_id=parent.task_id)
        part = replace(part, contract=contract, ancestors=(parent.task_id,))
        await store.create(part)
        assert [each.task_id for each in await claim(leases, 5)] == [part.task_id]
        # It takes no place either: a released parent gets its own again.
        await leases.release(held.task_id, held.epoch)
        (again,) = await claim(leases, 5)
        assert again.task_id == parent.task_id
