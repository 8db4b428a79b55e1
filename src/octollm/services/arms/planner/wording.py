"""The model words the steps that code has chosen: a title and what to look at. It decides nothing."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import msgspec

from octollm.contracts.asking import Ask, Message, system, user
from octollm.services.arms.planner.choose import Part

OnText = Callable[[str], Awaitable[None]]

MAX_GOAL_CHARS = 1500
"""Characters of the goal that the model is shown: enough to word a title."""
_TOKENS_PER_STEP = 80
_MAX_TITLE, _MAX_CRITERION = 70, 120
"""Characters; a criterion of that length was cut by the schema and is left out."""
_SYSTEM = (
    "You plan work. Write for each step a short title, and one criterion that its result must meet, in at most twelve "
    "words. Reply with JSON."
)


class _Worded(msgspec.Struct, frozen=True):
    title: str
    criteria: tuple[str, ...] = ()


class _Answer(msgspec.Struct, frozen=True):
    steps: tuple[_Worded, ...]


@dataclass(frozen=True, slots=True)
class Wording:
    """How a step is worded; ``by_model`` is false where the model's words could not be used."""

    title: str
    criteria: tuple[str, ...]
    by_model: bool


async def word_parts(goal: str, parts: Sequence[Part], ask: Ask, *, on_text: OnText | None = None) -> list[Wording]:
    """Return a wording for each part, in order; plain titles for all of them when the model's answer does not parse.

    Raises what ``ask`` raises.
    """
    answer = await ask(
        _messages(goal, parts),
        max_tokens=_TOKENS_PER_STEP * len(parts) + 20,
        schema=_schema(len(parts)),
        on_text=on_text,
    )
    try:
        said = msgspec.json.decode(answer.encode(), type=_Answer).steps
    except msgspec.DecodeError:
        said = ()
    if len(said) != len(parts) or not all(step.title.strip() for step in said):
        return [Wording(part.title, (), by_model=False) for part in parts]
    return [Wording(_line(step.title), _whole(step.criteria), by_model=True) for step in said]


def _messages(goal: str, parts: Sequence[Part]) -> list[Message]:
    listed = "\n".join(f"{number}. {part.title}" for number, part in enumerate(parts, start=1))
    return [system(_SYSTEM), user(f"Goal: {goal[:MAX_GOAL_CHARS]}\nSteps:\n{listed}")]


def _schema(steps: int) -> dict[str, object]:
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


def _whole(criteria: Sequence[str]) -> tuple[str, ...]:
    return tuple(filter(None, (_line(each) for each in criteria if len(each) < _MAX_CRITERION)))


def _line(text: str) -> str:
    return " ".join(text.split())
