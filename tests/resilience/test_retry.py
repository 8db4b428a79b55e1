from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octollm.errors import OctoError
from octollm.resilience import CallFailure, Deadline, OutageRetry, RetryBudget, RetryPolicy
from octollm.resilience.retry import parse_timeout_ms
from octollm.testing import ManualClock


@given(
    tried=st.integers(1, 10),
    retryable=st.booleans(),
    began=st.booleans(),
    safely=st.booleans(),
    left=st.floats(0, 100),
    random=st.floats(0, 0.999),
    after=st.none() | st.floats(0, 60),
)
def test_a_retry_is_bounded_by_attempts_deadline_and_safety(
    tried: int, retryable: bool, began: bool, safely: bool, left: float, random: float, after: float | None
) -> None:
    policy = RetryPolicy()
    wait = policy.next_delay(
        CallFailure(retryable, began, after), attempt=tried, is_idempotent=safely, remaining=left, random=random
    )
    if wait is None:
        return
    assert retryable
    assert tried < policy.max_attempts
    assert safely or not began
    assert wait < left
    assert wait >= (after or 0.0)
    assert wait <= max(after or 0.0, policy.max_delay)


@given(
    away=st.booleans(),
    began=st.booleans(),
    safely=st.booleans(),
    waited=st.floats(0, 60),
    left=st.floats(0, 60),
    seconds=st.floats(0, 30),
)
def test_patience_is_bounded_by_its_time_the_deadline_and_safety(
    away: bool, began: bool, safely: bool, waited: float, left: float, seconds: float
) -> None:
    wait = OutageRetry(seconds).next_delay(
        CallFailure(retryable=True, may_have_started=began, is_outage=away),
        elapsed=waited,
        is_idempotent=safely,
        remaining=left,
    )
    if wait is None:
        return
    assert away
    assert safely or not began
    assert waited + wait <= seconds
    assert wait < left


def test_nobody_is_patient_unless_asked_to_be() -> None:
    failure = CallFailure(retryable=True, may_have_started=False, is_outage=True)
    assert OutageRetry().next_delay(failure, elapsed=0, is_idempotent=True, remaining=60) is None


@given(st.lists(st.booleans(), max_size=200))
def test_retries_are_a_share_of_the_calls(tries: list[bool]) -> None:
    budget = RetryBudget(ratio=0.2, capacity=10)
    calls = retries = 0
    for wants_retry in tries:
        budget.earn()
        calls += 1
        if wants_retry and budget.spend():
            retries += 1
    assert retries <= 10 + 0.2 * calls


def test_a_deadline_counts_down_and_says_when_it_passed() -> None:
    clock = ManualClock()
    deadline = Deadline.after(clock, 2)
    assert (deadline.remaining(), deadline.to_header()) == (2, "2000")
    clock.time += 3
    assert (deadline.remaining(), deadline.to_header()) == (0, "1")
    with pytest.raises(OctoError) as caught:
        deadline.raise_if_passed()
    assert caught.value.code == "deadline_exceeded"
    assert Deadline.after(clock, 1e9).remaining() == 3600


@given(st.text(max_size=12))
def test_a_timeout_header_is_a_number_or_refused(text: str) -> None:
    try:
        found = parse_timeout_ms(text)
    except OctoError as error:
        assert error.code == "invalid_header"
    else:
        assert found is not None
        assert found >= 0
