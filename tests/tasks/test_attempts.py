"""Attempts: what each leaves behind, on both databases, and what a fork takes over."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from task_kit import TENANT, ServiceRequest, TaskKit, plan_of, plan_step, raises

from octollm.contracts.attempts import MAX_EXCERPT, AttemptQuery, AttemptView
from octollm.contracts.operations import AcceptResult
from octollm.contracts.task import Artifact, Budget, ExecuteResult, Plan, PlanStep, Task, Usage
from octollm.errors import OctoError
from octollm.storage import Transaction
from octollm.tasks.attempts import AttemptReader, copy_results
from octollm.tasks.changes import NewTask
from octollm.tasks.ledger import ReservationRequest
from octollm.tasks.runner import TaskRunner
from octollm.tasks.state import find_reusable_steps

LONG = "é" * (MAX_EXCERPT + 1)
FIRST, SECOND = plan_step("a"), plan_step("b", "a")


async def run(kit: TaskKit, *steps: PlanStep, **contract: Any) -> str:
    """Run a task with this plan to its end."""
    task_id = await kit.submit(**contract)
    kit.services.handlers["planner.plan"] = plan_of(*steps)
    await TaskRunner(kit.deps, await kit.claim()).run()
    return task_id


async def attempts(kit: TaskKit, task_id: str, **query: Any) -> tuple[AttemptView, ...]:
    return (await AttemptReader(kit.db).list(task_id, AttemptQuery(**query))).attempts


async def test_every_attempt_is_kept_with_input_output_verdict_and_cost(each_kit: TaskKit) -> None:
    kit = each_kit

    async def execute(request: ServiceRequest) -> ExecuteResult:
        kit.clock.advance(1.5)
        inputs = request.body.get("context", {}).get("inputs", {})
        return ExecuteResult(LONG if not inputs else f"read {len(inputs['a'])}")

    async def accept(request: ServiceRequest) -> AcceptResult:
        first = request.key is not None and request.key.endswith(":b:1:accept")
        return AcceptResult(accepted=not first, reasons=("Too short.",) if first else (), score=0.25)

    kit.services.handlers |= {"coder.execute": execute, "judge.accept": accept}
    task_id = await run(kit, FIRST, SECOND)
    one, two, three = await attempts(kit, task_id)
    assert [(each.step, each.attempt, each.status) for each in (one, two, three)] == [
        ("a", 1, "accepted"), ("b", 1, "rejected"), ("b", 2, "accepted"),
    ]  # fmt: skip
    assert one.outcome.output is not None
    assert (one.outcome.output.text, one.outcome.output.length) == (LONG[:MAX_EXCERPT], len(LONG))
    assert two.request.inputs["a"] == one.outcome.output, "the same text by the same digest"
    assert three.request.reasons == ("Too short.",)
    assert two.outcome.verdict is not None
    assert (two.outcome.verdict.reasons, two.outcome.verdict.score) == (("Too short.",), 0.25)
    assert (two.duration_ms, two.arm, two.title, two.run) == (1500, "coder", "B", 1)
    reader = AttemptReader(kit.db)
    assert await reader.has_file(task_id, one.outcome.output.digest)
    assert not await reader.has_file(task_id, "0" * 64)
    assert await attempts(kit, task_id, step="b") == (two, three)


async def test_the_ledger_says_what_an_attempt_cost(each_kit: TaskKit) -> None:
    kit = each_kit

    async def execute(request: ServiceRequest) -> ExecuteResult:
        task_id = request.body["task_id"]
        for key, price in (("one", 0.5), ("two", 0.25)):
            asked = ReservationRequest(TENANT, task_id, "a", 1, 1, f"{task_id}:{key}", "m", 10, 20, price)
            held = await kit.ledger.reserve(asked)
            if key == "one":
                await kit.ledger.settle(held.id, Usage(10, 5, 7.5), b"{}")
        return ExecuteResult("done")

    kit.services.handlers["coder.execute"] = execute
    task_id = await run(kit, FIRST, budget=Budget(max_tokens=1000))
    assert [(each.tokens, each.cost_usd) for each in await attempts(kit, task_id)] == [(15, 7.5)]
    async with kit.db.transaction() as tx:
        # Nobody settled the second call: it counts at its bound.
        await kit.ledger.settle_open(tx, task_id)
    assert [(each.tokens, each.cost_usd) for each in await attempts(kit, task_id)] == [(45, 15.0)]


async def test_a_failure_is_kept_with_its_code_and_an_end_cancels_what_ran_beside(each_kit: TaskKit) -> None:
    kit = each_kit
    kit.services.handlers["coder.execute"] = raises(OctoError("No \x00 authority.", code="authority_missing"))
    task_id = await run(kit, FIRST)
    [attempt] = await attempts(kit, task_id)
    assert attempt.outcome.error is not None
    assert (attempt.status, attempt.outcome.error.code) == ("failed", "authority_missing")
    assert attempt.outcome.error.detail == "No \N{REPLACEMENT CHARACTER} authority."
    view = await kit.store.view(task_id, TENANT)
    assert (view.status, view.steps[0].reasons) == ("failed", ("No \N{REPLACEMENT CHARACTER} authority.",))


async def test_output_with_nul_is_stored_alike_on_both_databases(each_kit: TaskKit) -> None:
    kit = each_kit

    async def execute(_request: ServiceRequest) -> ExecuteResult:
        return ExecuteResult("a\x00b", (Artifact("x\x00.txt", "0" * 64, 1, "text/plain"),))

    kit.services.handlers["coder.execute"] = execute
    task_id = await run(kit, FIRST)
    view = await kit.store.view(task_id, TENANT)
    shown = "a\N{REPLACEMENT CHARACTER}b"
    assert (view.status, view.output, view.artifacts[0].name) == ("completed", shown, "x\N{REPLACEMENT CHARACTER}.txt")


async def test_a_page_of_attempts_goes_on_where_the_one_before_ended(each_kit: TaskKit) -> None:
    kit = each_kit
    names = [f"s{number}" for number in range(7)]
    kit.services.handlers["coder.execute"] = lambda _request: _done()
    task_id = await run(kit, *(plan_step(name) for name in names))
    seen, cursor = list[str](), ""
    while True:
        page = await AttemptReader(kit.db).list(task_id, AttemptQuery(limit=2, cursor=cursor))
        seen += [each.step for each in page.attempts]
        if page.cursor is None:
            break
        cursor = page.cursor
    assert seen == names
    with pytest.raises(OctoError, match="cursor is invalid"):
        await AttemptReader(kit.db).list(task_id, AttemptQuery(cursor="nonsense"))


async def _done() -> ExecuteResult:
    return ExecuteResult("done")


async def test_a_fork_takes_over_the_results_before_its_step_and_runs_the_rest(each_kit: TaskKit) -> None:
    kit = each_kit
    outputs = iter(("one", LONG, "other"))

    async def execute(_request: ServiceRequest) -> ExecuteResult:
        return ExecuteResult(next(outputs))

    kit.services.handlers["coder.execute"] = execute
    source = await run(kit, FIRST, SECOND)
    fork = f"task-{kit.ids.hex()}"

    async def copy(tx: Transaction) -> None:
        await copy_results(tx, source, fork, ["a"])

    new = NewTask(
        fork,
        TENANT,
        "ada",
        "k",
        "",
        Task("do it"),
        "c",
        "",
        kit.clock.now() + 60,
        "task",
        source,
        Plan((FIRST, SECOND)),
    )
    view = await kit.store.create(new, copy)
    assert (view.forked_from, view.steps) == (source, ())
    kit.services.handlers["planner.plan"] = raises(OctoError("nobody plans anew"))
    await TaskRunner(kit.deps, await kit.claim()).run()
    view = await kit.store.view(fork, TENANT)
    assert (view.status, view.output, [step.output for step in view.steps]) == ("completed", "other", ["one", "other"])
    events = dict(await kit.events(fork))
    assert (events["task.accepted"]["forked_from"], events["task.planned"]["reused"]) == (source, ["a"])
    shown = [(each.step, each.status, each.tokens) for each in await attempts(kit, fork)]
    assert shown == [("a", "reused", 0), ("b", "accepted", 0)]
    # The task that it came from stays as it was.
    assert (await kit.store.view(source, TENANT)).output == LONG


@st.composite
def plans(draw: st.DrawFn) -> tuple[list[PlanStep], set[str]]:
    """Return the steps of a plan in any order of dependencies, and those that completed."""
    names = [f"s{number}" for number in range(draw(st.integers(1, 6)))]
    others = {name: [each for each in names if each != name] or ["none"] for name in names}
    steps = [plan_step(name, *draw(st.sets(st.sampled_from(others[name])))) for name in names]
    return steps, draw(st.sets(st.sampled_from(names)))


@given(plans(), st.integers(0, 5))
def test_a_fork_reuses_no_step_that_needs_one_that_runs_again(plan: tuple[list[PlanStep], set[str]], at: int) -> None:
    steps, completed = plan
    names = [step.id for step in steps]
    start = names[at % len(names)]
    reused = find_reusable_steps(steps, completed, start)
    assert set(reused) <= completed & set(names[: names.index(start)])
    by_name = {step.id: step for step in steps}
    assert all(need in reused for name in reused for need in by_name[name].depends_on)


def test_a_fork_begins_by_itself_with_the_first_step_that_is_not_done() -> None:
    steps = [plan_step("a"), plan_step("b", "a"), plan_step("c")]
    assert find_reusable_steps(steps, {"a"}, "") == ["a"]
    assert find_reusable_steps(steps, {"a", "b", "c"}, "c") == ["a", "b"]
    for wrong in ("z", "a b"):
        with pytest.raises(OctoError, match="its steps are a, b, c") as caught:
            find_reusable_steps(steps, {"a"}, wrong)
        assert [fault.pointer for fault in caught.value.field_errors] == ["/from"]
    with pytest.raises(OctoError, match="Every step of it completed"):
        find_reusable_steps(steps, {"a", "b", "c"}, "")
