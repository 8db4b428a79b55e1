"""The rules of a task as pure functions: legal state transitions, ready steps, progress, result, approvals."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from octollm.contracts.approvals import (
    EVERY_STEP,
    SPENDING_APPROVAL,
    ApprovalDecision,
    ApprovalKind,
    ApprovalPolicy,
    ApprovalView,
)
from octollm.contracts.task import MAX_GOAL, Artifact, Evidence, ExecuteResult, Plan, PlanStep, StepStatus, TaskStatus
from octollm.errors import FieldError, OctoError

_FINAL_STATES: frozenset[TaskStatus] = frozenset({"completed", "failed", "cancelled"})

TASK_TRANSITIONS: dict[TaskStatus, frozenset[TaskStatus]] = {
    "accepted": frozenset({"planning", "paused", "failed", "cancelled"}),
    "planning": frozenset({"running", "paused", "failed", "cancelled"}),
    "running": frozenset({"waiting", "planning", "paused", "completed", "failed", "cancelled"}),
    "waiting": frozenset({"running", "paused", "failed", "cancelled"}),
    "paused": frozenset({"accepted", "running", "failed", "cancelled"}),
    "completed": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
}
"""State of a task → states that may follow. A replan is running → planning."""

STEP_TRANSITIONS: dict[StepStatus, frozenset[StepStatus]] = {
    "pending": frozenset({"running", "skipped", "failed", "cancelled"}),
    "running": frozenset({"running", "completed", "skipped", "failed", "cancelled"}),
    "completed": frozenset(),
    "skipped": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
}
"""State of a step → states that may follow. running → running is a new attempt or a takeover."""


SKIPPED_RESULT = ExecuteResult(
    "This step was skipped, so its result is missing.", evidence=Evidence("text", found=False)
)
"""What stands in the place of the result of a skipped step, for the steps that depend on it and for the task."""
_SKIPPABLE: frozenset[TaskStatus] = frozenset({"running", "waiting", "paused"})
"""The states of a task in which a step may be skipped. A plan that is being made would replace the step."""


OPEN_STATES: tuple[TaskStatus, ...] = tuple(status for status in TASK_TRANSITIONS if status not in _FINAL_STATES)
"""The states of a task that has not ended."""


def is_final(status: TaskStatus) -> bool:
    """Return whether a task in this state never changes again."""
    return status in _FINAL_STATES


def check_transition(current: TaskStatus, to: TaskStatus) -> None:
    """Raise ``state_conflict`` unless the transition from ``current`` to ``to`` is legal."""
    if to not in TASK_TRANSITIONS[current]:
        raise OctoError(f"The task is {current}; it cannot become {to}.", code="state_conflict")


def check_skip(status: TaskStatus, step: str, step_status: StepStatus | None) -> bool:
    """Return whether a step has to be changed to skip it: not when it is skipped already.

    Raises ``state_conflict`` when the task or the step cannot be skipped any more, and ``step_unknown``.
    """
    if status not in _SKIPPABLE:
        raise OctoError(f"The task is {status}; no step of it can be skipped.", code="state_conflict")
    if step_status is None:
        detail = f"The plan has no step {step!r}."
        raise OctoError(detail, code="step_unknown", field_errors=(FieldError("/step", detail),))
    if step_status != "skipped" and "skipped" not in STEP_TRANSITIONS[step_status]:
        raise OctoError(f"The step is {step_status} already.", code="state_conflict")
    return step_status != "skipped"


def resume_status(*, has_started: bool) -> TaskStatus:
    """Return the state in which a paused task goes on: one without a plan begins to plan again.

    A task that waited for an approval runs again, too: its worker finds what is missing, and lets it wait.
    """
    return "running" if has_started else "accepted"


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


def find_reusable_steps(steps: Sequence[PlanStep], completed: Collection[str], from_step: str) -> list[str]:
    """Return the steps whose results a fork takes over when the plan runs again from ``from_step``.

    They come before it in the plan, completed, and depend on no step that runs again. Without ``from_step`` the plan
    runs again from the first step that did not complete. Raises ``step_unknown``.
    """
    names = [step.id for step in steps]
    start = from_step or next((name for name in names if name not in completed), "")
    if start not in names:
        known = ", ".join(names)
        detail = f"The plan has no step {start!r}; its steps are {known}." if start else "Every step of it completed."
        raise OctoError(detail, code="step_unknown", field_errors=(FieldError("/from", detail),))
    before = {step.id: step for step in steps[: names.index(start)] if step.id in completed}
    while dropped := [name for name, step in before.items() if any(need not in before for need in step.depends_on)]:
        for name in dropped:
            del before[name]
    return list(before)


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


def _end_steps(steps: Sequence[PlanStep]) -> list[PlanStep]:
    """Return the steps that no other step depends on: their results are those of the task."""
    needed = {need for step in steps for need in step.depends_on}
    return [step for step in steps if step.id not in needed]


def is_found(steps: Sequence[PlanStep], results: Mapping[str, ExecuteResult]) -> bool:
    """Return whether a task has what it was asked for: not if each of its results says that nothing was found."""
    evidence = [results[step.id].evidence for step in _end_steps(steps)]
    return any(each is None or each.found for each in evidence)


def assemble_result(
    steps: Sequence[PlanStep], results: Mapping[str, ExecuteResult]
) -> tuple[str, tuple[Artifact, ...]]:
    """Return a task's output and artifacts: those of the steps that no other step depends on.

    The output of a single such step is used as it is; several are joined under their titles.
    """
    ends = _end_steps(steps)
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


@dataclass(frozen=True, slots=True)
class ApprovalRequest:
    """An approval that is needed. ``approval_id`` is unique within the task."""

    approval_id: str
    kind: ApprovalKind
    reason: str
    step: str = ""


def merge_policies(installation: ApprovalPolicy, task: ApprovalPolicy) -> ApprovalPolicy:
    """Return the stricter of two policies, member by member."""
    costs = [each.cost_above_usd for each in (installation, task) if each.cost_above_usd is not None]
    lifetimes = [each.expires_seconds for each in (installation, task) if each.expires_seconds is not None]
    return ApprovalPolicy(
        installation.plan or task.plan,
        tuple(dict.fromkeys((*installation.steps, *task.steps))),
        min(costs, default=None),
        min(lifetimes, default=None),
    )


def find_required_approvals(
    step: PlanStep,
    policy: ApprovalPolicy,
    *,
    plan_approval: str,
    arm_reason: str,
    may_call: Callable[[str], bool],
    spent_usd: float,
) -> tuple[ApprovalRequest, ...]:
    """Return the approvals without which ``step`` may not start.

    ``arm_reason`` is why the arm's author wants an approval, ``may_call`` says whether the step may lead to a call of a
    scope, and ``spent_usd`` is what the task has used.
    """
    required: list[ApprovalRequest] = []
    if policy.plan:
        required.append(ApprovalRequest(plan_approval, "plan", "The plan has to be approved before its first step."))
    if policy.cost_above_usd is not None and spent_usd > policy.cost_above_usd:
        reason = f"The task has used {spent_usd:.4f} USD, more than {policy.cost_above_usd:.4f} USD."
        required.append(ApprovalRequest(SPENDING_APPROVAL, "spending", reason))
    reasons = [reason for reason in (step.approval, arm_reason) if reason]
    for rule in policy.steps:
        if rule == EVERY_STEP:
            reasons.append("Every step has to be approved.")
        elif ":" not in rule and rule == step.arm:
            reasons.append(f"Each step of {rule} has to be approved.")
        elif ":" in rule and may_call(rule):
            reasons.append(f"The step may call {rule}.")
    if reasons:
        required.append(ApprovalRequest(step.id, "step", " ".join(dict.fromkeys(reasons)), step.id))
    return tuple(required)


def choose_approvals(stored: Mapping[str, ApprovalView], decision: ApprovalDecision) -> list[ApprovalView]:
    """Return the pending approvals that ``decision`` is about; none when it repeats an earlier decision.

    Raises ``approval_invalid`` and ``state_conflict`` as ``ApprovalStore.decide``.
    """
    outcome = "approved" if decision.decision == "approve" else "rejected"
    if decision.approval_id:
        view = stored.get(decision.approval_id)
        if view is None:
            raise _invalid("/approval_id", f"The task has no approval {decision.approval_id!r}.")
        if view.status == "pending":
            return [view]
        if view.status == outcome and view.goals == decision.goals:
            return []
        raise OctoError(f"The approval {view.approval_id} is {view.status} already.", code="state_conflict")
    pending = [view for view in stored.values() if view.status == "pending"]
    if not pending and not any(view.status == outcome for view in stored.values()):
        raise OctoError("The task does not wait for an approval.", code="state_conflict")
    return pending


def check_changed_goals(chosen: Sequence[ApprovalView], goals: Mapping[str, str], pending_steps: set[str]) -> None:
    """Raise ``approval_invalid`` for a goal that the approvals in ``chosen`` may not change."""
    whole_plan = any(view.kind == "plan" for view in chosen)
    covered = {view.step for view in chosen if view.kind == "step"}
    for name, goal in goals.items():
        pointer = f"/goals/{name.replace('~', '~0').replace('/', '~1')}"
        if name not in pending_steps or not (whole_plan or name in covered):
            raise _invalid(pointer, f"The step {name!r} is not waiting for this approval, so its goal stays.")
        if not goal.strip() or len(goal) > MAX_GOAL:
            raise _invalid(pointer, f"A goal has 1 to {MAX_GOAL} characters.")


def apply_goals(plan: Plan, goals: Mapping[str, str]) -> Plan:
    """Return ``plan`` with the goals of some steps replaced."""
    changed = (msgspec.structs.replace(step, goal=goals.get(step.id, step.goal)) for step in plan.steps)
    return msgspec.structs.replace(plan, steps=tuple(changed))


def _invalid(pointer: str, detail: str) -> OctoError:
    return OctoError(detail, code="approval_invalid", field_errors=(FieldError(pointer, detail),))
