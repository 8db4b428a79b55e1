"""Approvals over HTTP: policies, decisions and their scope, a restart in between, and what the audit log has."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest
from orchestrator_kit import OrchestratorHarness, Script, orchestrator_kit, problem

from octollm.arm import Context
from octollm.contracts.api import TaskView
from octollm.contracts.task import ExecuteResult, Plan, PlanRequest, PlanStep, Task
from octollm.testing import wait_until


async def waiting(orch: OrchestratorHarness, task_id: str) -> TaskView:
    async def is_waiting() -> bool:
        return (await orch.task(task_id)).status == "waiting"

    await wait_until(is_waiting, description="the task waits")
    return await orch.task(task_id)


async def decide(orch: OrchestratorHarness, task_id: str, **decision: Any) -> Any:
    return await orch.send("POST", f"/tasks/{task_id}/approval", decision)


async def test_an_approval_survives_a_restart_and_another_worker_goes_on(tmp_path: Path, script: Script) -> None:
    async with orchestrator_kit(tmp_path, script, OCTOLLM_APPROVAL_STEPS="coder") as before:
        # The task asks for less than the installation, which counts all the same.
        task_id = (await before.submit({"goal": "say hello", "approval": {"steps": []}})).task_id
        view = await waiting(before, task_id)
        assert [each.reason for each in view.approvals] == ["Each step of coder has to be approved."]
    async with orchestrator_kit(tmp_path, script) as after:
        listed = msgspec.json.decode((await after.send("GET", "/approvals")).body)["approvals"]
        assert [(each["task_id"], each["approval"]["approval_id"]) for each in listed] == [(task_id, "s1")]
        assert script.executed == []
        answer = await decide(after, task_id, decision="approve", goals={"s1": "say goodbye"}, comment="Politer.")
        assert answer.status == 200, answer.body
        view = await after.finished(task_id)
        assert (view.status, view.output) == ("completed", "done: say goodbye")

        async def find_row() -> bool:
            page = msgspec.json.decode((await after.send("GET", "/audit")).body)
            rows.extend(row for row in page["rows"] if row["action"] == "task.approved")
            return bool(rows)

        rows: list[dict[str, Any]] = []
        await wait_until(find_row, description="the decision is in the audit log, once it is sealed")
        row = rows[0]
        assert (row["target"], row["detail"]["comment"], row["detail"]["goals"]) == (task_id, "Politer.", ["s1"])


async def test_a_rejection_stops_the_steps_that_run(orch: OrchestratorHarness, script: Script) -> None:
    running = asyncio.Event()

    def plan(request: PlanRequest) -> Plan:
        held = PlanStep("held", "Held", "coder", request.goal, approval="It deletes a file.")
        return Plan((PlanStep("slow", "Slow", "coder", "slow"), held))

    async def execute(contract: Task, ctx: Context) -> ExecuteResult:
        del contract, ctx
        running.set()
        await asyncio.sleep(60)
        return ExecuteResult("never")

    script.plan, script.execute = plan, execute
    task_id = (await orch.submit({"goal": "delete it"})).task_id
    await running.wait()

    async def is_requested() -> bool:
        return bool((await orch.task(task_id)).approvals)

    await wait_until(is_requested, description="the approval is requested")
    assert (await decide(orch, task_id, decision="reject", comment="Keep it.")).status == 200
    await wait_until(lambda: script.cancelled == ["slow"], description="the running step is cancelled")
    view = await orch.task(task_id)
    assert view.error is not None
    assert (view.status, view.error.code, view.error.reasons) == ("failed", "approval_rejected", ("Keep it.",))
    again = await decide(orch, task_id, decision="approve")
    assert (again.status, problem(again)["code"]) == (409, "state_conflict")


@pytest.mark.parametrize(
    ("policy", "pointer"),
    [
        ({"steps": ["codr"]}, "/approval/steps/0"),
        ({"steps": ["coder", "executor:htpp"]}, "/approval/steps/1"),
        ({"steps": ["*"] * 33}, "/approval/steps"),
        ({"cost_above_usd": -1}, "/approval/cost_above_usd"),
        ({"expires_seconds": 0}, "/approval/expires_seconds"),
        ({"expires_seconds": 1e9}, "/approval/expires_seconds"),
    ],
)
async def test_a_wrong_policy_is_refused_with_its_place(
    orch: OrchestratorHarness, policy: object, pointer: str
) -> None:
    answer = await orch.send("POST", "/tasks", {"goal": "say hello", "approval": policy})
    found = problem(answer)
    assert (answer.status, found["code"], found["errors"][0]["pointer"]) == (400, "approval_invalid", pointer)


async def test_a_decision_needs_its_scope_and_the_task(orch: OrchestratorHarness) -> None:
    task_id = (await orch.submit({"goal": "say hello", "approval": {"plan": True}})).task_id
    await waiting(orch, task_id)
    key = await orch.send("POST", "/keys", {"name": "reader", "scope": "tasks:read tasks:create"})
    secret, own = msgspec.json.decode(key.body)["secret"], orch.bearer
    orch.bearer = await orch.login(secret)
    answer = await decide(orch, task_id, decision="approve")
    assert (answer.status, problem(answer)["code"]) == (403, "scope_missing")
    orch.bearer = own
    unknown = await decide(orch, "task-" + "0" * 32, decision="approve")
    assert (unknown.status, problem(unknown)["code"]) == (404, "task_not_found")
    wrong = await decide(orch, task_id, decision="perhaps")
    assert (wrong.status, problem(wrong)["code"]) == (400, "invalid_body")
    assert (await decide(orch, task_id, decision="approve", approval_id="plan")).status == 200
    assert (await orch.finished(task_id)).status == "completed"
