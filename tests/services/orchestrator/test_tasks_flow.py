from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from pathlib import Path

import msgspec
from orchestrator_kit import OrchestratorHarness, Script, problem

from octollm.arm import Context
from octollm.contracts.operations import AcceptRequest, AcceptResult
from octollm.contracts.task import Check, ExecuteResult, Plan, PlanRequest, PlanStep, Task
from octollm.errors import FieldError, OctoError, RetryStep, StopStep
from octollm.testing import wait_until


async def test_a_goal_goes_through_plan_step_judge_and_result(orch: OrchestratorHarness) -> None:
    view = await orch.run({"goal": "say hello"})
    assert (view.status, view.output, view.progress) == ("completed", "done: say hello", 100.0)
    events = await orch.history(view.task_id)
    assert [event["event_type"] for event in events] == [
        "task.accepted",
        "task.planning",
        "task.planned",
        "task.started",
        "step.started",
        "step.completed",
        "task.completed",
    ]
    assert [event["version"] for event in events] == [1, 2, 3, 4, 5, 6, 7]
    assert all(event["data"]["task_id"] == view.task_id for event in events)
    progress = [event["data"]["progress"] for event in events]
    assert progress == sorted(progress)
    assert len({event["traceparent"] for event in events}) == 1


async def test_the_text_of_a_step_is_saved(orch: OrchestratorHarness) -> None:
    view = await orch.run({"goal": "say hello"})
    answer = await orch.send("GET", f"/tasks/{view.task_id}/texts")
    texts = msgspec.json.decode(answer.body)["texts"]
    assert [(text["step"], text["text"]) for text in texts] == [("s1", "working on say hello")]
    completed = [e for e in await orch.history(view.task_id) if e["event_type"] == "step.completed"]
    assert completed[0]["data"]["text_length"] == len("working on say hello")


async def test_steps_without_a_dependency_run_side_by_side(orch: OrchestratorHarness, script: Script) -> None:
    together = asyncio.Barrier(2)

    def plan(request: PlanRequest) -> Plan:
        del request
        first, second = PlanStep("a", "A", "coder", "a"), PlanStep("b", "B", "coder", "b")
        return Plan((first, second, PlanStep("c", "C", "coder", "c", depends_on=("a", "b"))))

    async def execute(contract: Task, ctx: Context) -> ExecuteResult:
        del ctx
        if contract.goal != "c":
            async with asyncio.timeout(10):
                await together.wait()
            return ExecuteResult(output=contract.goal.upper())
        return ExecuteResult(output="+".join(contract.context.inputs[name] for name in ("a", "b")))

    script.plan, script.execute = plan, execute
    view = await orch.run({"goal": "both, then join"})
    assert (view.status, view.output) == ("completed", "A+B")


async def test_a_refused_result_is_retried_with_the_reasons(orch: OrchestratorHarness, script: Script) -> None:
    async def execute(contract: Task, ctx: Context) -> ExecuteResult:
        del ctx
        return ExecuteResult(output="better" if contract.context.reasons else "first")

    def accept(request: AcceptRequest) -> AcceptResult:
        good = request.result.output == "better"
        return AcceptResult(accepted=good, reasons=() if good else ("It is not better.",))

    script.execute, script.accept = execute, accept
    view = await orch.run({"goal": "improve"})
    assert (view.status, view.output) == ("completed", "better")
    assert script.executed[1].context.reasons == ("It is not better.",)
    failed = [e["data"] for e in await orch.history(view.task_id) if e["event_type"] == "step.failed"]
    assert [(data["attempt"], data["final"], data["reasons"]) for data in failed] == [(1, False, ["It is not better."])]


async def test_a_result_tells_what_the_judge_has_checked_and_what_nobody_has(
    orch: OrchestratorHarness, script: Script
) -> None:
    checks = (Check("criterion", True, "two words"), Check("unchecked", False, "friendly", checked_by="nobody"))
    script.accept = lambda _request: AcceptResult(accepted=True, score=0.75, checks=checks)
    view = await orch.run({"goal": "say hello"})
    assert view.steps[0].evidence is not None
    assert view.steps[0].evidence.checks == checks


