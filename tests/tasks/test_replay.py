"""What differs between a recording and its replay: the first difference of each step, and no consequences of it."""

from __future__ import annotations

import msgspec
import pytest

from octollm.contracts.api import TaskFailure
from octollm.contracts.attempts import AttemptRequest, AttemptResult, AttemptVerdict, AttemptView, TextExcerpt
from octollm.contracts.recording import TaskRecording
from octollm.contracts.task import Artifact, Check, Plan, PlanStep, Task
from octollm.tasks.replay import Divergence, find_divergences


def attempt(step: str, number: int = 1, **changes: object) -> AttemptView:
    outcome = AttemptResult(TextExcerpt("42", 2), (), None, AttemptVerdict(True, 1.0, (), (Check("code", True),)))
    view = AttemptView(
        step, number, "coder", step, "accepted", 1, "then", "now", 5, AttemptRequest("work"), outcome, 10, 0.0, ""
    )
    return msgspec.structs.replace(view, **changes)


PLAN = Plan(
    (
        PlanStep("s1", "one", "coder", "work"),
        PlanStep("s2", "two", "coder", "work", ("s1",)),
        PlanStep("s3", "three", "coder", "work"),
    )
)
ATTEMPTS = (attempt("s1"), attempt("s2"), attempt("s3"))
RECORDED = TaskRecording(
    "task-1", "completed", Task("work"), "1", "then", plan=PLAN, output=TextExcerpt("42", 2), attempts=ATTEMPTS
)
UNKNOWN = Divergence("model_request", "s1", 1, "request", "2", "a prompt")


def places(*args: object) -> list[tuple[str, str, int, str]]:
    found = find_divergences(RECORDED, *args)  # type: ignore[arg-type]
    return [(each.kind, each.step, each.attempt, each.member) for each in found]


def replayed(*attempts: AttemptView, **changes: object) -> TaskRecording:
    return msgspec.structs.replace(RECORDED, attempts=attempts or ATTEMPTS, **changes)


def test_times_and_costs_are_no_difference() -> None:
    again = tuple(msgspec.structs.replace(each, tokens=0, duration_ms=9, run=3, trace_id="t") for each in ATTEMPTS)
    assert places(replayed(*again, recorded_at="later"), ()) == []


OUTCOME = ATTEMPTS[0].outcome


@pytest.mark.parametrize(
    ("changed", "kind", "member"),
    [
        (attempt("s1", request=AttemptRequest("other work")), "request", "goal"),
        (attempt("s1", request=AttemptRequest("work", reasons=("Not good.",))), "request", "reasons"),
        (attempt("s1", arm="executor"), "request", "arm"),
        (attempt("s1", outcome=AttemptResult(TextExcerpt("43", 2), (), None, OUTCOME.verdict)), "output", "output"),
        (
            attempt("s1", outcome=msgspec.structs.replace(OUTCOME, artifacts=(Artifact("a", "d", 1, "t"),))),
            "output",
            "files",
        ),
        (
            attempt("s1", status="rejected", outcome=msgspec.structs.replace(OUTCOME, verdict=AttemptVerdict(False))),
            "verdict",
            "accepted",
        ),
        (
            attempt(
                "s1",
                outcome=msgspec.structs.replace(
                    OUTCOME, verdict=AttemptVerdict(True, 1.0, (), (Check("code", False),))
                ),
            ),
            "verdict",
            "checks",
        ),
        (attempt("s1", status="failed", outcome=AttemptResult(error=TaskFailure("x", "y"))), "outcome", "error"),
    ],
)
def test_a_difference_is_named_without_the_steps_after_it(changed: AttemptView, kind: str, member: str) -> None:
    # s2 depends on s1, and the result on both; s3 does not.
    other = attempt("s2", request=AttemptRequest("changed by it"))
    assert places(replayed(changed, other, attempt("s3"), output=None), ()) == [(kind, "s1", 1, member)]
    independent = attempt("s3", arm="executor")
    assert [each[1] for each in places(replayed(changed, other, independent), ())] == ["s1", "s3"]


def test_attempts_that_are_missing_or_new_are_differences() -> None:
    assert places(replayed(attempt("s2"), attempt("s3")), ()) == [("outcome", "s1", 1, "status")]
    more = replayed(*ATTEMPTS, attempt("s3", 2))
    assert places(more, ()) == [("outcome", "s3", 2, "status")]


def test_an_unknown_model_request_explains_the_rest_of_its_step() -> None:
    failed = attempt("s1", status="failed", outcome=AttemptResult(error=TaskFailure("model_failed", "")))
    assert find_divergences(RECORDED, replayed(failed, status="failed"), [UNKNOWN]) == (UNKNOWN,)
    # A request that the orchestrator made differs before the arm asks a model.
    other = attempt("s1", request=AttemptRequest("other work"))
    assert places(replayed(other), [UNKNOWN])[0] == ("request", "s1", 1, "goal")
    in_plan = msgspec.structs.replace(UNKNOWN, step="plan")
    assert find_divergences(RECORDED, replayed(plan=None), [UNKNOWN, in_plan]) == (in_plan,)


def test_plans_are_compared_step_by_step() -> None:
    steps = (*PLAN.steps[:2], msgspec.structs.replace(PLAN.steps[2], arm="executor"))
    assert places(replayed(plan=Plan(steps)), ()) == [("plan", "plan", 0, "s3: arm")]
    assert places(replayed(plan=Plan(PLAN.steps[:2])), ()) == [("plan", "plan", 0, "steps")]
    assert places(replayed(plan=None, status="failed"), ()) == [("plan", "plan", 0, "steps")]


def test_the_result_is_compared_when_all_steps_are_the_same() -> None:
    assert places(replayed(status="failed"), ()) == [("result", "", 0, "status")]
    assert places(replayed(output=TextExcerpt("43", 2)), ()) == [("result", "", 0, "output")]


def test_what_a_person_cut_off_is_not_compared() -> None:
    cancelled = msgspec.structs.replace(
        RECORDED, status="cancelled", output=None, attempts=(attempt("s1"), attempt("s2", status="cancelled"))
    )
    found = find_divergences(cancelled, replayed(attempt("s1"), attempt("s2", arm="executor"), status="failed"), ())
    assert found == ()
    assert find_divergences(RECORDED, replayed(attempt("s2"), attempt("s3")), (), {"s1"}) == ()
