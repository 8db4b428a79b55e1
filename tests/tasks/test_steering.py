"""Steering without HTTP, on both databases: pause, resume, instructions and larger limits."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from task_kit import TENANT, ServiceRequest, TaskKit, answer, plan_of, plan_step

from octollm.contracts.approvals import ApprovalPolicy
from octollm.contracts.attempts import AttemptQuery
from octollm.contracts.operations import AcceptResult
from octollm.contracts.steering import MAX_INSTRUCTIONS, ExtendRequest
from octollm.contracts.task import Budget, ExecuteResult, Usage
from octollm.errors import OctoError
from octollm.storage import Transaction
from octollm.tasks.leases import TaskLeases
from octollm.tasks.ledger import ReservationRequest
from octollm.tasks.runner import TaskRunner
from octollm.tasks.steering import SteeringStore

NONE: frozenset[str] = frozenset()
FIRST, SECOND = plan_step("a"), plan_step("b", "a")


async def nothing(_tx: Transaction) -> None:
    """Write nothing more."""


class Held:
    """An arm that hangs until it is let go, and what it was given."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.hangs = True
        self.given: list[dict[str, Any]] = []

    async def __call__(self, request: ServiceRequest) -> ExecuteResult:
        self.given.append(request.body)
        self.begun.set()
        if self.hangs:
            await asyncio.Event().wait()
        return ExecuteResult("done")

    def instructions(self) -> list[tuple[str, ...]]:
        return [tuple(body["context"].get("instructions", ())) for body in self.given]


async def start(kit: TaskKit, *steps: Any, **contract: Any) -> tuple[str, Held, asyncio.Task[None]]:
    """Submit a task and run it until its first step hangs."""
    task_id, arm = await kit.submit(**contract), Held()
    kit.services.handlers |= {"planner.plan": plan_of(*(steps or (FIRST,))), "coder.execute": arm}
    running = asyncio.create_task(TaskRunner(kit.deps, await kit.claim()).run())
    await arm.begun.wait()
    return task_id, arm, running


async def stop(running: asyncio.Task[None]) -> None:
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def finish(kit: TaskKit) -> None:
    await TaskRunner(kit.deps, await kit.claim("w2")).run()


async def attempts(kit: TaskKit, task_id: str) -> list[tuple[str, int, str, tuple[str, ...]]]:
    page = await kit.deps.attempts.list(task_id, AttemptQuery())
    return [(each.step, each.attempt, each.status, each.request.instructions) for each in page.attempts]


async def test_a_paused_task_holds_no_worker_and_nothing_that_ran_can_change_it(each_kit: TaskKit) -> None:
    kit = each_kit
    steering = SteeringStore(kit.store, kit.clock)
    task_id, arm, running = await start(kit)
    assert await steering.pause(task_id, TENANT, "grace", nothing) == 1
    assert await steering.pause(task_id, TENANT, "grace", nothing) is None, "once is enough"
    view = await kit.store.view(task_id, TENANT)
    assert view.status == "paused"
    assert await attempts(kit, task_id) == [("a", 1, "interrupted", ())]
    assert await TaskLeases(kit.db, "w2").acquire(exclude=NONE) is None
    # What still runs has an outdated token: neither its writes nor its model calls count.
    reserve = ReservationRequest(TENANT, task_id, "a", 1, 1, "key", "m", 10, 20)
    with pytest.raises(OctoError, match="newer run"):
        await kit.ledger.reserve(reserve)
    with pytest.raises(OctoError, match="newer run"):
        await kit.store.change(task_id, "task.progress", {"step": "a"}, epoch=1, progress=50)
    await stop(running)
    kit.clock.advance(3600)
    before = view.deadline
    assert await steering.resume(task_id, TENANT, "ada", nothing)
    assert not await steering.resume(task_id, TENANT, "ada", nothing)
    view = await kit.store.view(task_id, TENANT)
    assert before is not None and view.deadline is not None
    assert (view.status, view.deadline > before) == ("running", True), "the pause does not count"
    arm.hangs = False
    await finish(kit)
    assert (await kit.store.view(task_id, TENANT)).status == "completed"
    # The attempt goes on under its key: a call that had finished would be answered from what was stored.
    assert kit.services.keys_of("coder.execute") == ["a:1", "a:1"]
    told = [(name, data["by"]) for name, data in await kit.events(task_id) if "by" in data]
    assert told == [("task.paused", "grace"), ("task.resumed", "ada")]


