"""Attempts, retry and fork over HTTP: what is kept, what runs again, and what is refused."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from orchestrator_kit import OrchestratorHarness, Script, problem

from octollm.arm import Context
from octollm.contracts.attempts import MAX_EXCERPT, AttemptList
from octollm.contracts.operations import AcceptResult
from octollm.contracts.task import ExecuteResult, Plan, PlanRequest, PlanStep, Task

LONG = "word " * MAX_EXCERPT


def three_steps(request: PlanRequest) -> Plan:
    files = tuple(file.name for file in request.context.files)
    first, second = PlanStep("s1", "One", "coder", "one", files=files), PlanStep("s2", "Two", "coder", "two", ("s1",))
    return Plan((first, second, PlanStep("s3", "Three", "coder", "three", ("s2",))))


@pytest.fixture
def failing(script: Script) -> list[str]:
    """Have the second step fail for as long as the list is not empty."""
    fails = ["two"]

    async def execute(contract: Task, ctx: Context) -> ExecuteResult:
        del ctx
        if contract.goal in fails:
            return ExecuteResult("", ())
        return ExecuteResult(f"{contract.goal} of {sorted(contract.context.inputs.values())}"[:60])

    script.plan, script.execute = three_steps, execute
    script.accept = lambda request: AcceptResult(bool(request.result.output), ("It is empty.",), 0.5)
    return fails


async def attempts(orch: OrchestratorHarness, task_id: str) -> list[tuple[str, int, str]]:
    answer = await orch.send("GET", f"/tasks/{task_id}/attempts")
    assert answer.status == 200, answer.body
    listed = msgspec.json.decode(answer.body, type=AttemptList).attempts
    return [(each.step, each.attempt, each.status) for each in listed]


async def again(orch: OrchestratorHarness, task_id: str, how: str, body: object = None, **headers: str) -> Any:
    return await orch.send("POST", f"/tasks/{task_id}/{how}", body, **headers)


async def test_a_failed_task_is_forked_at_its_failed_step_and_retried_from_the_start(
    orch: OrchestratorHarness, script: Script, failing: list[str]
) -> None:
    failed = await orch.run({"goal": "go", "context": {"files": [{"name": "a.txt", "text": "x"}]}})
    assert failed.status == "failed"
    # A rejected result is planned anew once; the same plan again ends the task.
    tried = [("s1", 1, "accepted"), ("s2", 1, "rejected"), ("s2", 2, "rejected")]
    assert await attempts(orch, failed.task_id) == tried
    failing.clear()
    script.executed.clear()
    planned = len(script.planned)
    made = await again(orch, failed.task_id, "fork", {}, Idempotency_Key="fork-1")
    assert made.status == 201, made.body
    fork = msgspec.json.decode(made.body)
    assert (fork["forked_from"], made.headers["location"]) == (failed.task_id, f"/tasks/{fork['task_id']}")
    repeated = await again(orch, failed.task_id, "fork", {}, Idempotency_Key="fork-1")
    assert msgspec.json.decode(repeated.body)["task_id"] == fork["task_id"]
    view = await orch.finished(fork["task_id"])
    assert view.status == "completed", view.error
    assert [task.goal for task in script.executed] == ["two", "three"]
    assert script.executed[0].context.inputs == {"s1": "one of []"}
    assert len(script.planned) == planned, "the plan is that of the task before"
    assert await attempts(orch, fork["task_id"]) == [
        ("s1", 1, "reused"), ("s2", 1, "accepted"), ("s3", 1, "accepted"),
    ]  # fmt: skip
    assert await attempts(orch, failed.task_id) == tried, "a task that has ended stays as it is"
    assert (await orch.task(failed.task_id)).status == "failed"
    script.executed.clear()
    retried = msgspec.json.decode((await again(orch, failed.task_id, "retry")).body)
    view = await orch.finished(retried["task_id"])
    assert (view.status, view.forked_from, len(script.executed)) == ("completed", failed.task_id, 3)
    assert [file.name for file in view.files] == ["a.txt"]


async def test_a_fork_of_a_fork_keeps_what_was_reused(orch: OrchestratorHarness, failing: list[str]) -> None:
    failing.clear()
    task_id = (await orch.run({"goal": "go"})).task_id
    for step, kept in (("s3", 2), ("s2", 1), ("s1", 0)):
        made = msgspec.json.decode((await again(orch, task_id, "fork", {"from": step})).body)
        assert (await orch.finished(made["task_id"])).status == "completed"
        reused = [row for row in await attempts(orch, made["task_id"]) if row[2] == "reused"]
        assert len(reused) == kept, step
        task_id = made["task_id"]


async def test_what_cannot_run_again_is_refused(orch: OrchestratorHarness, script: Script, failing: list[str]) -> None:
    failing.clear()
    ended = (await orch.run({"goal": "go"})).task_id
    unknown = await again(orch, ended, "fork", {"from": "s9"})
    found = problem(unknown)
    assert (unknown.status, found["code"], found["errors"][0]["pointer"]) == (400, "step_unknown", "/from")
    done = await again(orch, ended, "fork", {})
    assert (done.status, problem(done)["code"]) == (400, "step_unknown"), "every step of it completed"
    odd = await again(orch, ended, "fork", {"form": "s1"})
    assert (odd.status, problem(odd)["code"]) == (400, "unknown_field")
    nobody = "task-" + "0" * 32
    for how in ("retry", "fork"):
        missing = await again(orch, nobody, how, {} if how == "fork" else None)
        assert (missing.status, problem(missing)["code"]) == (404, "task_not_found")
    assert (await orch.send("GET", f"/tasks/{nobody}/attempts")).status == 404
    running = asyncio.Event()

    async def hang(contract: Task, ctx: Context) -> ExecuteResult:
        del contract, ctx
        running.set()
        await asyncio.Event().wait()
        raise AssertionError

    script.execute = hang
    open_task = (await orch.submit({"goal": "go"})).task_id
    await running.wait()
    for how in ("retry", "fork"):
        early = await again(orch, open_task, how, {"from": "s1"} if how == "fork" else None)
        assert (early.status, problem(early)["code"]) == (409, "state_conflict")
    assert await attempts(orch, open_task) == [("s1", 1, "running")]
    await orch.send("POST", f"/tasks/{open_task}/cancel")
    assert await attempts(orch, open_task) == [("s1", 1, "cancelled")]


async def test_a_long_output_is_read_by_its_digest_for_as_long_as_the_task_is_there(
    orch: OrchestratorHarness, script: Script
) -> None:
    async def execute(contract: Task, ctx: Context) -> ExecuteResult:
        del contract, ctx
        return ExecuteResult(LONG)

    script.execute = execute
    script.accept = lambda _request: AcceptResult(accepted=False, reasons=("Too long.",), score=0.0)
    failed = await orch.run({"goal": "go", "assigned_arm": "coder"})
    page = msgspec.json.decode((await orch.send("GET", f"/tasks/{failed.task_id}/attempts")).body, type=AttemptList)
    output = page.attempts[0].outcome.output
    assert output is not None
    assert (len(output.text), output.length) == (MAX_EXCERPT, len(LONG))
    whole = await orch.send("GET", f"/tasks/{failed.task_id}/artifacts/{output.digest}")
    assert whole.body.decode() == LONG
    refused = await orch.send("GET", f"/tasks/{failed.task_id}/artifacts/{'0' * 64}")
    assert (refused.status, problem(refused)["code"]) == (404, "file_not_found")


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"goal": "a\x00b"}, "/goal"),
        ({"goal": "x", "constraints": ["a", "\x00"]}, "/constraints/1"),
        ({"goal": "x", "context": {"files": [{"name": "a.txt", "text": "\x00"}]}}, "/context/files/0/text"),
    ],
)
async def test_nul_is_refused_before_a_database_sees_it(
    orch: OrchestratorHarness, body: dict[str, Any], pointer: str
) -> None:
    answer = await orch.send("POST", "/tasks", body)
    found = problem(answer)
    assert (answer.status, found["code"], found["errors"][0]["pointer"]) == (400, "invalid_body", pointer)
