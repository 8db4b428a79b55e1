"""Rule-based planning, for small models.

Rules assign files and goal to arms by media type and matching words; the model writes only titles and criteria.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import msgspec

from octollm import FileRef, Message, OctoError
from octollm.contracts.media_types import accepts_file, kind_of_file
from octollm.contracts.services import BUILT_IN_ARMS
from octollm.contracts.task import ArmInfo, DocumentWork
from octollm.services.arms.completion import PromptFunction
from octollm.services.arms.document_goals import find_document_work
from octollm.text.intent import is_programming_goal
from octollm.text.lexical import stem, stems, tokenize

MIN_MATCH_SCORE = 2
"""The score at which an arm matches. A single word in common is too weak: it is often accidental."""

_POLITE_TEXT = """
please kindly can could would will you i we want need like let us to me my the a an just help have get
"""
_GENERAL_TEXT = """
write answer question text file data word number find show help language python code function test table list sentence
short long good new user goal task result step agent tool work information content name value tell give make do use say
of and or in on at for with from by as is are be it its this that into over under about what which how why when
"""
_POLITE_WORDS = frozenset(_POLITE_TEXT.split())
_GENERAL_STEMS = frozenset(stem(word) for word in _GENERAL_TEXT.split())
_NAME_PART = re.compile(r"[a-z0-9]+")


def leading_stem(text: str) -> str:
    """Return the stem of the first word that is no polite filler: usually the verb, as in *please translate …*."""
    return next((stem(word) for word in tokenize(text) if word not in _POLITE_WORDS), "")


def score_arm(goal: str, arm: ArmInfo) -> int:
    """Return how well ``arm`` matches ``goal``, as a score.

    One point for each significant word that the description and the goal share, one for each part of the arm's name
    that occurs in the goal, and one more when the goal begins with a word of the description: *Translate …* for an
    arm that *translates*. Generic words such as *write* and *text* score nothing.
    """
    description_words = (stems(arm.description) | {leading_stem(arm.description)}) - _GENERAL_STEMS
    goal_words = (stems(goal) | {leading_stem(goal)}) - _GENERAL_STEMS
    name_words = {stem(part) for part in _NAME_PART.findall(arm.name)} - _GENERAL_STEMS
    return (
        len(description_words & goal_words) + len(name_words & goal_words) + (leading_stem(goal) in description_words)
    )


def find_matching_arm(goal: str, arms: Sequence[ArmInfo], *, with_files: bool) -> ArmInfo | None:
    """Return the arm with the highest score; ``None`` when no arm matches or the goal asks for a program.

    Ties go to the first name in alphabetical order, so that the same goal always gets the same plan.
    """
    if is_programming_goal(goal, has_files=with_files):
        return None
    best = min(arms, key=lambda arm: (-score_arm(goal, arm), arm.name), default=None)
    return best if best is not None and score_arm(goal, best) >= MIN_MATCH_SCORE else None


_KIND_PREFIX = "kind:"


@dataclass(frozen=True, slots=True)
class Assignment:
    """A part of a goal: its arm, its files, and a title that needs no model."""

    arm: str
    files: tuple[str, ...]
    title: str
    depends_on: tuple[int, ...] = ()
    """Positions of the parts whose results this one needs."""
    is_certain: bool = False
    """Whether rules tell all that the part has to do, so that no model has to word it."""


def assign_arms(goal: str, files: Sequence[FileRef], arms: Sequence[ArmInfo], *, wants_code: bool) -> list[Assignment]:
    """Split a goal into parts.

    Third-party arms take precedence: an arm gets the goal if it accepts ``kind:<word>`` and the goal contains that
    word, or the files whose media type it accepts, or the goal if its description matches. Tables go to the coder,
    which queries them. Other texts go to the retriever, which cites them, or with ``wants_code`` to the coder. A
    question over texts and tables has three parts: what the texts say, a query that knows it, and one answer from
    both. Raises ``OctoError`` (``file_invalid``) for a file that no arm can read.
    """
    own = [arm for arm in arms if arm.name not in BUILT_IN_ARMS]
    names = tuple(file.name for file in files)
    goal_words = stems(goal)
    for arm in own:
        if any(
            stem(word.removeprefix(_KIND_PREFIX).lower()) in goal_words
            for word in arm.accepts
            if word.startswith(_KIND_PREFIX)
        ):
            return [Assignment(arm.name, names, f"Ask {arm.name}")]
    accepting = any(accepts_file(arm.accepts, name) for arm in own for name in names)
    fitting = None if accepting else find_matching_arm(goal, own, with_files=bool(files))
    if fitting is not None:
        return [Assignment(fitting.name, names, f"Ask {fitting.name}")]
    groups: dict[str, list[str]] = {}
    for file in files:
        groups.setdefault(_arm_for(file, own, wants_code), []).append(file.name)
    if not groups:
        return [Assignment("coder", (), "Write the code" if wants_code else "Write the answer")]
    texts = groups.get("retriever", [])
    work = find_document_work(goal, documents=len(texts))
    if set(groups) == {"retriever", "coder/data"} and work in (None, "answer"):
        tables = groups["coder/data"]
        return [
            Assignment("retriever", tuple(texts), _title("retriever", texts)),
            Assignment("coder", tuple(tables), _title("coder/data", tables), depends_on=(0,)),
            Assignment("retriever", names, "Answer from both", depends_on=(0, 1)),
        ]
    return [
        Assignment(arm.split("/")[0], tuple(group), _WORK_TITLES[work].format(_list_names(group)), is_certain=True)
        if arm == "retriever" and work in _WORK_TITLES
        else Assignment(arm.split("/")[0], tuple(group), _title(arm, group))
        for arm, group in groups.items()
    ]


def _arm_for(file: FileRef, own: Sequence[ArmInfo], program: bool) -> str:
    for arm in own:
        if accepts_file(arm.accepts, file.name):
            return arm.name
    kind = kind_of_file(file)
    if kind == "binary":
        raise OctoError(f"No arm reads files like {file.name}: it is neither a table nor a text.", code="file_invalid")
    if kind == "table":
        return "coder/data"
    return "coder/code" if program else "retriever"


_WORK_TITLES: dict[DocumentWork | None, str] = {
    "summary": "Summarise {}",
    "comparison": "Compare {}",
    "table": "Extract fields from {}",
    "list": "List items of {}",
    "translation": "Translate {}",
    "rewrite": "Rewrite {}",
}


def _list_names(names: Sequence[str]) -> str:
    return ", ".join(names)[:100]


def _title(arm: str, names: Sequence[str]) -> str:
    listed = _list_names(names)
    verb = {"coder/data": "Query", "retriever": "Look up", "coder/code": "Write the code from"}.get(
        arm, f"Ask {arm} about"
    )
    return f"{verb} {listed}"


OnText = Callable[[str], Awaitable[None]]

MAX_GOAL_CHARS = 1500
"""Characters of the goal in the prompt: enough to write a title."""
_TOKENS_PER_STEP = 80
_MAX_TITLE, _MAX_CRITERION = 70, 120
"""Characters. A criterion of exactly this length was cut off by the schema, and is dropped."""
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
    """Title and criteria of a step; ``is_by_model`` is false where the model's answer could not be used."""

    title: str
    criteria: tuple[str, ...]
    is_by_model: bool


