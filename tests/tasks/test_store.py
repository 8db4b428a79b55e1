"""The task store without HTTP: fencing, transactions, replanning, pages, and isolation of tenants."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from task_kit import TaskKit, open_task_database, open_task_kit, plan_step

from octollm.clock import SystemClock, Uuid7Generator, format_rfc3339
from octollm.contracts.api import UsageBy
from octollm.contracts.task import Budget, ExecuteResult, Plan, PlanStep, Task, Usage
from octollm.errors import OctoError
from octollm.events import EventLog
from octollm.storage import Transaction
from octollm.tasks.changes import NewTask
from octollm.tasks.ledger import BudgetLedger, ReservationRequest, UsageReader
from octollm.tasks.store import TaskStore

CLOCK = SystemClock()
IDS = Uuid7Generator(CLOCK)
TASK = f"task-{IDS.hex()}"
PLAN = Plan((PlanStep("s1", "Do it", "coder", "do it"),))


@pytest.fixture
async def store() -> AsyncGenerator[TaskStore]:
    async with open_task_database(CLOCK) as db:
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


async def test_progress_never_falls_in_whatever_order_reports_are_committed(kit: TaskKit) -> None:
    task_id = await kit.submit()
    values = [await kit.store.change(task_id, "task.progress", {}, progress=each) for each in (30.0, 20.0, None, 40.0)]
    assert values == [30.0, 30.0, 30.0, 40.0]
    assert [data["progress"] for name, data in await kit.events(task_id) if name == "task.progress"] == values


async def test_an_ended_task_refuses_every_change(kit: TaskKit) -> None:
    task_id = await kit.submit()
    cancel: dict[str, Any] = {"status": "cancelled"}
    await kit.store.change(task_id, "task.cancelled", cancel, new_status="cancelled")
    before = await kit.events(task_id)
    for change in (
        kit.store.change(task_id, "task.cancelled", cancel, new_status="cancelled"),
        kit.store.change(task_id, "task.progress", {}, progress=50.0),
        kit.store.begin_planning(task_id, 0),
        kit.store.set_plan(task_id, PLAN, 0, replan=False, reasons=()),
    ):
        with pytest.raises(OctoError) as caught:
            await change
        assert caught.value.code == "state_conflict"
    assert await kit.events(task_id) == before


async def test_a_failing_hook_leaves_neither_change_nor_event(kit: TaskKit) -> None:
    async def fail(_tx: Transaction) -> None:
        raise OctoError("No audit.", code="unavailable")

    task_id = await kit.submit()
    before = await kit.events(task_id)
    with pytest.raises(OctoError):
        await kit.store.change(task_id, "task.cancelled", {"status": "cancelled"}, new_status="cancelled", hook=fail)
    assert (await kit.store.get(task_id)).status == "accepted"
    assert await kit.events(task_id) == before


async def test_the_end_of_a_task_cancels_its_open_steps_only(kit: TaskKit) -> None:
    task_id = await kit.submit()
    await kit.store.begin_planning(task_id, 0)
    plan = Plan((plan_step("a"), plan_step("b"), plan_step("c")))
    await kit.store.set_plan(task_id, plan, 0, replan=False, reasons=())
    done = {"step": "a", "attempt": 1, "output": "", "artifacts": [], "usage": {}, "text_length": 0}
    await kit.store.change(task_id, "step.completed", done, step=("a", {"status": "completed"}))
    await kit.store.change(task_id, "task.progress", {}, step=("b", {"status": "running"}))
    await kit.store.change(task_id, "task.cancelled", {"status": "cancelled"}, new_status="cancelled")
    assert {step.step: step.status for step in await kit.store.steps(task_id)} == {
        "a": "completed",
        "b": "cancelled",
        "c": "cancelled",
    }


async def test_a_replan_keeps_completed_steps_with_their_results(kit: TaskKit) -> None:
    task_id = await kit.submit()
    await kit.store.begin_planning(task_id, 0)
    await kit.store.set_plan(task_id, Plan((plan_step("a"), plan_step("b"))), 0, replan=False, reasons=())
    result = ExecuteResult("kept")
    done = {"step": "a", "attempt": 1, "output": "", "artifacts": [], "usage": {}, "text_length": 0}
    await kit.store.change(task_id, "step.completed", done, step=("a", {"status": "completed", "result": result}))
    assert not await kit.store.was_replanned(task_id)
    await kit.store.begin_planning(task_id, 0)
    await kit.store.set_plan(task_id, Plan((plan_step("a"), plan_step("c", "a"))), 0, replan=True, reasons=("no",))
    assert await kit.store.was_replanned(task_id)
    assert [(step.step, step.result) for step in await kit.store.steps(task_id)] == [("a", result), ("c", None)]


@given(gaps=st.lists(st.sampled_from([0.0, 0.0, 1.0]), max_size=9), limit=st.integers(1, 4))
@settings(max_examples=15)
def test_pages_of_a_list_have_every_task_once_newest_first(gaps: list[float], limit: int) -> None:
    """Also where tasks were created at the same moment: the id breaks the tie."""

    async def check() -> None:
        async with open_task_kit() as kit:
            created: list[tuple[float, str]] = []
            for gap in gaps:
                kit.clock.advance(gap)
                created.append((kit.clock.now(), await kit.submit()))
            listed: list[str] = []
            cursor: str | None = ""
            while cursor is not None:
                page = await kit.store.list("acme", limit=limit, cursor=cursor, status=None)
                assert len(page.tasks) <= limit
                listed += [task.task_id for task in page.tasks]
                cursor = page.cursor
            assert listed == [task_id for _, task_id in sorted(created, reverse=True)]

    asyncio.run(check())


@pytest.mark.parametrize("cursor", ["x", "AAAA", "W10", "bnVsbA", "é"])
async def test_a_malformed_cursor_is_refused(kit: TaskKit, cursor: str) -> None:
    with pytest.raises(OctoError) as caught:
        await kit.store.list("acme", limit=5, cursor=cursor, status=None)
    assert caught.value.code == "invalid_parameter"


async def test_a_list_has_the_goals_that_contain_a_text_in_any_case(each_kit: TaskKit) -> None:
    for goal in ("Write slugify", "write 100% of it", "Count the rows"):
        await each_kit.submit(goal=goal)

    async def goals(text: str) -> list[str]:
        page = await each_kit.store.list("acme", limit=5, cursor="", status=None, text=text)
        return sorted(task.goal for task in page.tasks)

    assert await goals("WRITE") == ["Write slugify", "write 100% of it"]
    assert await goals("0%") == ["write 100% of it"], "a percent sign is only a character"
    assert await goals("_") == []


async def test_usage_is_added_up_by_day_arm_and_model(each_kit: TaskKit) -> None:
    kit = each_kit
    ledger, reader = BudgetLedger(kit.db, kit.clock, kit.ids), UsageReader(kit.db, kit.clock)
    task_id = await kit.submit(budget=Budget(max_tokens=10_000))
    await kit.claim()
    await kit.store.begin_planning(task_id, 1)
    await kit.store.set_plan(task_id, Plan((plan_step("a"),)), 1, replan=False, reasons=())
    first_day = format_rfc3339(kit.clock.now())[:10]
    for number, (step, model, days) in enumerate((("", "big", 0), ("a", "small", 0), ("a", "small", 1))):
        kit.clock.advance(days * 86_400)
        request = ReservationRequest("acme", task_id, step, 1, None, f"k{number}", model, 100, 200)
        reserved = await ledger.reserve(request)
        await ledger.settle(reserved.id, Usage(30, 12, 0.25 if model == "big" else 0.0), None)

    async def rows(by: UsageBy, days: int = 2) -> list[tuple[str, int, int, float]]:
        report = await reader.read("acme", by, days)
        return [(row.name, row.calls, row.tokens, row.cost_usd) for row in report.rows]

    last_day = format_rfc3339(kit.clock.now())[:10]
    assert await rows("day") == [(first_day, 2, 84, 0.25), (last_day, 1, 42, 0.0)]
    assert await rows("day", 1) == [(last_day, 1, 42, 0.0)], "a period ends today"
    arm = plan_step("a").arm
    assert await rows("arm") == [("", 1, 42, 0.25), (arm, 2, 84, 0.0)]
    assert await rows("model") == [("big", 1, 42, 0.25), ("small", 2, 84, 0.0)]
    assert (await reader.read("other", "day", 2)).rows == ()
