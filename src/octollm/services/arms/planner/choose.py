"""Which arm does what, by the kinds of the files and by what arms say they accept. No model is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from octollm.contracts.kinds import accepts_file, file_kind
from octollm.contracts.services import BUILT_IN_ARMS
from octollm.contracts.task import ArmInfo
from octollm.contracts.words import stem, stems
from octollm.errors import OctoError
from octollm.services.arms.planner.fitting import find_matching_arm

_KIND_PREFIX = "kind:"


@dataclass(frozen=True, slots=True)
class Assignment:
    """A part of a goal: the arm that does it, the files it is given, and a plain title."""

    arm: str
    files: tuple[str, ...]
    title: str


def assign_arms(goal: str, files: Sequence[str], arms: Sequence[ArmInfo], *, wants_code: bool) -> list[Assignment]:
    """Split a goal into parts that need nothing of each other.

    An arm of somebody's own comes first: it takes the goal if it accepts ``kind:<word>`` and the goal has that word,
    or the files whose media type it accepts, or the goal if its description fits. Tables go to the coder, which
    queries them; other texts to the retriever, which cites them, or to the coder when a ``program`` is wanted. Raises
    ``OctoError`` (``file_invalid``) for a file that no arm can read.
    """
    own = [arm for arm in arms if arm.name not in BUILT_IN_ARMS]
    said = stems(goal)
    for arm in own:
        if any(
            stem(word.removeprefix(_KIND_PREFIX).lower()) in said
            for word in arm.accepts
            if word.startswith(_KIND_PREFIX)
        ):
            return [Assignment(arm.name, tuple(files), f"Ask {arm.name}")]
    accepting = any(accepts_file(arm.accepts, name) for arm in own for name in files)
    fitting = None if accepting else find_matching_arm(goal, own, with_files=bool(files))
    if fitting is not None:
        return [Assignment(fitting.name, tuple(files), f"Ask {fitting.name}")]
    groups: dict[str, list[str]] = {}
    for name in files:
        groups.setdefault(_arm_for(name, own, wants_code), []).append(name)
    if not groups:
        return [Assignment("coder", (), "Write the code" if wants_code else "Write the answer")]
    return [Assignment(arm.split("/")[0], tuple(names), _title(arm, names)) for arm, names in groups.items()]


def _arm_for(name: str, own: Sequence[ArmInfo], program: bool) -> str:
    for arm in own:
        if accepts_file(arm.accepts, name):
            return arm.name
    kind = file_kind(name)
    if kind == "binary":
        raise OctoError(f"No arm reads files like {name}: it is neither a table nor a text.", code="file_invalid")
    if kind == "table":
        return "coder/data"
    return "coder/code" if program else "retriever"


def _title(arm: str, names: Sequence[str]) -> str:
    listed = ", ".join(names)[:100]
    verb = {"coder/data": "Query", "retriever": "Look up", "coder/code": "Write the code from"}.get(
        arm, f"Ask {arm} about"
    )
    return f"{verb} {listed}"
