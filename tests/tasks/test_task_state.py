from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octollm.errors import OctoError
from octollm.tasks.state import STEP_STATES, TASK_STATES, check_move, is_final

ENDS = ("completed", "failed", "cancelled")


def test_the_table_is_that_of_the_design() -> None:
    assert set(TASK_STATES) == {"accepted", "planning", "running", "waiting", *ENDS}
    assert all(not TASK_STATES[end] and is_final(end) for end in ENDS)
    assert "planning" in TASK_STATES["running"]  # a replan
    assert all({"failed", "cancelled"} <= TASK_STATES[state] for state in TASK_STATES if not is_final(state))
    assert all(not STEP_STATES[end] for end in ENDS)


@given(st.lists(st.sampled_from(sorted(TASK_STATES)), max_size=20))
def test_no_walk_leaves_an_end(walk: list[str]) -> None:
    state = "accepted"
    for to in walk:
        legal = to in TASK_STATES[state]
        if legal:
            assert not is_final(state)
            check_move(state, to)
            state = to
        else:
            with pytest.raises(OctoError) as caught:
                check_move(state, to)
            assert caught.value.code == "state_conflict"
