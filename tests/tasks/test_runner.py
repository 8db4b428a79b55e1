"""One task from plan to result: order of steps, replanning, takeover, and its ends."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from task_kit import ServiceRequest, TaskKit, answer, plan_of, plan_step, raises

from octollm.contracts.operations import AcceptResult
from octollm.contracts.task import ExecuteResult, Plan, PlanStep
from octollm.errors import OctoError, RemoteError
from octollm.tasks.leases import LEASE_SECONDS
from octollm.tasks.runner import MAX_PARALLEL, TaskRunner


async def run_new_task(kit: TaskKit, *steps: PlanStep, **contract: Any) -> str:
    """Submit, claim and run a task with this plan; return its id."""
    task_id = await kit.submit(**contract)
    kit.services.handlers["planner.plan"] = plan_of(*steps)
    await TaskRunner(kit.deps, await kit.claim()).run()
    return task_id


async def echo(request: ServiceRequest) -> ExecuteResult:
    inputs = request.body["context"].get("inputs", {})
    return ExecuteResult(f"{request.body['goal']}({','.join(inputs.values())})")


def goals(kit: TaskKit, operation: str = "coder.execute") -> list[str]:
    return [each.body["goal"] for each in kit.services.requests if each.operation == operation]


async def test_steps_run_after_their_dependencies_with_their_outputs(kit: TaskKit) -> None:
    kit.services.handlers["coder.execute"] = echo
    task_id = await run_new_task(kit, plan_step("b", "a"), plan_step("a"))
    view = await kit.store.view(task_id, "acme")
    assert (view.status, view.progress, view.output) == ("completed", 100.0, "goal of b(goal of a())")
    assert goals(kit) == ["goal of a", "goal of b"]
    types = await kit.event_types(task_id)
    assert types[:4] == ["task.accepted", "task.planning", "task.planned", "task.started"]
    assert types[-1] == "task.completed"


async def test_parallel_steps_are_bounded(kit: TaskKit) -> None:
    most = 0

    async def execute(_request: ServiceRequest) -> ExecuteResult:
        nonlocal most
        most = max(most, sum(task.get_name().startswith("step ") for task in asyncio.all_tasks()))
        return ExecuteResult("done")

    kit.services.handlers["coder.execute"] = execute
    task_id = await run_new_task(kit, *(plan_step(f"s{n}") for n in range(MAX_PARALLEL + 3)))
    assert (await kit.store.view(task_id, "acme")).status == "completed"
    assert most == MAX_PARALLEL


async def test_assigned_arm_needs_no_planner(kit: TaskKit) -> None:
    kit.services.handlers["retriever.execute"] = answer("found")
    task_id = await kit.submit(assigned_arm="retriever")
    await TaskRunner(kit.deps, await kit.claim()).run()
    assert (await kit.store.view(task_id, "acme")).output == "found"
    assert [each.operation for each in kit.services.requests] == ["retriever.execute", "judge.accept"]


async def test_rejected_step_is_replanned_once_with_the_reasons(kit: TaskKit) -> None:
    plans = [(plan_step("a"), plan_step("b", "a")), (plan_step("a"), plan_step("c", "a"))]

    async def plan(_request: ServiceRequest) -> Plan:
        return Plan(plans.pop(0))

    async def accept(request: ServiceRequest) -> AcceptResult:
        return AcceptResult(request.body["goal"] != "goal of b", ("Wrong.",))

    task_id = await kit.submit()
    kit.services.handlers |= {"planner.plan": plan, "coder.execute": echo, "judge.accept": accept}
    await TaskRunner(kit.deps, await kit.claim()).run()
    view = await kit.store.view(task_id, "acme")
    # The completed step is kept, and its output is the input of the new one.
    assert (view.status, view.output) == ("completed", "goal of c(goal of a())")
    assert goals(kit).count("goal of a") == 1
    second = [each for each in kit.services.requests if each.operation == "planner.plan"][1]
    assert (second.body["reasons"], second.key) == (["Wrong."], f"{task_id}:2:plan")
    assert (await kit.event_types(task_id)).count("task.replanned") == 1


async def test_a_new_plan_may_use_the_ids_of_completed_steps_for_other_work(kit: TaskKit) -> None:
    first = (plan_step("s1"), plan_step("s2", "s1"))
    other = msgspec.structs.replace(plan_step("s1"), goal="something else")
    same = msgspec.structs.replace(plan_step("s2"), goal="goal of s1")
    plans = [first, (other, same, plan_step("s3", "s1", "s2"))]

    async def plan(_request: ServiceRequest) -> Plan:
        return Plan(plans.pop(0))

    async def accept(request: ServiceRequest) -> AcceptResult:
        return AcceptResult(request.body["goal"] != "goal of s2", ("Wrong.",))

    task_id = await kit.submit()
    kit.services.handlers |= {"planner.plan": plan, "coder.execute": echo, "judge.accept": accept}
    await TaskRunner(kit.deps, await kit.claim()).run()
    view = await kit.store.view(task_id, "acme")
    assert (view.status, view.output) == ("completed", "goal of s3(something else(),goal of s1())")
    assert [goals(kit).count(goal) for goal in ("goal of s1", "something else")] == [1, 1]


async def test_replan_that_repeats_the_work_fails_with_the_reasons(kit: TaskKit) -> None:
    async def reject(_request: ServiceRequest) -> AcceptResult:
        return AcceptResult(accepted=False, reasons=("Wrong.",))

    kit.services.handlers |= {"coder.execute": echo, "judge.accept": reject}
    task_id = await run_new_task(kit, plan_step("a"))
    view = await kit.store.view(task_id, "acme")
    assert view.status == "failed"
    assert view.error is not None
    assert (view.error.code, view.error.reasons) == ("not_accepted", ("Wrong.",))
    assert len(kit.services.keys_of("planner.plan")) == 2
    assert "task.replanned" not in await kit.event_types(task_id)


@pytest.mark.parametrize("left", ["running", "planning"])
async def test_the_replan_of_a_worker_that_died_before_its_new_plan_is_completed(kit: TaskKit, left: str) -> None:
    plans = [(plan_step("a"), plan_step("b", "a")), (plan_step("a"), plan_step("c", "a"))]
    planning = asyncio.Event()

    async def plan(request: ServiceRequest) -> Plan:
        if not request.body.get("reasons"):
            return Plan(plans[0])
        if not planning.is_set():
            planning.set()
            await asyncio.Event().wait()  # until the worker dies
        return Plan(plans[1])

    async def accept(request: ServiceRequest) -> AcceptResult:
        return AcceptResult(request.body["goal"] != "goal of b", ("Wrong.",))

    task_id = await kit.submit()
    kit.services.handlers |= {"planner.plan": plan, "coder.execute": echo, "judge.accept": accept}
    first = asyncio.create_task(TaskRunner(kit.deps, await kit.claim()).run())
    await planning.wait()
    first.cancel()
    await asyncio.wait([first])
    if left == "planning":
        # As a worker of an earlier version left it: in two transactions.
        await kit.store.begin_planning(task_id, 1)
    kit.clock.advance(LEASE_SECONDS + 1)
    await TaskRunner(kit.deps, await kit.claim("w2")).run()
    view = await kit.store.view(task_id, "acme")
    assert (view.status, view.output) == ("completed", "goal of c(goal of a())")
    # The failed step is not run again: its keys stand for the reasons of the attempts that there were.
    assert len(kit.services.keys_of("coder.execute")) == len(set(kit.services.keys_of("coder.execute")))
    again = [each for each in kit.services.requests if each.operation == "planner.plan"][1:]
    assert [each.key for each in again] == [f"{task_id}:2:plan"] * 2
    assert again[0].body == again[1].body
    assert (await kit.event_types(task_id)).count("task.replanned") == 1


async def test_a_worker_that_died_after_the_last_failure_leaves_the_end_to_the_next(kit: TaskKit) -> None:
    refused = RemoteError("No.", code="authority_missing", status=403, retryable=False)
    kit.services.handlers |= {"planner.plan": plan_of(plan_step("a")), "coder.execute": raises(refused)}
    task_id = await kit.submit()
    runner = TaskRunner(kit.deps, await kit.claim())

    async def die(_error: OctoError) -> None:
        raise asyncio.CancelledError

    runner.fail = die  # type: ignore[method-assign]
    with pytest.raises(asyncio.CancelledError):
        await runner.run()
    kit.clock.advance(LEASE_SECONDS + 1)
    await TaskRunner(kit.deps, await kit.claim("w2")).run()
    view = await kit.store.view(task_id, "acme")
    assert view.error is not None
    assert (view.status, view.error.code, view.error.detail) == (
        "failed",
        "authority_missing",
        "The step “A” failed: No.",
    )
    assert len(kit.services.keys_of("coder.execute")) == 1


async def test_other_failures_are_not_replanned(kit: TaskKit) -> None:
    refused = RemoteError("No.", code="authority_missing", status=403, retryable=False)
    kit.services.handlers["coder.execute"] = raises(refused)
    task_id = await run_new_task(kit, plan_step("a"))
    view = await kit.store.view(task_id, "acme")
    assert view.error is not None
    assert (view.status, view.error.code) == ("failed", "authority_missing")
    assert len(kit.services.keys_of("planner.plan")) == 1


async def test_first_failure_cancels_the_parallel_steps(kit: TaskKit) -> None:
    cancelled: list[str] = []
    started = asyncio.Event()

    async def execute(request: ServiceRequest) -> ExecuteResult:
        if request.body["goal"] == "goal of a":
            await started.wait()
            raise RemoteError("No.", code="authority_missing", status=403, retryable=False)
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(request.body["goal"])
            raise
        raise AssertionError

    kit.services.handlers["coder.execute"] = execute
    task_id = await run_new_task(kit, plan_step("a"), plan_step("b"))
    assert cancelled == ["goal of b"]
    statuses = {step.step: step.status for step in await kit.store.steps(task_id)}
    assert statuses == {"a": "failed", "b": "cancelled"}


async def test_takeover_keeps_the_plan_and_the_completed_steps(kit: TaskKit) -> None:
    async def stop_at_b(request: ServiceRequest) -> ExecuteResult:
        if request.body["goal"] == "goal of b":
            raise asyncio.CancelledError
        return await echo(request)

    task_id = await kit.submit()
    kit.services.handlers |= {
        "planner.plan": plan_of(plan_step("a"), plan_step("b", "a")),
        "coder.execute": stop_at_b,
    }
    with pytest.raises(asyncio.CancelledError):
        await TaskRunner(kit.deps, await kit.claim()).run()
    kit.clock.advance(10)
    kit.services.handlers["coder.execute"] = echo
    await TaskRunner(kit.deps, await kit.claim("w2")).run()
    assert (await kit.store.view(task_id, "acme")).output == "goal of b(goal of a())"
    assert goals(kit) == ["goal of a", "goal of b", "goal of b"]
    assert len(kit.services.keys_of("planner.plan")) == 1
    assert kit.services.keys_of("coder.execute")[1:] == ["b:1", "b:1"]


async def test_worker_with_an_outdated_epoch_records_nothing(kit: TaskKit) -> None:
    task_id = await kit.submit()
    first = await kit.claim()
    kit.clock.advance(10)
    await kit.claim("w2")
    kit.services.handlers |= {"planner.plan": plan_of(plan_step("a")), "coder.execute": echo}
    before = await kit.event_types(task_id)
    with pytest.raises(OctoError) as caught:
        await TaskRunner(kit.deps, first).run()
    assert caught.value.code == "fence_lost"
    assert await kit.event_types(task_id) == before


async def test_task_cancelled_meanwhile_stays_cancelled(kit: TaskKit) -> None:
    async def cancel(_request: ServiceRequest) -> ExecuteResult:
        await kit.store.change(task_id, "task.cancelled", {"status": "cancelled"}, new_status="cancelled")
        return ExecuteResult("late")

    task_id = await kit.submit()
    kit.services.handlers |= {"planner.plan": plan_of(plan_step("a")), "coder.execute": cancel}
    await TaskRunner(kit.deps, await kit.claim()).run()
    assert (await kit.store.view(task_id, "acme")).status == "cancelled"
    assert (await kit.event_types(task_id))[-1] == "task.cancelled"


async def test_expired_task_fails_without_a_call(kit: TaskKit) -> None:
    task_id = await kit.submit(seconds=30.0)
    kit.clock.advance(30)
    await TaskRunner(kit.deps, await kit.claim()).run()
    view = await kit.store.view(task_id, "acme")
    assert view.error is not None
    assert (view.status, view.error.code) == ("failed", "deadline_exceeded")
    assert kit.services.requests == []


async def test_cyclic_plan_fails(kit: TaskKit) -> None:
    kit.services.handlers["coder.execute"] = echo
    task_id = await run_new_task(kit, plan_step("a", "b"), plan_step("b", "a"))
    view = await kit.store.view(task_id, "acme")
    assert view.error is not None
    assert view.error.code == "plan_invalid"
