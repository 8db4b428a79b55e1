"""A plan that a capable model designs: it may use every arm that is offered, and several steps."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from octollm.contracts.asking import PromptFunction, PromptMessage, assistant, system, user
from octollm.contracts.task import ArmInfo, Plan, PlanRequest, PlanStep
from octollm.services.arms.planner.plan_validate import find_plan_faults

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
    ArmInfo("retriever", "Answers a question from text documents, with citations of file and lines"),
    ArmInfo("planner", "Works a goal off by writing and running small Python programs, one after the other"),
)


class _PlanAnswer(msgspec.Struct, frozen=True):
    steps: tuple[PlanStep, ...]


async def design_plan(request: PlanRequest, ask: PromptFunction) -> Plan | None:
    """Return a plan of the model's, or ``None`` when it gave none that can be run. Raises what ``ask`` raises."""
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
                return plan
            fault = "; ".join(faults[:5])
        messages = [*messages[:2], assistant(answer[:4000]), user(f"This plan cannot be used: {fault}. Mend it.")]
    return None


def available_arms(arms: Sequence[ArmInfo]) -> list[ArmInfo]:
    """Return the built-in arms that do steps, then those that others registered."""
    known = {arm.name for arm in _BUILT_IN_ARMS} | {"executor", "judge"}
    return [*_BUILT_IN_ARMS, *(arm for arm in arms if arm.name not in known)]


def _plan_messages(request: PlanRequest, arms: Sequence[ArmInfo]) -> list[PromptMessage]:
    listed = "\n".join(f"- {arm.name}: {arm.description[:300]}" for arm in arms)
    parts = [f"Arms:\n{listed}", f"Goal: {request.goal}"]
    if request.context.files:
        parts.append("Files: " + ", ".join(file.name for file in request.context.files))
    if request.context.text:
        parts.append(f"Notes: {request.context.text[:2000]}")
    if request.acceptance_criteria:
        parts.append("The result must meet:\n" + "\n".join(f"- {each}" for each in request.acceptance_criteria[:10]))
    if request.reasons:
        parts.append("An earlier plan failed:\n" + "\n".join(f"- {reason}" for reason in request.reasons[:10]))
    return [system(_PLAN_PROMPT), user("\n\n".join(parts))]


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
