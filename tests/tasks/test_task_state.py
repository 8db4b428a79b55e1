from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octollm.errors import OctoError
from octollm.tasks.state import (
    STEP_TRANSITIONS,
    TASK_TRANSITIONS,
    check_skip,
    check_transition,
    is_final,
    resume_status,
)

ENDS = ("completed", "failed", "cancelled")
SKIPPABLE = ("running", "waiting", "paused")
STEP_ENDS = (*ENDS, "skipped")


def test_the_table_is_that_of_the_design() -> None:
    assert set(TASK_TRANSITIONS) == {"accepted", "planning", "running", "waiting", "paused", *ENDS}
    assert all(not TASK_TRANSITIONS[end] and is_final(end) for end in ENDS)
    assert "planning" in TASK_TRANSITIONS["running"]  # a replan
    assert all({"failed", "cancelled"} <= TASK_TRANSITIONS[state] for state in TASK_TRANSITIONS if not is_final(state))
    assert all((not STEP_TRANSITIONS[state]) == (state in STEP_ENDS) for state in STEP_TRANSITIONS)
    # Whatever a task does, it can be paused, and it goes on afterwards in one of two states.
    assert all(
        "paused" in TASK_TRANSITIONS[state] for state in TASK_TRANSITIONS if not is_final(state) and state != "paused"
    )
    assert {resume_status(has_started=started) for started in (True, False)} <= TASK_TRANSITIONS["paused"]


@given(st.sampled_from(sorted(TASK_TRANSITIONS)), st.sampled_from((None, *sorted(STEP_TRANSITIONS))))
def test_a_step_is_skipped_while_it_is_open_in_a_task_that_has_its_plan(task: Any, step: Any) -> None:
    try:
        changes = check_skip(task, "s1", step)
    except OctoError as error:
        assert error.code == ("step_unknown" if step is None and task in SKIPPABLE else "state_conflict")
        assert task not in SKIPPABLE or step not in ("pending", "running", "skipped")
    else:
        assert task in SKIPPABLE
        assert step in ("pending", "running") if changes else step == "skipped"


@given(st.lists(st.sampled_from(sorted(TASK_TRANSITIONS)), max_size=20))
def test_no_walk_leaves_an_end(walk: list[str]) -> None:
    state = "accepted"
    for to in walk:
        legal = to in TASK_TRANSITIONS[state]
        if legal:
            assert not is_final(state)
            check_transition(state, to)
            state = to
        else:
            with pytest.raises(OctoError) as caught:
                check_transition(state, to)
            assert caught.value.code == "state_conflict"
