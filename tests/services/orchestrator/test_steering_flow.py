"""Steering over HTTP: a pause that reaches the arm and survives a restart, instructions, larger limits, refusals."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest
from orchestrator_kit import OrchestratorHarness, Script, orchestrator_kit, problem

from octollm.arm import Context
from octollm.contracts.task import ExecuteResult, Plan, PlanStep, Task
from octollm.errors import OctoError
from octollm.tasks.state import SKIPPED_RESULT
from octollm.testing import wait_until


class Hanging:
    """An arm that hangs for as long as it is told to."""

    def __init__(self, script: Script) -> None:
        self.begun = asyncio.Event()
        self.hangs = True
        script.execute = self.execute

    async def execute(self, contract: Task, ctx: Context) -> ExecuteResult:
        del ctx
        self.begun.set()
        if self.hangs:
            await asyncio.Event().wait()
        return ExecuteResult(f"done: {contract.goal} {list(contract.context.instructions)}")


async def steer(orch: OrchestratorHarness, task_id: str, how: str, body: object = None, **headers: str) -> Any:
    return await orch.send("POST", f"/tasks/{task_id}/{how}", body, **headers)


async def audited(orch: OrchestratorHarness, action: str) -> dict[str, Any]:
    """Return the audit row of an action, once it is sealed."""
    rows: list[dict[str, Any]] = []

    async def find() -> bool:
        page = msgspec.json.decode((await orch.send("GET", "/audit?limit=500")).body)
        rows.extend(row for row in page["rows"] if row["action"] == action)
        return bool(rows)

    await wait_until(find, description=f"{action} is in the audit log")
    return rows[0]


async def test_a_pause_stops_the_arm_survives_a_restart_and_the_instruction_is_kept_to(
    tmp_path: Path, script: Script
) -> None:
    arm = Hanging(script)
    async with orchestrator_kit(tmp_path, script) as before:
        task_id = (await before.submit({"goal": "write"})).task_id
        await arm.begun.wait()
        paused = await steer(before, task_id, "pause")
        assert (paused.status, msgspec.json.decode(paused.body)["status"]) == (200, "paused")
        assert script.cancelled == ["write"], "the call in flight is closed when the pause answers"
        again = await steer(before, task_id, "pause")
        assert (again.status, msgspec.json.decode(again.body)["version"]) == (
            200, msgspec.json.decode(paused.body)["version"],
        )  # fmt: skip
    arm.hangs = False
    async with orchestrator_kit(tmp_path, script) as after:
        told = await steer(after, task_id, "instructions", {"text": " In German. "}, Idempotency_Key="told-1")
        assert told.status == 200, told.body
        await steer(after, task_id, "instructions", {"text": " In German. "}, Idempotency_Key="told-1")
        view = await after.task(task_id)
        assert (view.status, [each.text for each in view.instructions]) == ("paused", ["In German."])
        assert len(script.executed) == 1, "no worker took it meanwhile"
        assert (await steer(after, task_id, "resume")).status == 200
        view = await after.finished(task_id)
        assert (view.status, view.output) == ("completed", "done: write ['In German.']")
        row = await audited(after, "task.instructed")
        assert (row["target"], row["detail"], row["sub"]) == (task_id, {"text": "In German."}, "local-user")


async def test_the_tokens_of_a_paused_run_are_refused(orch: OrchestratorHarness, script: Script) -> None:
    arm = Hanging(script)
    task_id = (await orch.submit({"goal": "write"})).task_id
    await arm.begun.wait()
    await steer(orch, task_id, "pause")
    revoked = [event for event in await events(orch, "token.revoked") if event["data"]["kind"] == "run"]
    assert [event["data"]["value"].startswith(task_id) for event in revoked] == [True]
    await steer(orch, task_id, "resume")
    await orch.send("POST", f"/tasks/{task_id}/cancel")


async def events(orch: OrchestratorHarness, kind: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []

    async def look() -> bool:
        page = msgspec.json.decode((await orch.send("GET", "/events?limit=500")).body)
        found[:] = [event for event in page["events"] if event["event_type"] == kind]
        return bool(found)

    await wait_until(look, description=f"{kind} is in the log")
    return found


async def test_limits_are_raised_while_the_task_runs(orch: OrchestratorHarness, script: Script) -> None:
    arm = Hanging(script)
    task_id = (await orch.submit({"goal": "write", "budget": {"max_tokens": 100, "max_time_seconds": 60}})).task_id
    await arm.begun.wait()
    before = await orch.task(task_id)
    extended = await steer(orch, task_id, "extend", {"max_tokens": 500, "max_time_seconds": 120})
    assert extended.status == 200, extended.body
    view = await orch.task(task_id)
    assert (view.budget.max_tokens, view.budget.max_time_seconds) == (500, 120)
    assert before.deadline is not None and view.deadline is not None and view.deadline > before.deadline
    for body, code, pointer in (
        ({"max_tokens": 499}, "budget_invalid", "/max_tokens"),
        ({"max_tokens": 10**20}, "budget_invalid", "/max_tokens"),
        ({"max_cost_usd": 1}, "budget_invalid", "/max_cost_usd"),
        ({"deadline": "2001-01-01T00:00:00Z"}, "deadline_invalid", "/deadline"),
        ({"deadline": "soon"}, "deadline_invalid", "/deadline"),
        ({"max_token": 1}, "unknown_field", "/max_token"),
    ):
        refused = await steer(orch, task_id, "extend", body)
        found = problem(refused)
        assert (refused.status, found["code"], found["errors"][0]["pointer"]) == (400, code, pointer)
    assert (await orch.task(task_id)).version == view.version, "a refusal leaves no event"
    await orch.send("POST", f"/tasks/{task_id}/cancel")


@pytest.mark.parametrize("text", ["", "   ", "a\x00b", "x" * 4001, 7])
async def test_a_wrong_instruction_is_refused_with_its_place(orch: OrchestratorHarness, text: object) -> None:
    task_id = (await orch.submit({"goal": "write"})).task_id
    refused = await steer(orch, task_id, "instructions", {"text": text})
    found = problem(refused)
    assert (refused.status, found["code"], found["errors"][0]["pointer"]) == (400, "invalid_body", "/text")


STEERING = (
    ("pause", None),
    ("resume", None),
    ("instructions", {"text": "x"}),
    ("extend", {"max_tokens": 100_000}),
    ("skip", {"step": "s1"}),
)


async def test_steering_needs_its_scope_and_a_task_that_goes_on(orch: OrchestratorHarness, script: Script) -> None:
    ended = (await orch.run({"goal": "write"})).task_id
    nobody = "task-" + "0" * 32
    for how, body in STEERING:
        late = await steer(orch, ended, how, body)
        assert (late.status, problem(late)["code"]) == (409, "state_conflict"), how
        missing = await steer(orch, nobody, how, body)
        assert (missing.status, problem(missing)["code"]) == (404, "task_not_found"), how
    Hanging(script)
    task_id = (await orch.submit({"goal": "write"})).task_id
    key = await orch.send("POST", "/keys", {"name": "reader", "scope": "tasks:read tasks:create"})
    own, orch.bearer = orch.bearer, await orch.login(msgspec.json.decode(key.body)["secret"])
    for how, body in STEERING:
        refused = await steer(orch, task_id, how, body)
        assert (refused.status, problem(refused)["code"]) == (403, "scope_missing"), how
    orch.bearer = own
    await orch.send("POST", f"/tasks/{task_id}/cancel")


async def test_a_step_that_is_retried_is_skipped_and_its_dependents_are_told(
    orch: OrchestratorHarness, script: Script
) -> None:
    """The second attempt of the first step hangs; the task goes on without it, and no other step runs twice."""
    script.plan = lambda _request: Plan(
        (
            PlanStep("s1", "First", "coder", "first"),
            PlanStep("s2", "Beside", "coder", "beside"),
            PlanStep("s3", "Last", "coder", "last", depends_on=("s1", "s2")),
        )
    )
    retried = asyncio.Event()

    async def execute(contract: Task, ctx: Context) -> ExecuteResult:
        del ctx
        if contract.goal == "first":
            if not contract.context.reasons:
                raise OctoError("Not yet.", code="model_output_invalid")
            retried.set()
            await asyncio.Event().wait()
        return ExecuteResult(f"{contract.goal}: {contract.context.inputs.get('s1', '')}")

    script.execute = execute
    task_id = (await orch.submit({"goal": "write"})).task_id
    await retried.wait()
    for _ in range(2):
        skipped = await steer(orch, task_id, "skip", {"step": "s1"})
        assert skipped.status == 200, skipped.body
    assert script.cancelled.count("first") == 1, "its call is closed when the skip answers"
    view = await orch.finished(task_id)
    assert (view.status, view.output) == ("completed", f"last: {SKIPPED_RESULT.output}"), view.error
    assert [step.status for step in view.steps] == ["skipped", "completed", "completed"]
    assert [each.goal for each in script.executed] == ["first", "beside", "first", "last"], "nothing is done twice"
    (event,) = (each for each in await orch.history(task_id) if each["event_type"] == "step.skipped")
    assert (event["data"]["step"], event["data"]["by"], event["data"]["status"]) == ("s1", "local-user", "running")
    assert (await audited(orch, "step.skipped"))["detail"] == {"step": "s1"}
    late = await steer(orch, task_id, "skip", {"step": "s3"})
    assert problem(late)["code"] == "state_conflict"


async def test_a_step_that_waits_for_an_approval_is_skipped(orch: OrchestratorHarness) -> None:
    task_id = (await orch.submit({"goal": "write", "approval": {"steps": ["coder"]}})).task_id

    async def waits() -> bool:
        return (await orch.task(task_id)).status == "waiting"

    await wait_until(waits, description="the task waits for the approval")
    unknown = await steer(orch, task_id, "skip", {"step": "s9"})
    assert (unknown.status, problem(unknown)["code"]) == (400, "step_unknown")
    assert (await steer(orch, task_id, "skip", {"step": "s1"})).status == 200
    view = await orch.finished(task_id)
    assert (view.status, view.output, view.approvals[0].status) == ("completed", SKIPPED_RESULT.output, "cancelled")
