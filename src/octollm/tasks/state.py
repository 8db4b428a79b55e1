"""The rules of a task as pure functions: legal state transitions, ready steps, progress, result."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import msgspec

from octollm.contracts.task import Artifact, ExecuteResult, PlanStep, StepStatus, TaskStatus
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
"""State of a task → states that may follow. A replan is running → planning."""

STEP_TRANSITIONS: dict[StepStatus, frozenset[StepStatus]] = {
    "pending": frozenset({"running", "failed", "cancelled"}),
    "running": frozenset({"running", "completed", "failed", "cancelled"}),
    "completed": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
}
"""State of a step → states that may follow. running → running is a new attempt or a takeover."""


OPEN_STATES: tuple[TaskStatus, ...] = tuple(status for status in TASK_TRANSITIONS if status not in _FINAL_STATES)
"""The states of a task that has not ended."""


def is_final(status: TaskStatus) -> bool:
    """Return whether a task in this state never changes again."""
    return status in _FINAL_STATES


def check_transition(current: TaskStatus, to: TaskStatus) -> None:
    """Raise ``state_conflict`` unless the transition from ``current`` to ``to`` is legal."""
    if to not in TASK_TRANSITIONS[current]:
        raise OctoError(f"The task is {current}; it cannot become {to}.", code="state_conflict")


TYPICAL_STEP_CHARACTERS = 1500
"""Typical length of a step's text. At about this length the step counts as half done."""
PLANNED_PROGRESS = 10.0
"""Progress of a task with a plan; its steps share the remaining 90 % evenly."""


def find_ready_steps(steps: Sequence[PlanStep], done: Collection[str], started: Collection[str]) -> list[PlanStep]:
    """Return the steps that have not started and whose dependencies are done, in the plan's order."""
    return [
        step
        for step in steps
        if step.id not in started and step.id not in done and all(need in done for need in step.depends_on)
    ]


def compute_progress(steps: Sequence[PlanStep], done: Collection[str], step_progress: Mapping[str, float]) -> float:
    """Return a task's progress from 10 to 99; ``step_progress`` has that of its running steps, from 0 to 100.

    100 is left to the event that completes the task.
    """
    if not steps:
        return PLANNED_PROGRESS
    share = (99.0 - PLANNED_PROGRESS) / len(steps)
    parts = sum(
        share if step.id in done else share * min(99.0, step_progress.get(step.id, 0.0)) / 100 for step in steps
    )
    return round(PLANNED_PROGRESS + parts, 1)


def estimate_step_progress(characters: int) -> float:
    """Estimate the progress of a step that reports none, from the characters that it has written: 0 to below 95.

    The final length is unknown, so the estimate rises ever more slowly and never reaches its end.
    """
    return 95.0 * characters / (characters + TYPICAL_STEP_CHARACTERS)


def assemble_result(
    steps: Sequence[PlanStep], results: Mapping[str, ExecuteResult]
) -> tuple[str, tuple[Artifact, ...]]:
    """Return a task's output and artifacts: those of the steps that no other step depends on.

    The output of a single such step is used as it is; several are joined under their titles.
    """
    needed = {need for step in steps for need in step.depends_on}
    ends = [step for step in steps if step.id not in needed]
    if len(ends) == 1:
        output = results[ends[0].id].output
    else:
        output = "\n\n".join(f"## {step.title}\n\n{results[step.id].output}" for step in ends)
    artifacts: dict[str, Artifact] = {}
    for step in ends:
        for artifact in results[step.id].artifacts:
            name = artifact.name
            # Different files of the same name from two steps are both kept; the same file is listed once.
            if name in artifacts and artifacts[name].digest != artifact.digest:
                name = f"{step.id}-{name}"
            artifacts[name] = msgspec.structs.replace(artifact, name=name)
    return output, tuple(artifacts.values())
