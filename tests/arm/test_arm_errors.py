"""StopStep and RetryStep: what an arm says of its step travels as `retryable` and `retry_after`."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octollm import Arm, Context, FieldError, OctoError, RetryStep, StopStep, Task
from octollm.contracts.problems import allows_new_attempt, to_problem
from octollm.errors import RemoteError
from octollm.rpc.client import classify_failure
from octollm.rpc.problems import parse_problem, problem_response, remote_error
from octollm.testing import ArmTestClient

picky = Arm("picky", description="Stops or asks for another attempt")


@picky.operation
async def execute(task: Task, ctx: Context) -> str:
    """Fail as the goal says."""
    if task.goal == "stop":
        raise StopStep("There is no such table.", field_errors=[FieldError("/goal", "names no table")])
    raise RetryStep("The printer is warming up.", after=float(task.goal))


@pytest.mark.parametrize("sockets", [False, True], ids=["memory", "sockets"])
async def test_what_an_arm_says_reaches_its_caller(sockets):
    async with ArmTestClient(picky, sockets=sockets) as client:
        with pytest.raises(RemoteError) as stopped:
            await client.call("execute", {"goal": "stop"})
        with pytest.raises(RemoteError) as retried:
            await client.call("execute", {"goal": "2.5"})
    assert (stopped.value.code, stopped.value.retryable, stopped.value.detail) == (
        "step_stopped",
        False,
        "There is no such table.",
    )
    assert [fault.pointer for fault in stopped.value.field_errors] == ["/goal"]
    assert (retried.value.code, retried.value.retryable, retried.value.retry_after) == ("step_retry", True, 2.5)
    assert not allows_new_attempt(stopped.value)
    assert allows_new_attempt(retried.value)


@given(st.floats(min_value=0.001, max_value=1e6))
def test_the_seconds_to_wait_are_exact_in_the_document(after):
    problem = to_problem(RetryStep("Later.", after=after))
    assert (problem.retryable, problem.retry_after) == (True, after)
    assert remote_error(problem, "picky").retry_after == after
    response = problem_response(RetryStep("Later.", after=after), "req-1")
    assert int(response.headers["Retry-After"]) >= after
    assert parse_problem("picky", 503, bytes(response.body), response.headers["Retry-After"]).retry_after == after


def test_without_seconds_the_document_has_none():
    assert b"retry_after" not in bytes(problem_response(RetryStep("Again."), "req-1").body)
    assert b"retry_after" not in bytes(problem_response(OctoError("No."), "req-1").body)


def test_another_attempt_is_not_the_same_call_again():
    # The call's client must not repeat it: the runner makes a new attempt, with the reasons and a key of its own.
    assert not classify_failure(remote_error(to_problem(RetryStep("Again.")), "picky")).retryable
    assert classify_failure(remote_error(to_problem(OctoError("Away.", code="unavailable")), "picky")).retryable


@pytest.mark.parametrize("after", [-1, float("nan"), float("inf")])
def test_seconds_that_nobody_can_wait_are_refused(after):
    with pytest.raises(ValueError, match="a number of seconds, 0 or more"):
        RetryStep("Again.", after=after)
