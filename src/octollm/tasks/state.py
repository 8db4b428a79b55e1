"""The states of a task and of a step, and which may follow which."""

from __future__ import annotations

from octollm.contracts.task import StepStatus, TaskStatus
from octollm.errors import OctoError

_FINAL_STATES: frozenset[TaskStatus] = frozenset({"completed", "failed", "cancelled"})

TASK_TRANSITIONS: dict[TaskStatus, frozenset[TaskStatus]] = {
    "accepted": frozenset({"planning", "failed", "cancelled"}),
    "planning": frozenset({"running", "failed", "cancelled"}),
    "running": frozenset({"waiting", "planning", "completed", "failed", "cancelled"}),
    "waiting": frozenset({"running", "failed", "cancelled"}),
    "completed": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
}
"""Each state of a task and those that may follow it. A replan is running → planning."""

STEP_TRANSITIONS: dict[StepStatus, frozenset[StepStatus]] = {
    "pending": frozenset({"running", "failed", "cancelled"}),
    "running": frozenset({"running", "completed", "failed", "cancelled"}),
    "completed": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
}
"""Each state of a step and those that may follow it; running → running is a new attempt or run."""


OPEN_STATES: tuple[TaskStatus, ...] = tuple(status for status in TASK_TRANSITIONS if status not in _FINAL_STATES)
"""The states of a task that has not ended."""


def is_final(status: TaskStatus) -> bool:
    """Say whether a task in this state never changes again."""
    return status in _FINAL_STATES


def check_transition(current: TaskStatus, to: TaskStatus) -> None:
    """Raise ``state_conflict`` unless a task may go from ``current`` to ``to``."""
    if to not in TASK_TRANSITIONS[current]:
        raise OctoError(f"The task is {current}; it cannot become {to}.", code="state_conflict")