async def test_a_result_refused_twice_fails_the_task_with_the_reasons(
    orch: OrchestratorHarness, script: Script
) -> None:
    script.accept = lambda _request: AcceptResult(accepted=False, reasons=("Never good.",))
    view = await orch.run({"goal": "hopeless"})
    assert view.status == "failed"
    assert view.error is not None
    assert (view.error.code, view.error.reasons) == ("not_accepted", ("Never good.",))
    assert len(script.executed) == 2
    assert view.steps[0].status == "failed"


async def test_after_a_failed_step_a_different_plan_is_tried_once(orch: OrchestratorHarness, script: Script) -> None:
    def plan(request: PlanRequest) -> Plan:
        return Plan((PlanStep("s1", "Do it", "coder", "second way" if request.reasons else "first way"),))

    def accept(request: AcceptRequest) -> AcceptResult:
        return AcceptResult(accepted="second" in request.result.output, reasons=("Try another way.",))

    script.plan, script.accept = plan, accept
    view = await orch.run({"goal": "find a way", "budget": {"max_retries": 0}})
    assert (view.status, view.output) == ("completed", "done: second way")
    assert "task.replanned" in [event["event_type"] for event in await orch.history(view.task_id)]
    assert script.planned[1].reasons == ("Try another way.",)


async def test_an_arms_failure_is_the_tasks_failure(orch: OrchestratorHarness, script: Script) -> None:
    async def execute(contract: Task, ctx: Context) -> ExecuteResult:
        raise OctoError("No model is there.", code="no_model", field_errors=[FieldError("", "Pull one.")])

    script.execute = execute
    view = await orch.run({"goal": "think"})
    assert view.status == "failed"
    assert view.error is not None
    assert (view.error.code, view.error.reasons) == ("no_model", ("Pull one.",))
    assert len(script.executed) == 1  # the same again would only fail again


async def test_an_arm_asks_for_another_attempt(orch: OrchestratorHarness, script: Script) -> None:
    attempts: list[int | None] = []

    async def execute(contract: Task, ctx: Context) -> ExecuteResult:
        attempts.append(ctx.info.attempt)
        if len(attempts) == 1:
            raise RetryStep("The printer is warming up.", after=0.01)
        return ExecuteResult(output=f"printed: {contract.context.reasons[0]}")

    script.execute = execute
    view = await orch.run({"goal": "print"})
    assert (view.status, view.output) == ("completed", "printed: The printer is warming up.")
    # The call's own retries must not repeat it: each attempt is one call.
    assert attempts == [1, 2]


async def test_an_arm_asks_for_another_attempt_too_often(orch: OrchestratorHarness, script: Script) -> None:
    async def execute(contract: Task, ctx: Context) -> ExecuteResult:
        raise RetryStep("The printer is warming up.")

    script.execute = execute
    view = await orch.run({"goal": "print", "budget": {"max_retries": 2}})
    assert view.error is not None
    assert (view.error.code, view.error.reasons) == ("step_retry", ("The printer is warming up.",))
    assert len(script.executed) == 3


async def test_an_arm_stops_its_step(orch: OrchestratorHarness, script: Script) -> None:
    async def execute(contract: Task, ctx: Context) -> ExecuteResult:
        raise StopStep("There is no printer.")

    script.execute = execute
    view = await orch.run({"goal": "print", "budget": {"max_retries": 5}})
    assert view.error is not None
    assert (view.status, view.error.code, view.error.reasons) == ("failed", "step_stopped", ("There is no printer.",))
    assert len(script.executed) == 1


