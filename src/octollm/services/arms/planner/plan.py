"""Plan creation: a capable model designs the steps, otherwise rules assign them; every plan is validated."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec

from octollm import Message, OctoError
from octollm.contracts.services import BUILT_IN_ARMS
from octollm.contracts.task import MAX_GOAL, ArmInfo, Plan, PlanRequest, PlanStep
from octollm.services.arms.completion import PromptFunction
from octollm.services.arms.planner.assignment import OnText, assign_arms, word_steps
from octollm.text.intent import is_programming_goal

MAX_STEPS = 16
"""Steps of one plan."""
MAX_TITLE = 200
MAX_CRITERIA = 10


def validate_plan(plan: Plan, arms: Collection[str], files: Collection[str]) -> Plan:
    """Return ``plan`` if it can run with ``arms`` (and the built-in ones) and the task's ``files``.

    Raises ``OctoError`` (``plan_invalid``) with the faults: no or too many steps, duplicate ids, unknown arms, files
    or dependencies, a dependency cycle, a goal that is empty or too long.
    """
    faults = find_plan_faults(plan, {*arms, *BUILT_IN_ARMS}, set(files))
    if faults:
        raise OctoError("The plan cannot be used: " + "; ".join(faults[:8]) + ".", code="plan_invalid")
    return plan


def find_plan_faults(plan: Plan, arms: Collection[str], files: Collection[str]) -> list[str]:
    """Return the faults of ``plan`` as messages; empty when it is valid."""
    steps = plan.steps
    if not 1 <= len(steps) <= MAX_STEPS:
        return [f"it has {len(steps)} steps, from 1 to {MAX_STEPS} are possible"]
    ids = [step.id for step in steps]
    faults = [f"the id {name!r} is used twice" for name in sorted({name for name in ids if ids.count(name) > 1})]
    for step in steps:
        faults.extend(f"step {step.id!r}: {fault}" for fault in _find_step_faults(step, set(ids), arms, files))
    if not faults and not is_acyclic(steps):
        # Only for a plan without other faults: a dependency on an unknown step would look like a cycle.
        faults.append("the steps depend on each other in a cycle")
    return faults


def is_acyclic(steps: Collection[PlanStep]) -> bool:
    """Return whether the dependencies of the steps have no cycle (Kahn's algorithm)."""
    pending = {step.id: set(step.depends_on) for step in steps}
    while pending:
        ready = [name for name, needs in pending.items() if not needs & pending.keys()]
        if not ready:
            return False
        for name in ready:
            del pending[name]
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


MAX_DESIGNED_STEPS = 8
MAX_PLAN_TOKENS = 1500
MAX_DESIGN_ATTEMPTS = 2
_PLAN_PROMPT = (
    "You plan work for a team of arms. Use as few steps as the goal needs: one where one arm can do all of it. Give "
    "each step the arm that fits, a goal that stands on its own, the files it needs, and the ids of the steps whose "
    "output it needs. Steps that need nothing of each other run at the same time. Reply with JSON."
)
_BUILT_IN_ARMS = (
    ArmInfo(
        "coder",
        "Writes tested Python code; answers questions over tables (CSV, TSV, JSON, Parquet) with SQL; writes texts",
    ),
    ArmInfo(
        "retriever",
        "Answers a question from text documents, with citations of file and lines; summarises, compares, translates "
        "and rewrites them, extracts fields and lists items; joins the results of steps over documents and over tables",
    ),
    ArmInfo("planner", "Works a goal off by writing and running small Python programs, one after the other"),
)


class _PlanAnswer(msgspec.Struct, frozen=True):
    steps: tuple[PlanStep, ...]


async def design_plan(request: PlanRequest, ask: PromptFunction) -> Plan | None:
    """Return the model's plan, or ``None`` when no attempt was valid. Raises what ``ask`` raises."""
    arms = available_arms(request.arms)
    names = [arm.name for arm in arms]
    files = [file.name for file in request.context.files]
    messages = _plan_messages(request, arms)
    for attempt in range(MAX_DESIGN_ATTEMPTS):
        answer = await ask(messages, max_tokens=MAX_PLAN_TOKENS, schema=_plan_schema(names, files), seed=attempt)
        try:
            plan = Plan(msgspec.json.decode(answer.encode(), type=_PlanAnswer).steps)
        except msgspec.DecodeError:
            fault = "the answer is not the JSON that was asked for"
        else:
            faults = find_plan_faults(plan, names, files)
            if not faults:
                return _number_steps(plan)
            fault = "; ".join(faults[:5])
        # Only the last attempt is in the prompt: earlier ones would use up the context and repeat their mistakes.
        messages = [
            *messages[:2],
            Message.assistant(answer[:4000]),
            Message.user(f"This plan cannot be used: {fault}. Mend it."),
        ]
    return None


def _number_steps(plan: Plan) -> Plan:
    """Return the plan with the ids ``s1``, ``s2``, …: a model's own may hold what URLs and live positions cannot."""
    names = {step.id: f"s{number}" for number, step in enumerate(plan.steps, start=1)}
    return Plan(
        tuple(
            msgspec.structs.replace(
                step, id=names[step.id], depends_on=tuple(dict.fromkeys(names[need] for need in step.depends_on))
            )
            for step in plan.steps
        )
    )


def available_arms(arms: Sequence[ArmInfo]) -> list[ArmInfo]:
    """Return the built-in arms that execute steps, then the registered ones."""
    built_in = {arm.name for arm in _BUILT_IN_ARMS} | {"executor", "judge"}
    return [*_BUILT_IN_ARMS, *(arm for arm in arms if arm.name not in built_in)]


def _plan_messages(request: PlanRequest, arms: Sequence[ArmInfo]) -> list[Message]:
    listed = "\n".join(f"- {arm.name}: {arm.description[:300]}" for arm in arms)
    parts = [f"Arms:\n{listed}", f"Goal: {request.goal}"]
    if request.context.files:
        parts.append("Files: " + ", ".join(file.name for file in request.context.files))
    if request.context.instructions:
        parts.append("Keep to this:\n" + "\n".join(f"- {each}" for each in request.context.instructions))
    if request.context.text:
        parts.append(f"Notes: {request.context.text[:2000]}")
    if request.acceptance_criteria:
        parts.append("The result must meet:\n" + "\n".join(f"- {each}" for each in request.acceptance_criteria[:10]))
    if request.reasons:
        parts.append("An earlier plan failed:\n" + "\n".join(f"- {reason}" for reason in request.reasons[:10]))
    return [Message.system(_PLAN_PROMPT), Message.user("\n\n".join(parts))]


def _plan_schema(arms: Sequence[str], files: Sequence[str]) -> dict[str, object]:
    text = {"type": "string", "minLength": 3, "maxLength": 2000}
    names = {"type": "array", "maxItems": MAX_DESIGNED_STEPS, "items": {"type": "string", "maxLength": 20}}
    file = {"type": "string", "enum": list(files)} if files else {"type": "string", "maxLength": 100}
    properties: dict[str, object] = {
        "id": {"type": "string", "minLength": 1, "maxLength": 20},
        "title": {"type": "string", "minLength": 3, "maxLength": 80},
        "arm": {"type": "string", "enum": list(arms)},
        "goal": text,
        "depends_on": names,
        "files": {"type": "array", "maxItems": len(files), "items": file},
        "acceptance_criteria": {"type": "array", "maxItems": 4, "items": {"type": "string", "maxLength": 200}},
    }
    step = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return {
        "type": "object",
        "properties": {"steps": {"type": "array", "minItems": 1, "maxItems": MAX_DESIGNED_STEPS, "items": step}},
        "required": ["steps"],
        "additionalProperties": False,
    }


async def make_plan(
    request: PlanRequest, ask: PromptFunction, *, is_capable: bool = False, on_text: OnText | None = None
) -> Plan:
    """Plan a goal: a capable model designs the steps; without one, or where its plan is invalid, rules assign them.

    The rules make one step for each kind of file, each with the whole goal; the model writes titles and criteria. Steps
    that need nothing of each other run in parallel. The criteria of the request apply to every step. Raises
    ``OctoError``: ``goal_invalid``, ``file_invalid`` for a file that no arm reads, ``plan_invalid``, and what ``ask``
    raises.
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
    parts = assign_arms(
        goal, request.context.files, request.arms, wants_code=is_programming_goal(goal, has_files=bool(files))
    )
    worded = await word_steps(goal, parts, ask, on_text=on_text)
    steps = tuple(
        PlanStep(
            id=f"s{number}",
            title=wording.title,
            arm=part.arm,
            goal=goal,
            acceptance_criteria=(*request.acceptance_criteria, *wording.criteria),
            files=part.files,
            depends_on=tuple(f"s{position + 1}" for position in part.depends_on),
        )
        for number, (part, wording) in enumerate(zip(parts, worded, strict=True), start=1)
    )
    return validate_plan(Plan(steps), arms, files)
