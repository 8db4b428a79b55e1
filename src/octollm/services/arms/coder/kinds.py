"""Which of the coder's ways a goal goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from octollm.contracts.goals import is_programming_goal
from octollm.contracts.kinds import file_kind

WorkKind = Literal["data", "code", "text"]


def classify_goal(goal: str, files: Sequence[str]) -> WorkKind:
    """Return ``data`` for a goal with tables, ``solve_code_goal`` for one that wants a program, else ``text``."""
    if any(file_kind(name) == "table" for name in files):
        return "data"
    return "code" if is_programming_goal(goal, has_files=bool(files)) else "text"