async def test_a_task_is_paused_before_it_has_a_worker(each_kit: TaskKit) -> None:
    kit = each_kit
    steering = SteeringStore(kit.store, kit.clock)
    task_id = await kit.submit()
    await steering.pause(task_id, TENANT, "grace", nothing)
    assert await TaskLeases(kit.db, "w1").acquire(exclude=NONE) is None
    await steering.resume(task_id, TENANT, "grace", nothing)
    assert (await kit.store.view(task_id, TENANT)).status == "accepted"
    kit.services.handlers |= {"planner.plan": plan_of(FIRST), "coder.execute": answer("done")}
    await finish(kit)
    assert (await kit.store.view(task_id, TENANT)).status == "completed"


async def test_a_task_that_waits_for_an_approval_is_paused_and_waits_again(each_kit: TaskKit) -> None:
    kit = each_kit
    steering = SteeringStore(kit.store, kit.clock)
    task_id = await kit.submit(approval=ApprovalPolicy(steps=("*",)))
    kit.services.handlers |= {"planner.plan": plan_of(FIRST), "coder.execute": answer("done")}
    await TaskRunner(kit.deps, await kit.claim()).run()
    await steering.pause(task_id, TENANT, "grace", nothing)
    await steering.resume(task_id, TENANT, "grace", nothing)
    await finish(kit)
    view = await kit.store.view(task_id, TENANT)
    assert (view.status, [each.status for each in view.approvals]) == ("waiting", ["pending"])


async def test_an_instruction_is_taken_at_the_next_attempt_and_the_next_step(each_kit: TaskKit) -> None:
    kit = each_kit
    steering = SteeringStore(kit.store, kit.clock)
    task_id, arm, running = await start(kit, FIRST, SECOND)
    await steering.instruct(task_id, TENANT, "Be brief.", "grace", nothing)
    await stop(running)
    arm.hangs = False
    # The worker died: the attempt under way is made again as it was, since its key stands for its body.
    await TaskLeases(kit.db, "w1").release(task_id, 1)
    judged: list[str] = []

    async def accept(request: ServiceRequest) -> AcceptResult:
        judged.append(request.body["goal"])
        return AcceptResult(accepted=len(judged) > 1, reasons=("No.",), score=0.0)

    kit.services.handlers["judge.accept"] = accept
    await finish(kit)
    assert arm.instructions() == [(), (), ("Be brief.",), ("Be brief.",)]
    assert judged == ["goal of a", "goal of a\n- Be brief.", "goal of b\n- Be brief."]
    assert await attempts(kit, task_id) == [
        ("a", 1, "rejected", ()), ("a", 2, "accepted", ("Be brief.",)), ("b", 1, "accepted", ("Be brief.",)),
    ]  # fmt: skip
    view = await kit.store.view(task_id, TENANT)
    assert [(each.text, each.given_by) for each in view.instructions] == [("Be brief.", "grace")]
    assert dict(await kit.events(task_id))["task.instructed"]["number"] == 1


