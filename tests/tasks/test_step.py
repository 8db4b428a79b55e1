"""The attempts of one step: retries, takeovers, and what each records."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from task_kit import ServiceRequest, TaskKit, answer, open_task_kit, plan_step, raises

from octollm.contracts.operations import AcceptResult
from octollm.contracts.stream import StreamEvent
from octollm.contracts.task import Budget, ExecuteResult, Plan
from octollm.errors import OctoError, RemoteError
from octollm.resilience import Deadline
from octollm.rpc.http_client import TransportError
from octollm.tasks.changes import PendingChanges
from octollm.tasks.records import TaskRecord
from octollm.tasks.step import ArmSlots, StepDependencies, StepError, run_step
from octollm.testing import wait_until

SPEC = plan_step("s1")
OVERLOADED = RemoteError("Busy.", code="overloaded", status=503, retryable=True)
REFUSED = RemoteError("No.", code="authority_missing", status=403, retryable=False)


async def start(kit: TaskKit, retries: int = 1) -> TaskRecord:
    """Return a claimed task with a plan of one step."""
    await kit.submit(budget=Budget(max_retries=retries))
    task = await kit.claim()
    await kit.store.begin_planning(task.task_id, task.epoch)
    await kit.store.set_plan(task.task_id, Plan((SPEC,)), task.epoch, replan=False, reasons=())
    return task


async def run(kit: TaskKit, task: TaskRecord, *, seconds: float = 60.0, progress: list[float] | None = None) -> Any:
    async def on_progress(_step: str, percent: float, message: str = "") -> None:
        if progress is not None:
            progress.append(percent)

    changes = PendingChanges(kit.store.apply)
    tools = StepDependencies(
        kit.store, kit.deps.stream, kit.calls(task), kit.clock, kit.deps.log, kit.deps.tracer, on_progress,
        kit.deps.load_texts, kit.deps.store_texts, kit.deps.attempts, changes,
    )  # fmt: skip
    [record] = await kit.store.steps(task.task_id)
    result = await run_step(tools, task, SPEC, record, {"s0": "input"}, Deadline.after(kit.clock, seconds))
    await changes.flush()
    return result


def reject(*verdicts: bool) -> Any:
    """Return a judge with one verdict after another, the last for ever."""
    remaining = list(verdicts)

    async def accept(_request: ServiceRequest) -> AcceptResult:
        accepted = remaining.pop(0) if len(remaining) > 1 else remaining[0]
        return AcceptResult(accepted, () if accepted else ("It lacks a title.",))

    return accept


async def test_accepted_result_completes_the_step(kit: TaskKit) -> None:
    task = await start(kit)
    kit.services.handlers["coder.execute"] = answer("done")
    assert (await run(kit, task)).output == "done"
    assert kit.services.keys_of("coder.execute") == ["s1:1"]
    assert kit.services.keys_of("judge.accept") == ["s1:1:accept"]
    [record] = await kit.store.steps(task.task_id)
    assert (record.status, record.result) == ("completed", ExecuteResult("done"))
    assert (await kit.event_types(task.task_id))[-2:] == ["step.started", "step.completed"]


async def test_rejected_result_is_retried_with_the_reasons(kit: TaskKit) -> None:
    task = await start(kit)
    kit.services.handlers |= {"coder.execute": answer("done"), "judge.accept": reject(False, True)}
    await run(kit, task)
    contexts = [each.body["context"] for each in kit.services.requests if each.operation == "coder.execute"]
    assert [context.get("reasons", []) for context in contexts] == [[], ["It lacks a title."]]
    assert all(context["inputs"] == {"s0": "input"} for context in contexts)
    assert kit.services.keys_of("coder.execute") == ["s1:1", "s1:2"]
    names = (await kit.event_types(task.task_id))[-4:]
    assert names == ["step.started", "step.failed", "step.started", "step.completed"]


async def test_step_fails_after_its_last_attempt(kit: TaskKit) -> None:
    task = await start(kit, retries=1)
    kit.services.handlers |= {"coder.execute": answer("bad"), "judge.accept": reject(False)}
    with pytest.raises(StepError) as caught:
        await run(kit, task)
    assert (caught.value.code, caught.value.reasons) == ("not_accepted", ("It lacks a title.",))
    finals = [data["final"] for name, data in await kit.events(task.task_id) if name == "step.failed"]
    assert finals == [False, True]
    [record] = await kit.store.steps(task.task_id)
    assert (record.status, record.attempt) == ("failed", 2)


async def test_takeover_repeats_the_recorded_attempt_with_the_same_key(kit: TaskKit) -> None:
    async def stop_in_second_attempt(request: ServiceRequest) -> ExecuteResult:
        if (request.key or "").endswith(":2"):
            raise asyncio.CancelledError
        return ExecuteResult("bad")

    first = await start(kit)
    kit.services.handlers |= {"coder.execute": stop_in_second_attempt, "judge.accept": reject(False)}
    with pytest.raises(asyncio.CancelledError):
        await run(kit, first)
    kit.clock.advance(10)
    second = await kit.claim("w2")
    kit.services.handlers |= {"coder.execute": answer("done"), "judge.accept": reject(True)}
    await run(kit, second)
    assert kit.services.keys_of("coder.execute") == ["s1:1", "s1:2", "s1:2"]
    tokens = [each.token for each in kit.services.requests if each.operation == "coder.execute"]
    assert tokens == ["coder:execute@1", "coder:execute@1", "coder:execute@2"]
    last = [each for each in kit.services.requests if each.operation == "coder.execute"][-1]
    assert last.body["context"]["reasons"] == ["It lacks a title."]


LOST = TransportError("The connection broke.", code="connection_lost", request_sent=True)
UNAVAILABLE = RemoteError("The answer could not be stored.", code="unavailable", status=503, retryable=True)
MODEL_FAILED = RemoteError("The model failed.", code="model_failed", status=503, retryable=True)


def fail_once(error: OctoError, result: object) -> Any:
    """Return an operation that fails the first time."""
    errors = [error]

    async def serve(_request: ServiceRequest) -> object:
        if errors:
            raise errors.pop()
        return result

    return serve


@pytest.mark.parametrize(
    ("arm", "judge", "keys"),
    [
        # The work may be done: under a new key it would be done again.
        (LOST, None, ["s1:1", "s1:1"]),
        (UNAVAILABLE, None, ["s1:1", "s1:1"]),
        # The work is done, and nobody could judge it.
        (None, LOST, ["s1:1", "s1:1"]),
        (None, MODEL_FAILED, ["s1:1", "s1:1"]),
        # The arm itself has failed: its model calls must not be answered from the journal.
        (MODEL_FAILED, None, ["s1:1", "s1:2"]),
    ],
)
async def test_an_attempt_whose_work_may_be_done_is_followed_by_one_with_its_key(
    kit: TaskKit, arm: OctoError | None, judge: OctoError | None, keys: list[str]
) -> None:
    task = await start(kit)
    accepted = AcceptResult(accepted=True)
    kit.services.handlers |= {
        "coder.execute": answer("done") if arm is None else fail_once(arm, ExecuteResult("done")),
        "judge.accept": reject(True) if judge is None else fail_once(judge, accepted),
    }
    await run(kit, task)
    assert kit.services.keys_of("coder.execute") == keys
    bodies = [each.body for each in kit.services.requests if each.operation == "coder.execute"]
    assert (bodies[0] == bodies[1]) == (keys[0] == keys[1])
    assert await kit.event_types(task.task_id) == [
        "task.accepted", "task.planned", "task.started",
        "step.started", "step.failed", "step.started", "step.completed",
    ]  # fmt: skip


async def test_a_takeover_repeats_the_call_of_the_attempts_before(kit: TaskKit) -> None:
    async def stop(_request: ServiceRequest) -> object:
        raise asyncio.CancelledError

    first = await start(kit)
    kit.services.handlers |= {"coder.execute": answer("done"), "judge.accept": fail_once(LOST, None)}
    before = kit.services.handlers["coder.execute"]

    async def stop_in_second_attempt(request: ServiceRequest) -> object:
        return await (before if len(kit.services.keys_of("coder.execute")) == 1 else stop)(request)

    kit.services.handlers["coder.execute"] = stop_in_second_attempt
    with pytest.raises(asyncio.CancelledError):
        await run(kit, first)
    kit.clock.advance(10)
    second = await kit.claim("w2")
    kit.services.handlers |= {"coder.execute": answer("done"), "judge.accept": reject(True)}
    await run(kit, second)
    assert kit.services.keys_of("coder.execute") == ["s1:1", "s1:1", "s1:1"]


@pytest.mark.parametrize("code", ["fence_lost", "cancelled"])
async def test_lost_lease_is_no_failure_of_the_step(kit: TaskKit, code: str) -> None:
    task = await start(kit)
    kit.services.handlers["coder.execute"] = raises(OctoError("No longer yours.", code=code))
    with pytest.raises(OctoError) as caught:
        await run(kit, task)
    assert caught.value.code == code
    assert "step.failed" not in await kit.event_types(task.task_id)
    [record] = await kit.store.steps(task.task_id)
    assert (record.status, record.attempt) == ("running", 1)


async def test_no_retry_when_the_pause_exceeds_the_deadline(kit: TaskKit) -> None:
    task = await start(kit, retries=5)
    busy = RemoteError("Busy.", code="overloaded", status=503, retryable=True, retry_after=60.0)
    kit.services.handlers["coder.execute"] = raises(busy)
    with pytest.raises(StepError):
        await run(kit, task, seconds=30.0)
    assert kit.services.keys_of("coder.execute") == ["s1:1"]


async def test_streamed_text_is_saved_and_counted(kit: TaskKit) -> None:
    async def execute(request: ServiceRequest) -> ExecuteResult:
        await request.on_event(StreamEvent("token", text="draft"))
        await request.on_event(StreamEvent("token", text="final", reset=True))
        await request.on_event(StreamEvent("progress", progress=50.0))
        return ExecuteResult("final")

    task = await start(kit)
    kit.services.handlers["coder.execute"] = execute
    progress: list[float] = []
    await run(kit, task, progress=progress)
    [saved] = (await kit.store.texts(task.task_id, "acme")).texts
    assert (saved.text, saved.base, saved.run) == ("final", len("draft"), task.epoch)
    [completed] = [data for name, data in await kit.events(task.task_id) if name == "step.completed"]
    assert completed["text_length"] == len("draft" + "final")
    assert progress == sorted(progress)
    assert progress[-1] == 50.0


OUTCOMES = st.lists(st.sampled_from(["accept", "reject", "overloaded", "refused"]), min_size=1, max_size=6)


def test_number_of_attempts() -> None:
    """An acceptance or a permanent error ends the step; rejections and transient errors use up the attempts."""
    with asyncio.Runner() as runner:
        stack = contextlib.AsyncExitStack()
        kit = runner.run(stack.enter_async_context(open_task_kit()))

        @given(outcomes=OUTCOMES, retries=st.integers(0, 4))
        @settings(max_examples=30)
        def check(outcomes: list[str], retries: int) -> None:
            runner.run(check_number_of_attempts(kit, outcomes, retries))

        try:
            check()
        finally:
            runner.run(stack.aclose())


async def check_number_of_attempts(kit: TaskKit, outcomes: list[str], retries: int) -> None:
    remaining = iter([*outcomes, *["accept"] * 10])
    current = ""

    async def execute(_request: ServiceRequest) -> ExecuteResult:
        nonlocal current
        current = next(remaining)
        if current == "overloaded":
            raise OVERLOADED
        if current == "refused":
            raise REFUSED
        return ExecuteResult("done")

    async def accept(_request: ServiceRequest) -> AcceptResult:
        return AcceptResult(current == "accept")

    async def attempts() -> tuple[int, bool]:
        task = await start(kit, retries)
        kit.services.handlers |= {"coder.execute": execute, "judge.accept": accept}
        before = len(kit.services.keys_of("coder.execute"))
        try:
            await run(kit, task)
        except StepError:
            return len(kit.services.keys_of("coder.execute")) - before, False
        return len(kit.services.keys_of("coder.execute")) - before, True

    decisive = next((n for n, each in enumerate(outcomes, 1) if each in ("accept", "refused")), len(outcomes) + 1)
    kind = outcomes[decisive - 1] if decisive <= len(outcomes) else "accept"
    expected = min(decisive, retries + 1)
    assert await attempts() == (expected, expected == decisive and kind == "accept")


async def test_steps_of_one_arm_wait_for_a_place_in_order() -> None:
    slots, order, waited = ArmSlots(1), list[int](), list[str]()
    released = asyncio.Event()

    async def before_wait() -> None:
        waited.append("flushed")

    async def step(number: int, arm: str) -> None:
        async with slots.take(arm, before_wait):
            order.append(number)
            await released.wait()

    async with asyncio.TaskGroup() as group:
        for number, arm in enumerate(("coder", "coder", "coder", "judge")):
            group.create_task(step(number, arm))
        await wait_until(lambda: len(waited) == 2, description="two steps wait")
        assert order == [0, 3], "another arm has places of its own"
        released.set()
    assert order == [0, 3, 1, 2]
