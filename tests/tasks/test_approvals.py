"""Approvals: the rules, the requests, what a person decides, and what a task does meanwhile."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from task_kit import APPROVAL_SECONDS, TENANT, ServiceRequest, TaskKit, answer, plan_of, plan_step

from octollm.contracts.approvals import ApprovalDecision, ApprovalPolicy
from octollm.contracts.task import ArmInfo, ExecuteResult, Plan, PlanStep
from octollm.errors import OctoError
from octollm.storage import Transaction
from octollm.tasks.leases import TaskLeases
from octollm.tasks.runner import TaskRunner
from octollm.tasks.state import find_required_approvals, merge_policies
from octollm.testing import wait_until

FIRST, SECOND = plan_step("a"), plan_step("b", "a", arm="executor")
EVERY = ApprovalPolicy(steps=("*",))


async def start(kit: TaskKit, policy: ApprovalPolicy, *steps: PlanStep, **contract: Any) -> str:
    """Submit a task with this policy and plan, and run it until it ends or waits."""
    task_id = await kit.submit(approval=policy, **contract)
    kit.services.handlers["planner.plan"] = plan_of(*(steps or (FIRST, SECOND)))
    for arm in ("coder", "executor"):
        kit.services.handlers.setdefault(f"{arm}.execute", answer("done"))
    await continue_task(kit)
    return task_id


async def continue_task(kit: TaskKit, holder: str = "w1") -> None:
    await TaskRunner(kit.deps, await kit.claim(holder)).run()


async def decide(kit: TaskKit, task_id: str, *args: Any, tenant: str = TENANT, **members: Any) -> bool:
    async def do_nothing(_tx: Transaction) -> None:
        pass

    return await kit.approvals.decide(task_id, tenant, ApprovalDecision(*args, **members), "grace", do_nothing)


async def status(kit: TaskKit, task_id: str) -> str:
    return (await kit.store.view(task_id, TENANT)).status


def executed(kit: TaskKit) -> list[str]:
    return [each.body["goal"] for each in kit.services.requests if each.operation.endswith(".execute")]


policies = st.builds(
    ApprovalPolicy,
    plan=st.booleans(),
    steps=st.lists(st.sampled_from(("coder", "executor:http", "*"))).map(tuple),
    cost_above_usd=st.none() | st.floats(0, 10),
    expires_seconds=st.none() | st.floats(1, 10),
)


@given(policies, policies, st.floats(0, 20), st.booleans())
def test_a_merged_policy_is_as_strict_as_both(
    one: ApprovalPolicy, two: ApprovalPolicy, spent: float, net: bool
) -> None:
    def required(policy: ApprovalPolicy) -> set[str]:
        found = find_required_approvals(
            FIRST, policy, plan_approval="plan", arm_reason="", may_call=lambda _scope: net, spent_usd=spent
        )
        return {each.approval_id for each in found}

    merged = merge_policies(one, two)
    assert required(merged) == required(one) | required(two)
    lifetimes = [each.expires_seconds for each in (one, two) if each.expires_seconds is not None]
    assert merged.expires_seconds == min(lifetimes, default=None)


async def test_a_task_without_a_policy_asks_nobody(kit: TaskKit) -> None:
    task_id = await start(kit, ApprovalPolicy())
    view = await kit.store.view(task_id, TENANT)
    assert (view.status, view.approvals) == ("completed", ())


async def test_a_step_waits_without_a_worker_and_any_worker_continues(kit: TaskKit) -> None:
    task_id = await start(kit, ApprovalPolicy(steps=("executor",)))
    view = await kit.store.view(task_id, TENANT)
    assert (view.status, [each.status for each in view.steps]) == ("waiting", ["completed", "pending"])
    [approval] = view.approvals
    assert (approval.approval_id, approval.kind, approval.step, approval.status) == ("b", "step", "b", "pending")
    assert approval.reason == "Each step of executor has to be approved."
    assert await TaskLeases(kit.db, "w2").acquire(exclude=frozenset()) is None, "no worker may claim it"
    assert not await decide(kit, task_id, "approve", comment="Go.")
    await continue_task(kit, "w2")
    view = await kit.store.view(task_id, TENANT)
    assert (view.status, executed(kit)) == ("completed", ["goal of a", "goal of b"])
    [approval] = view.approvals
    assert (approval.status, approval.decided_by, approval.comment) == ("approved", "grace", "Go.")
    events = await kit.events(task_id)
    waiting = dict(events)["task.waiting"]
    assert (waiting["status"], waiting["approvals"][0]["approval_id"]) == ("waiting", "b")
    approved = dict(events)["task.approved"]
    assert (approved["approvals"], approved["decided_by"], approved["status"]) == (["b"], "grace", "running")


@pytest.mark.parametrize(
    ("policy", "step", "reason"),
    [
        (EVERY, FIRST, "Every step has to be approved."),
        (ApprovalPolicy(steps=("executor:http",)), plan_step("a", arm="executor"), "The step may call executor:http."),
        (ApprovalPolicy(), msgspec.structs.replace(FIRST, approval="It deletes files."), "It deletes files."),
    ],
)
async def test_what_makes_a_step_wait(kit: TaskKit, policy: ApprovalPolicy, step: PlanStep, reason: str) -> None:
    task_id = await start(kit, policy, step)
    [approval] = (await kit.store.view(task_id, TENANT)).approvals
    assert (approval.reason, executed(kit)) == (reason, [])


async def test_an_arm_that_its_author_marked_waits(kit: TaskKit) -> None:
    async def list_arms(_tenant: str) -> tuple[ArmInfo, ...]:
        return (ArmInfo("coder", "Writes.", approval="It writes to production."),)

    object.__setattr__(kit.deps, "list_arms", list_arms)
    task_id = await start(kit, ApprovalPolicy(), FIRST)
    [approval] = (await kit.store.view(task_id, TENANT)).approvals
    assert approval.reason == "It writes to production."


async def test_a_call_that_the_step_cannot_make_asks_nobody(kit: TaskKit) -> None:
    task_id = await start(kit, ApprovalPolicy(steps=("executor:http",)), FIRST)
    assert await status(kit, task_id) == "completed"


async def test_a_plan_is_approved_as_a_whole_with_changes(kit: TaskKit) -> None:
    task_id = await start(kit, ApprovalPolicy(plan=True))
    [approval] = (await kit.store.view(task_id, TENANT)).approvals
    assert (approval.approval_id, approval.kind, executed(kit)) == ("plan", "plan", [])
    await decide(kit, task_id, "approve", goals={"b": "something better"})
    await continue_task(kit)
    assert executed(kit) == ["goal of a", "something better"]
    view = await kit.store.view(task_id, TENANT)
    assert (view.status, view.approvals[0].goals) == ("completed", {"b": "something better"})


async def test_each_plan_is_approved_by_itself(kit: TaskKit) -> None:
    plans = [(FIRST,), (plan_step("c"),)]

    async def plan(_request: ServiceRequest) -> Plan:
        return Plan(plans.pop(0))

    async def accept(request: ServiceRequest) -> Any:
        return {"accepted": request.body["goal"] == "goal of c", "reasons": ["Wrong."]}

    task_id = await kit.submit(approval=ApprovalPolicy(plan=True))
    kit.services.handlers |= {"planner.plan": plan, "coder.execute": answer("x"), "judge.accept": accept}
    await continue_task(kit)
    await decide(kit, task_id, "approve")
    await continue_task(kit)
    view = await kit.store.view(task_id, TENANT)
    assert [(each.approval_id, each.status) for each in view.approvals] == [("plan", "approved"), ("plan-2", "pending")]
    await decide(kit, task_id, "approve")
    await continue_task(kit)
    assert await status(kit, task_id) == "completed"


async def test_spending_above_the_limit_asks_once(kit: TaskKit) -> None:
    costs = iter((0.0, 2.0, 2.0))

    async def usage(_task_id: str) -> Any:
        return msgspec.structs.replace(await original(_task_id), cost_usd=next(costs, 3.0))

    original = kit.ledger.usage
    kit.ledger.usage = usage  # type: ignore[method-assign]
    steps = (FIRST, plan_step("b", "a"), plan_step("c", "b"))
    task_id = await start(kit, ApprovalPolicy(cost_above_usd=1.0), *steps)
    [approval] = (await kit.store.view(task_id, TENANT)).approvals
    assert (approval.approval_id, executed(kit)) == ("spending", ["goal of a"])
    assert approval.reason == "The task has used 2.0000 USD, more than 1.0000 USD."
    await decide(kit, task_id, "approve")
    await continue_task(kit)
    view = await kit.store.view(task_id, TENANT)
    assert (view.status, len(view.approvals)) == ("completed", 1)


async def test_other_steps_run_while_one_waits_and_the_decision_is_noticed(kit: TaskKit) -> None:
    release, waiting = asyncio.Event(), asyncio.Event()

    async def execute(request: ServiceRequest) -> ExecuteResult:
        if request.body["goal"] == "goal of slow":
            waiting.set()
            await release.wait()
        return ExecuteResult("done")

    kit.services.handlers["coder.execute"] = execute
    task_id = await kit.submit(approval=ApprovalPolicy(steps=("executor",)))
    kit.services.handlers |= {
        "planner.plan": plan_of(plan_step("slow"), plan_step("held", arm="executor")),
        "executor.execute": answer("done"),
    }
    running = asyncio.create_task(TaskRunner(kit.deps, await kit.claim()).run())
    await waiting.wait()

    async def is_requested() -> bool:
        return bool((await kit.store.view(task_id, TENANT)).approvals)

    await wait_until(is_requested, description="the approval is requested")
    view = await kit.store.view(task_id, TENANT)
    assert (view.status, dict(await kit.events(task_id))["task.waiting"]["status"]) == ("running", "running")
    await decide(kit, task_id, "approve")
    await wait_until(lambda: "goal of held" in executed(kit), description="the decision is noticed")
    release.set()
    await running
    assert await status(kit, task_id) == "completed"


async def test_a_rejection_ends_the_task_with_its_comment(kit: TaskKit) -> None:
    task_id = await start(kit, EVERY, FIRST, plan_step("other"))
    assert len((await kit.store.view(task_id, TENANT)).approvals) == 2, "several approvals at once"
    assert await decide(kit, task_id, "reject", "a", comment="Not today.")
    view = await kit.store.view(task_id, TENANT)
    assert view.error is not None
    assert (view.status, view.error.code, view.error.reasons) == ("failed", "approval_rejected", ("Not today.",))
    assert [each.status for each in view.approvals] == ["rejected", "cancelled"]
    assert {each.status for each in view.steps} == {"cancelled"}
    assert (await kit.event_types(task_id))[-1] == "task.failed"


async def test_an_approval_expires_and_fails_the_task(kit: TaskKit) -> None:
    task_id = await start(kit, EVERY, FIRST)
    kit.clock.advance(APPROVAL_SECONDS - 1)
    assert await kit.approvals.expire(10) == []
    kit.clock.advance(2)
    with pytest.raises(OctoError, match="has expired"):
        await decide(kit, task_id, "approve")
    assert await kit.approvals.expire(10) == [task_id]
    assert await kit.approvals.expire(10) == []
    view = await kit.store.view(task_id, TENANT)
    assert view.error is not None
    assert (view.status, view.error.code, view.approvals[0].status) == ("failed", "approval_expired", "expired")


async def test_the_time_limit_does_not_count_the_wait(kit: TaskKit) -> None:
    task_id = await start(kit, EVERY, FIRST, seconds=600.0)
    kit.clock.advance(5000)
    await decide(kit, task_id, "approve")
    await continue_task(kit)
    assert await status(kit, task_id) == "completed"


async def test_a_deadline_of_the_client_does_not_wait(kit: TaskKit) -> None:
    task_id = await start(kit, EVERY, FIRST, seconds=600.0, deadline="2027-01-15T08:10:00Z")
    kit.clock.advance(601)
    assert await kit.approvals.expire(10) == [task_id]
    assert await status(kit, task_id) == "failed"


async def test_the_same_decision_again_changes_nothing_and_another_is_refused(kit: TaskKit) -> None:
    task_id = await start(kit, EVERY, FIRST)
    await decide(kit, task_id, "approve", "a")
    version = (await kit.store.view(task_id, TENANT)).version
    assert not await decide(kit, task_id, "approve", "a")
    assert not await decide(kit, task_id, "approve")
    assert (await kit.store.view(task_id, TENANT)).version == version
    with pytest.raises(OctoError, match="approved already") as caught:
        await decide(kit, task_id, "reject", "a")
    assert caught.value.code == "state_conflict"


@pytest.mark.parametrize(
    ("decision", "code", "pointer"),
    [
        ({"decision": "approve", "approval_id": "nothing"}, "approval_invalid", "/approval_id"),
        ({"decision": "approve", "goals": {"b": "x"}}, "approval_invalid", "/goals/b"),
        ({"decision": "approve", "goals": {"a": " "}}, "approval_invalid", "/goals/a"),
        ({"decision": "approve", "goals": {"a/~": "x"}}, "approval_invalid", "/goals/a~1~0"),
    ],
)
async def test_bad_decisions_change_nothing(kit: TaskKit, decision: dict[str, Any], code: str, pointer: str) -> None:
    task_id = await start(kit, ApprovalPolicy(steps=("coder",)))
    with pytest.raises(OctoError) as caught:
        await decide(kit, task_id, **decision)
    assert (caught.value.code, caught.value.field_errors[0].pointer) == (code, pointer)
    assert await status(kit, task_id) == "waiting"


async def test_a_task_that_waits_for_nothing_cannot_be_approved(kit: TaskKit) -> None:
    task_id = await start(kit, ApprovalPolicy())
    with pytest.raises(OctoError, match="does not wait") as caught:
        await decide(kit, task_id, "approve")
    assert caught.value.code == "state_conflict"


async def test_another_tenant_sees_no_approval(kit: TaskKit) -> None:
    task_id = await start(kit, EVERY, FIRST)
    with pytest.raises(OctoError) as caught:
        await decide(kit, task_id, "approve", tenant="other")
    assert caught.value.code == "task_not_found"
    assert (await kit.approvals.list_pending("other")).approvals == ()
    [pending] = (await kit.approvals.list_pending(TENANT)).approvals
    assert (pending.task_id, pending.approval.approval_id) == (task_id, "a")


async def test_a_decision_between_reading_and_waiting_is_not_missed(kit: TaskKit) -> None:
    task_id = await kit.submit(approval=ApprovalPolicy(steps=("executor",)))
    kit.services.handlers |= {
        "planner.plan": plan_of(plan_step("slow"), plan_step("held", arm="executor")),
        "executor.execute": answer("done"),
    }
    requested = kit.approvals.request

    async def execute(_request: ServiceRequest) -> ExecuteResult:
        return ExecuteResult("done")

    async def request(*args: Any, suspend: bool) -> None:
        if suspend:
            # Just before the task would wait.
            await decide(kit, task_id, "approve")
        await requested(*args, suspend=suspend)

    kit.services.handlers["coder.execute"] = execute
    kit.approvals.request = request  # type: ignore[method-assign]
    await continue_task(kit)
    assert await status(kit, task_id) == "completed"


async def test_cancelling_a_waiting_task_cancels_its_approvals(kit: TaskKit) -> None:
    task_id = await start(kit, EVERY, FIRST)
    await kit.store.change(task_id, "task.cancelled", {"status": "cancelled"}, new_status="cancelled")
    assert (await kit.store.view(task_id, TENANT)).approvals[0].status == "cancelled"
    with pytest.raises(OctoError) as caught:
        await decide(kit, task_id, "approve")
    assert caught.value.code == "state_conflict"