async def test_an_instruction_between_pause_and_resume_begins_the_attempt_anew_and_is_no_failure(
    each_kit: TaskKit,
) -> None:
    kit = each_kit
    steering = SteeringStore(kit.store, kit.clock)
    task_id, arm, running = await start(kit, budget=Budget(max_retries=0))
    await steering.pause(task_id, TENANT, "grace", nothing)
    await stop(running)
    await steering.instruct(task_id, TENANT, "In German.", "grace", nothing)
    await steering.resume(task_id, TENANT, "grace", nothing)
    arm.hangs = False
    await finish(kit)
    assert (await kit.store.view(task_id, TENANT)).status == "completed"
    assert (arm.instructions(), kit.services.keys_of("coder.execute")) == ([(), ("In German.",)], ["a:1", "a:2"])
    assert await attempts(kit, task_id) == [("a", 1, "interrupted", ()), ("a", 2, "accepted", ("In German.",))]


async def test_the_planner_is_told_what_was_added_before_there_is_a_plan(each_kit: TaskKit) -> None:
    kit = each_kit
    task_id = await kit.submit()
    await SteeringStore(kit.store, kit.clock).instruct(task_id, TENANT, "Two steps.", "grace", nothing)
    kit.services.handlers |= {"planner.plan": plan_of(FIRST), "coder.execute": answer("done")}
    await finish(kit)
    [request] = [each for each in kit.services.requests if each.operation == "planner.plan"]
    assert request.body["context"]["instructions"] == ["Two steps."]


async def test_a_task_takes_a_bounded_number_of_instructions(each_kit: TaskKit) -> None:
    kit = each_kit
    steering, task_id = SteeringStore(kit.store, kit.clock), await kit.submit()
    for number in range(MAX_INSTRUCTIONS):
        await steering.instruct(task_id, TENANT, f"{number}", "grace", nothing)
    with pytest.raises(OctoError, match="at most"):
        await steering.instruct(task_id, TENANT, "more", "grace", nothing)


async def test_a_raised_budget_counts_for_the_next_call_and_the_ledger_stays_exact(each_kit: TaskKit) -> None:
    kit = each_kit
    steering = SteeringStore(kit.store, kit.clock)
    task_id, _arm, running = await start(kit, budget=Budget(max_tokens=100))
    first = await kit.ledger.reserve(ReservationRequest(TENANT, task_id, "a", 1, 1, "one", "m", 50, 40))
    more = ReservationRequest(TENANT, task_id, "a", 1, 1, "two", "m", 50, 40)
    with pytest.raises(OctoError, match="may use 100 tokens"):
        await kit.ledger.reserve(more)
    assert await steering.extend(task_id, TENANT, ExtendRequest(max_tokens=180), "grace", nothing)
    assert not await steering.extend(task_id, TENANT, ExtendRequest(max_tokens=180), "grace", nothing)
    second = await kit.ledger.reserve(more)
    for held in (first, second):
        await kit.ledger.settle(held.id, Usage(50, 40), b"{}")
    assert (await kit.ledger.usage(task_id)).total_tokens == 180
    with pytest.raises(OctoError, match="only be raised"):
        await steering.extend(task_id, TENANT, ExtendRequest(max_tokens=179), "grace", nothing)
    view = await kit.store.view(task_id, TENANT)
    assert view.budget.max_tokens == 180
    extended = [data for name, data in await kit.events(task_id) if name == "task.extended"]
    assert [(each["by"], each["max_tokens"]) for each in extended] == [("grace", 180)]
    await stop(running)


async def test_a_repeated_attempt_has_the_body_that_its_key_stands_for(each_kit: TaskKit) -> None:
    kit = each_kit
    steering = SteeringStore(kit.store, kit.clock)
    task_id, arm, running = await start(kit, budget=Budget(max_tokens=100))
    await steering.pause(task_id, TENANT, "grace", nothing)
    await stop(running)
    await steering.extend(task_id, TENANT, ExtendRequest(max_tokens=200), "grace", nothing)
    await steering.resume(task_id, TENANT, "grace", nothing)
    arm.hangs = False
    await finish(kit)
    assert kit.services.keys_of("coder.execute") == ["a:1", "a:1"]
    assert arm.given[0] == arm.given[1], "an arm that had finished would refuse another body under the same key"


