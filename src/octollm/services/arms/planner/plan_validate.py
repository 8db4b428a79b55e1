"""What every plan has to keep, whoever made it. Pure checks."""

from __future__ import annotations

from collections.abc import Collection

from octollm.contracts.services import BUILT_IN_ARMS
from octollm.contracts.task import MAX_GOAL, Plan, PlanStep
from octollm.errors import OctoError

MAX_STEPS = 16
"""Steps of one plan."""
MAX_TITLE = 200
MAX_CRITERIA = 10


def validate_plan(plan: Plan, arms: Collection[str], files: Collection[str]) -> Plan:
    """Return ``plan`` if it can be run with ``arms`` (the built-in ones always count) and the task's ``files``.

    Raises ``OctoError`` (``plan_invalid``) with every fault found: no or too many steps, ids that repeat, arms, files
    or dependencies that are not known, a circle of dependencies, a goal that is empty or too long.
    """
    faults = find_plan_faults(plan, {*arms, *BUILT_IN_ARMS}, set(files))
    if faults:
        raise OctoError("The plan cannot be used: " + "; ".join(faults[:8]) + ".", code="plan_invalid")
    return plan


def find_plan_faults(plan: Plan, arms: Collection[str], files: Collection[str]) -> list[str]:
    """Return what is wrong with ``plan``, in words; nothing when it can be run."""
    steps = plan.steps
    if not 1 <= len(steps) <= MAX_STEPS:
        return [f"it has {len(steps)} steps, from 1 to {MAX_STEPS} are possible"]
    ids = [step.id for step in steps]
    faults = [f"the id {name!r} is used twice" for name in sorted({name for name in ids if ids.count(name) > 1})]
    for step in steps:
        faults.extend(f"step {step.id!r}: {fault}" for fault in _find_step_faults(step, set(ids), arms, files))
    if not faults and not is_acyclic(steps):
        faults.append("the steps depend on each other in a circle")
    return faults


def is_acyclic(steps: Collection[PlanStep]) -> bool:
    """Return whether the steps can be put in an order in which each comes after what it depends on."""
    waiting = {step.id: set(step.depends_on) for step in steps}
    while waiting:
        free = [name for name, needs in waiting.items() if not needs & waiting.keys()]
        if not free:
            return False
        for name in free:
            del waiting[name]
    return True


def _find_step_faults(step: PlanStep, ids: set[str], arms: Collection[str], files: Collection[str]) -> list[str]:
    faults: list[str] = []
    if not step.id or len(step.id) > 64:
        faults.append("its id must have from 1 to 64 characters")
    if step.arm not in arms:
        faults.append(f"there is no arm {step.arm!r}")
    if not step.goal.strip() or len(step.goal) > MAX_GOAL:
        faults.append(f"its goal must have from 1 to {MAX_GOAL} characters")
    if len(step.title) > MAX_TITLE:
        faults.append(f"its title has more than {MAX_TITLE} characters")
    if len(step.acceptance_criteria) > MAX_CRITERIA:
        faults.append(f"it has more than {MAX_CRITERIA} criteria")
    faults.extend(f"there is no file {name!r}" for name in step.files if name not in files)
    faults.extend(f"it depends on {name!r}, which is no step" for name in step.depends_on if name not in ids)
    if step.id in step.depends_on:
        faults.append("it depends on itself")
    return faults
