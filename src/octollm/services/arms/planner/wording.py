"""The model words the steps that code has chosen: a title and what to look at. It decides nothing."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import msgspec

from octollm.contracts.asking import PromptFunction, PromptMessage, system, user
from octollm.services.arms.planner.choose import Assignment

OnText = Callable[[str], Awaitable[None]]

MAX_GOAL_CHARS = 1500
"""Characters of the goal that the model is shown: enough to word a title."""
_TOKENS_PER_STEP = 80
_MAX_TITLE, _MAX_CRITERION = 70, 120
"""Characters; a criterion of that length was cut by the schema and is left out."""
_WORDING_PROMPT = (
    "You plan work. Write for each step a short title, and one criterion that its result must meet, in at most twelve "
    "words. Reply with JSON."
)


class _WordedStep(msgspec.Struct, frozen=True):
    title: str
    criteria: tuple[str, ...] = ()


class _WordingAnswer(msgspec.Struct, frozen=True):
    steps: tuple[_WordedStep, ...]


@dataclass(frozen=True, slots=True)
class StepWording:
    """How a step is worded; ``by_model`` is false where the model's words could not be used."""

    title: str
    criteria: tuple[str, ...]
    is_by_model: bool


async def word_steps(
    goal: str, assignments: Sequence[Assignment], ask: PromptFunction, *, on_text: OnText | None = None
) -> list[StepWording]:
    """Return a wording for each part, in order; plain titles for all of them when the model's answer does not parse.

    Raises what ``ask`` raises.
    """
    answer = await ask(
        _wording_messages(goal, assignments),
        max_tokens=_TOKENS_PER_STEP * len(assignments) + 20,
        schema=_wording_schema(len(assignments)),
        on_text=on_text,
    )
    try:
        said = msgspec.json.decode(answer.encode(), type=_WordingAnswer).steps
    except msgspec.DecodeError:
        said = ()
    if len(said) != len(assignments) or not all(step.title.strip() for step in said):
        return [StepWording(part.title, (), is_by_model=False) for part in assignments]
    return [StepWording(_single_line(step.title), _complete_criteria(step.criteria), is_by_model=True) for step in said]


def _wording_messages(goal: str, parts: Sequence[Assignment]) -> list[PromptMessage]:
    listed = "\n".join(f"{number}. {part.title}" for number, part in enumerate(parts, start=1))
    return [system(_WORDING_PROMPT), user(f"Goal: {goal[:MAX_GOAL_CHARS]}\nSteps:\n{listed}")]


def _wording_schema(steps: int) -> dict[str, object]:
    step = {
        "type": "object",
        "properties": {
            "title": {"type": "string", "minLength": 8, "maxLength": _MAX_TITLE},
            "criteria": {
                "type": "array",
                "minItems": 1,
                "maxItems": 1,
                "items": {"type": "string", "minLength": 8, "maxLength": _MAX_CRITERION},
            },
        },
        "required": ["title", "criteria"],
        "additionalProperties": False,
    }
    return {
        "type": "object",
        "properties": {"steps": {"type": "array", "minItems": steps, "maxItems": steps, "items": step}},
        "required": ["steps"],
        "additionalProperties": False,
    }


def _complete_criteria(criteria: Sequence[str]) -> tuple[str, ...]:
    return tuple(filter(None, (_single_line(each) for each in criteria if len(each) < _MAX_CRITERION)))


def _single_line(text: str) -> str:
    return " ".join(text.split())
