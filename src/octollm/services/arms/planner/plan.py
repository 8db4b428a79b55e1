"""A goal becomes a plan."""

from __future__ import annotations

from octollm.contracts.asking import PromptFunction
from octollm.contracts.goals import is_programming_goal
from octollm.contracts.task import MAX_GOAL, Plan, PlanRequest, PlanStep
from octollm.errors import OctoError
from octollm.services.arms.planner.choose import assign_arms
from octollm.services.arms.planner.design import design_plan
from octollm.services.arms.planner.plan_validate import validate_plan
from octollm.services.arms.planner.wording import OnText, word_steps


async def make_plan(
    request: PlanRequest, ask: PromptFunction, *, is_capable: bool = False, on_text: OnText | None = None
) -> Plan:
    """Plan a goal. A ``is_capable_model`` model designs the steps; where it cannot, or none is at hand, code chooses them.

    Code gives each kind of file to its arm, as steps that run side by side, and each step the whole goal; the
    model words titles and criteria. The criteria of the request hold for every step. Raises ``OctoError``:
    ``goal_invalid``, ``file_invalid`` for a file that no arm reads, ``plan_invalid``, and what ``ask`` raises.
    """
    goal = request.goal.strip()
    if not goal or len(goal) > MAX_GOAL:
        raise OctoError(f"A goal has from 1 to {MAX_GOAL} characters.", code="goal_invalid")
    arms = [arm.name for arm in request.arms]
    files = [file.name for file in request.context.files]
    if is_capable:
        designed = await design_plan(request, ask)
        if designed is not None:
            return validate_plan(designed, arms, files)
    parts = assign_arms(goal, files, request.arms, wants_code=is_programming_goal(goal, has_files=bool(files)))
    worded = await word_steps(goal, parts, ask, on_text=on_text)
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