async def test_a_deadline_that_is_put_off_gives_the_step_another_attempt(each_kit: TaskKit) -> None:
    kit = each_kit
    steering = SteeringStore(kit.store, kit.clock)
    task_id, calls = await kit.submit(budget=Budget(max_time_seconds=600.0, max_retries=0)), list[str]()

    async def execute(request: ServiceRequest) -> ExecuteResult:
        calls.append(request.key or "")
        if len(calls) == 1:
            await steering.extend(task_id, TENANT, ExtendRequest(max_time_seconds=1200.0), "grace", nothing)
            kit.clock.advance(601)
            # The call was made with the deadline of before.
            raise OctoError("The deadline has passed.", code="deadline_exceeded")
        return ExecuteResult("late, and in time")

    kit.services.handlers |= {"planner.plan": plan_of(FIRST), "coder.execute": execute}
    await finish(kit)
    view = await kit.store.view(task_id, TENANT)
    assert (view.status, view.output, len(set(calls))) == ("completed", "late, and in time", 2)


async def test_a_worker_notices_that_the_deadline_was_put_off(each_kit: TaskKit) -> None:
    kit = each_kit
    task_id = await kit.submit(budget=Budget(max_time_seconds=600.0))
    runner = TaskRunner(kit.deps, await kit.claim())
    steering = SteeringStore(kit.store, kit.clock)
    await steering.extend(task_id, TENANT, ExtendRequest(max_time_seconds=1200.0), "grace", nothing)
    async with asyncio.timeout(60) as scope:
        expiry = asyncio.create_task(runner._expire(scope, 0.01))
        await asyncio.wait({expiry}, timeout=0.3)
        assert not expiry.done()
        expiry.cancel()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(60) as scope:
            # Nobody puts it off a second time.
            await TaskRunner(kit.deps, await kit.store.get(task_id))._expire(scope, 0.01)
            await asyncio.sleep(60)


async def test_a_task_ends_at_its_deadline_if_nobody_puts_it_off(each_kit: TaskKit) -> None:
    kit = each_kit
    task_id = await kit.submit(seconds=0.2)
    kit.services.handlers |= {"planner.plan": plan_of(FIRST), "coder.execute": Held()}
    await finish(kit)
    view = await kit.store.view(task_id, TENANT)
    assert view.error is not None
    assert (view.status, view.error.code) == ("failed", "deadline_exceeded")


async def test_another_tenants_and_an_ended_task_are_not_steered(each_kit: TaskKit) -> None:
    kit = each_kit
    steering, task_id = SteeringStore(kit.store, kit.clock), await kit.submit()

    async def attempt_all(tenant: str) -> set[str]:
        codes = set[str]()
        for change in (
            steering.pause(task_id, tenant, "x", nothing),
            steering.resume(task_id, tenant, "x", nothing),
            steering.instruct(task_id, tenant, "x", "x", nothing),
            steering.extend(task_id, tenant, ExtendRequest(max_tokens=5), "x", nothing),
        ):
            with pytest.raises(OctoError) as caught:
                await change
            codes.add(caught.value.code)
        return codes

    assert await attempt_all("globex") == {"task_not_found"}
    await kit.store.change(task_id, "task.cancelled", {"status": "cancelled"}, new_status="cancelled")
    assert await attempt_all(TENANT) == {"state_conflict"}


async def test_a_pause_and_an_end_at_the_same_moment_leave_one_of_them(each_kit: TaskKit) -> None:
    kit = each_kit
    steering = SteeringStore(kit.store, kit.clock)
    for _ in range(10):
        task_id = await kit.submit()
        await asyncio.gather(
            steering.pause(task_id, TENANT, "grace", nothing),
            kit.store.change(task_id, "task.cancelled", {"status": "cancelled"}, new_status="cancelled"),
            return_exceptions=True,
        )
        types = await kit.event_types(task_id)
        assert (await kit.store.view(task_id, TENANT)).status == "cancelled"
        assert types.count("task.cancelled") == 1