async def test_cancelling_stops_the_arm(orch: OrchestratorHarness, script: Script) -> None:
    async def execute(contract: Task, ctx: Context) -> ExecuteResult:
        await asyncio.Event().wait()
        raise AssertionError

    script.execute = execute
    task = await orch.submit({"goal": "wait for ever"})
    await wait_until(lambda: script.executed, description="the arm is called")
    answer = await orch.send("POST", f"/tasks/{task.task_id}/cancel")
    assert answer.status == 200
    assert msgspec.json.decode(answer.body)["status"] == "cancelled"
    await wait_until(lambda: script.cancelled == ["wait for ever"], description="the arm's work is cancelled")
    again = await orch.send("POST", f"/tasks/{task.task_id}/cancel")
    assert (again.status, problem(again)["code"]) == (409, "state_conflict")
    assert (await orch.task(task.task_id)).steps[0].status == "cancelled"


async def test_the_deadline_is_enforced(orch: OrchestratorHarness, script: Script) -> None:
    async def execute(contract: Task, ctx: Context) -> ExecuteResult:
        await asyncio.Event().wait()
        raise AssertionError

    script.execute = execute
    view = await orch.run({"goal": "too slow", "budget": {"max_time_seconds": 2}})
    assert view.status == "failed"
    assert view.error is not None
    assert view.error.code == "deadline_exceeded"
    await wait_until(lambda: script.cancelled, description="the arm's work is cancelled")


async def test_the_same_key_makes_one_task(orch: OrchestratorHarness) -> None:
    answers = await asyncio.gather(
        *(orch.send("POST", "/tasks", {"goal": "once"}, idempotency_key="k1") for _ in range(8))
    )
    ids = {msgspec.json.decode(answer.body)["task_id"] for answer in answers}
    assert {answer.status for answer in answers} == {201}
    assert len(ids) == 1
    other = await orch.send("POST", "/tasks", {"goal": "another"}, idempotency_key="k1")
    assert (other.status, problem(other)["code"]) == (409, "idempotency_conflict")


async def test_an_assigned_arm_needs_no_plan(orch: OrchestratorHarness, script: Script) -> None:
    view = await orch.run({"goal": "straight", "assigned_arm": "coder"})
    assert (view.status, view.output) == ("completed", "done: straight")
    assert script.planned == []


async def test_tasks_are_listed_newest_first_in_pages(orch: OrchestratorHarness) -> None:
    ids = [(await orch.submit({"goal": f"goal {number}"})).task_id for number in range(5)]
    seen: list[str] = []
    cursor = ""
    while True:
        answer = await orch.send("GET", f"/tasks?limit=2{cursor}")
        page = msgspec.json.decode(answer.body)
        seen += [task["task_id"] for task in page["tasks"]]
        if page["cursor"] is None:
            break
        cursor = f"&cursor={page['cursor']}"
    assert seen == ids[::-1]
    assert problem(await orch.send("GET", "/tasks?cursor=nonsense"))["code"] == "invalid_parameter"


async def test_events_are_read_in_order_and_followed(orch: OrchestratorHarness) -> None:
    view = await orch.run({"goal": "tell"})

    async def numbered() -> bool:
        answer = await orch.send("GET", "/events?after=0&limit=500")
        found = msgspec.json.decode(answer.body)["events"]
        return [e["event_type"] for e in found if e["subject"] == f"task/{view.task_id}"][-1:] == ["task.completed"]

    await wait_until(numbered, description="the events are numbered")
    answer = await orch.send("GET", "/events?after=0&limit=500")
    positions = [event["seq"] for event in msgspec.json.decode(answer.body)["events"]]
    assert positions == sorted(set(positions))


async def test_a_submission_cut_off_before_its_answer_is_not_done_twice(orch: OrchestratorHarness) -> None:
    first = await orch.submit({"goal": "once"}, idempotency_key="cut")
    # As after a crash between the task's transaction and the storing of the answer: the claim's lease ran out.
    path = orch.home / "data" / "orchestrator.db"
    await asyncio.to_thread(_cut_off, path, first.task_id)
    again = await orch.submit({"goal": "once"}, idempotency_key="cut")
    assert again.task_id == first.task_id


def _cut_off(path: Path, task_id: str) -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        db.execute(
            "UPDATE idempotency SET state = 'claimed', lease_until = 0, headers = json_object('done', ?)"
            " WHERE key = 'cut'",
            (task_id,),
        )
        db.execute("COMMIT")
