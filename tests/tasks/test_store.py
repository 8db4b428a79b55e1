"""The task store without HTTP: fencing of a former holder's writes, and isolation of tenants."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest

from octollm.clock import SystemClock, Uuid7Generator
from octollm.contracts.task import Plan, PlanStep, Task
from octollm.errors import OctoError
from octollm.events import EventLog
from octollm.storage import open_database
from octollm.storage.migrations import migrate
from octollm.tasks.store import NewTask, TaskStore

CLOCK = SystemClock()
IDS = Uuid7Generator(CLOCK)
TASK = f"task-{IDS.hex()}"
PLAN = Plan((PlanStep("s1", "Do it", "coder", "do it"),))


@pytest.fixture
async def store() -> AsyncGenerator[TaskStore]:
    async with open_database("memory://", clock=CLOCK) as db:
        await migrate(db, "orchestrator")
        opened = TaskStore(db, EventLog(db, CLOCK, IDS), CLOCK)
        await opened.create(NewTask(TASK, "acme", "ada", "c", "", Task("do it"), "corr", "", CLOCK.now() + 600))
        await opened.begin_planning(TASK, 0)
        await opened.set_plan(TASK, PLAN, 0, replan=False, reasons=())
        yield opened


async def begin(store: TaskStore, epoch: int) -> None:
    """Have the holder of ``epoch`` begin the first attempt of the step."""
    await store.change(
        TASK,
        "step.started",
        {"step": "s1", "title": "Do it", "arm": "coder", "attempt": 1, "run": epoch},
        epoch=0,
        step=("s1", {"status": "running", "attempt": 1, "run": epoch, "text": ""}),
    )


async def test_a_former_holders_text_does_not_overwrite_the_present_one(store: TaskStore) -> None:
    await begin(store, 2)
    await store.save_text(TASK, "s1", attempt=1, epoch=2, base=0, text="present")
    await store.save_text(TASK, "s1", attempt=1, epoch=1, base=0, text="former")
    [saved] = (await store.texts(TASK, "acme")).texts
    assert (saved.text, saved.run) == ("present", 2)
    await store.save_text(TASK, "s1", attempt=1, epoch=2, base=0, text="present, longer")
    [saved] = (await store.texts(TASK, "acme")).texts
    assert saved.text == "present, longer"


async def test_an_older_epoch_changes_nothing(store: TaskStore) -> None:
    before = await store.history(TASK, "acme", 0, 100)
    with pytest.raises(OctoError) as caught:
        await store.change(TASK, "task.started", {}, epoch=-1)
    assert caught.value.code == "fence_lost"
    assert await store.history(TASK, "acme", 0, 100) == before


async def test_another_tenant_finds_no_task(store: TaskStore) -> None:
    for read in (store.view(TASK, "other"), store.texts(TASK, "other"), store.history(TASK, "other", 0, 10)):
        with pytest.raises(OctoError) as caught:
            await read
        assert caught.value.code == "task_not_found"