async def word_steps(
    goal: str, assignments: Sequence[Assignment], ask: PromptFunction, *, on_text: OnText | None = None
) -> list[StepWording]:
    """Return a wording for each part, in order; when the model's answer does not parse, the plain titles for all.

    Parts that rules tell all of keep their plain titles, and the model is not asked. Raises what ``ask`` raises.
    """
    if all(part.is_certain for part in assignments):
        return [StepWording(part.title, (), is_by_model=False) for part in assignments]
    answer = await ask(
        _wording_messages(goal, assignments),
        max_tokens=_TOKENS_PER_STEP * len(assignments) + 20,
        schema=_wording_schema(len(assignments)),
        on_text=on_text,
    )
    try:
        steps = msgspec.json.decode(answer.encode(), type=_WordingAnswer).steps
    except msgspec.DecodeError:
        steps = ()
    # All or none: with a step missing or empty, the model's titles may belong to other steps than their position says.
    if len(steps) != len(assignments) or not all(step.title.strip() for step in steps):
        return [StepWording(part.title, (), is_by_model=False) for part in assignments]
    return [
        StepWording(_single_line(step.title), _complete_criteria(step.criteria), is_by_model=True) for step in steps
    ]


def _wording_messages(goal: str, parts: Sequence[Assignment]) -> list[Message]:
    listed = "\n".join(f"{number}. {part.title}" for number, part in enumerate(parts, start=1))
    return [Message.system(_WORDING_PROMPT), Message.user(f"Goal: {goal[:MAX_GOAL_CHARS]}\nSteps:\n{listed}")]


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
