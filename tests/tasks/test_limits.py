"""TaskLimits of tasks as rules: what is allowed, and that they only grow."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octollm.clock import format_rfc3339
from octollm.contracts.steering import MAX_EXTENSION_SECONDS, ExtendRequest
from octollm.contracts.task import Budget
from octollm.errors import OctoError
from octollm.tasks.limits import TaskLimits, complete_budget, extend_limits, parse_deadline

pytestmark = pytest.mark.unit
NOW = 1_800_000_000.0
PRESENT = TaskLimits(Budget(100, None, 60.0, 1), NOW + 50, None)
wishes = st.builds(
    ExtendRequest,
    max_tokens=st.none() | st.integers(-5, 1000),
    max_cost_usd=st.none() | st.floats(-1, 10),
    max_time_seconds=st.none() | st.floats(-1, 5000),
    deadline=st.none() | st.integers(-100, 200_000).map(lambda seconds: format_rfc3339(NOW + seconds)),
)
limits = st.builds(
    TaskLimits,
    st.builds(Budget, st.integers(1, 500), st.none() | st.floats(0.01, 5), st.floats(0.1, 3600)),
    st.floats(NOW + 1, NOW + 3600),
    st.none(),
)


@given(limits, wishes)
def test_an_extension_lowers_nothing_and_asking_again_changes_nothing(present: TaskLimits, wish: ExtendRequest) -> None:
    try:
        after = extend_limits(present, wish, NOW)
    except OctoError as error:
        assert error.code in ("budget_invalid", "deadline_invalid")
        assert [fault.pointer[0] for fault in error.field_errors] == ["/"]
        return
    assert (after.budget.max_tokens or 0) >= (present.budget.max_tokens or 0)
    assert (after.budget.max_cost_usd or 0.0) >= (present.budget.max_cost_usd or 0.0)
    assert (present.budget.max_cost_usd is None) == (after.budget.max_cost_usd is None)
    assert (after.deadline_at or 0.0) >= (present.deadline_at or 0.0)
    assert extend_limits(after, wish, NOW) == after


def test_more_time_moves_the_end_by_as_much_but_not_past_the_clients_deadline() -> None:
    assert extend_limits(PRESENT, ExtendRequest(max_time_seconds=90.0), NOW).deadline_at == NOW + 80
    with_deadline = TaskLimits(PRESENT.budget, NOW + 50, format_rfc3339(NOW + 55))
    assert extend_limits(with_deadline, ExtendRequest(max_time_seconds=90.0), NOW).deadline_at == NOW + 55
    later = format_rfc3339(NOW + 70)
    after = extend_limits(with_deadline, ExtendRequest(deadline=later), NOW)
    assert (after.deadline_at, after.deadline) == (NOW + 70, later)


@pytest.mark.parametrize(
    ("wish", "pointer"),
    [
        (ExtendRequest(max_tokens=99), "/max_tokens"),
        (ExtendRequest(max_tokens=10**20), "/max_tokens"),
        (ExtendRequest(max_cost_usd=1.0), "/max_cost_usd"),
        (ExtendRequest(max_time_seconds=59.0), "/max_time_seconds"),
        (ExtendRequest(max_time_seconds=3601.0), "/max_time_seconds"),
        (ExtendRequest(deadline="soon"), "/deadline"),
        (ExtendRequest(deadline="9999-12-31T23:59:59-23:59"), "/deadline"),
        (ExtendRequest(deadline=format_rfc3339(NOW + 0.001)), "/deadline"),
        (ExtendRequest(deadline=format_rfc3339(NOW + MAX_EXTENSION_SECONDS + 60)), "/deadline"),
    ],
)
def test_a_wrong_extension_is_refused_with_its_place(wish: ExtendRequest, pointer: str) -> None:
    with pytest.raises(OctoError) as caught:
        extend_limits(PRESENT, wish, NOW)
    assert [fault.pointer for fault in caught.value.field_errors] == [pointer]


def test_a_budget_gets_what_it_leaves_open() -> None:
    assert complete_budget(Budget(max_retries=0), max_tokens=5, max_time_seconds=6.0) == Budget(5, None, 6.0, 0)
    for wrong in (Budget(0), Budget(max_cost_usd=0.0), Budget(max_time_seconds=-1.0), Budget(max_retries=11)):
        with pytest.raises(OctoError):
            complete_budget(wrong, max_tokens=5, max_time_seconds=6.0)


@pytest.mark.parametrize("text", ["0001-01-01T00:00:00+23:59", "2001-01-01T00:00:00Z", "2030-01-01T00:00:00", ""])
def test_a_deadline_that_cannot_be_met_is_refused(text: str) -> None:
    with pytest.raises(OctoError) as caught:
        parse_deadline(text, NOW)
    assert caught.value.code == "deadline_invalid"
