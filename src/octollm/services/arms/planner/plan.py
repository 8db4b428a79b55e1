"""A goal becomes a plan."""

from __future__ import annotations

from octollm.contracts.asking import Ask
from octollm.contracts.goals import wants_program
from octollm.contracts.task import MAX_GOAL, Plan, PlanRequest, PlanStep
from octollm.errors import OctoError
from octollm.services.arms.planner.choose import choose_parts
from octollm.services.arms.planner.design import design_plan
from octollm.services.arms.planner.plan_validate import validate_plan
from octollm.services.arms.planner.wording import OnText, word_parts


async def make_plan(request: PlanRequest, ask: Ask, *, capable: bool = False, on_text: OnText | None = None) -> Plan:
    """Plan a goal. A ``capable`` model designs the steps; where it cannot, or none is at hand, code chooses them.

    Code gives each kind of file to its arm, as steps that run side by side, and each step the whole goal; the
    model words titles and criteria. The criteria of the request hold for every step. Raises ``OctoError``:
    ``goal_invalid``, ``file_invalid`` for a file that no arm reads, ``plan_invalid``, and what ``ask`` raises.
    """
    goal = request.goal.strip()
    if not goal or len(goal) > MAX_GOAL:
        raise OctoError(f"A goal has from 1 to {MAX_GOAL} characters.", code="goal_invalid")
    arms = [arm.name for arm in request.arms]
    files = [file.name for file in request.context.files]
    if capable:
        designed = await design_plan(request, ask)
        if designed is not None:
            return validate_plan(designed, arms, files)
    parts = choose_parts(goal, files, request.arms, program=wants_program(goal, with_files=bool(files)))
    worded = await word_parts(goal, parts, ask, on_text=on_text)
    steps = tuple(
        PlanStep(
            id=f"s{number}",
            title=wording.title,
            arm=part.arm,
            goal=goal,
            acceptance_criteria=(*request.acceptance_criteria, *wording.criteria),
            files=part.files,
        )
        for number, (part, wording) in enumerate(zip(parts, worded, strict=True), start=1)
    )
    return validate_plan(Plan(steps), arms, files)
