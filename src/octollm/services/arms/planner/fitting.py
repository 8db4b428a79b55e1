"""Whether a goal is one that an arm of somebody's own is for, told by the arm's name and description.

No model is asked, so that the same goal always goes the same way, and anybody can say why.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from octollm.contracts.goals import wants_program
from octollm.contracts.task import ArmInfo
from octollm.contracts.words import stem, stems, words

ENOUGH = 2
"""Points from which on an arm fits. One word in common is an accident."""

_POLITE_TEXT = """
please kindly can could would will you i we want need like let us to me my the a an just help have get
"""
_GENERAL_TEXT = """
write answer question text file data word number find show help language python code function test table list sentence
short long good new user goal task result step agent tool work information content name value tell give make do use say
"""
_POLITE = frozenset(_POLITE_TEXT.split())
_GENERAL = frozenset(stem(word) for word in _GENERAL_TEXT.split())
_NAME_PART = re.compile(r"[a-z0-9]+")


def lead_of(text: str) -> str:
    """Return the stem of the word that ``text`` begins with, politeness passed over: what it is about to do."""
    return next((stem(word) for word in words(text) if word not in _POLITE), "")


def fit(goal: str, arm: ArmInfo) -> int:
    """Return how well ``arm`` fits ``goal``, in points.

    A point for each word of meaning that its description and the goal share, one for each part of its name that the
    goal has, and one more when the goal begins with a word of the description: *Translate …* for an arm that
    *translates*. Words that fit any goal, such as *write* and *text*, count nothing.
    """
    described = (stems(arm.description) | {lead_of(arm.description)}) - _GENERAL
    said = (stems(goal) | {lead_of(goal)}) - _GENERAL
    named = {stem(part) for part in _NAME_PART.findall(arm.name)} - _GENERAL
    return len(described & said) + len(named & said) + (lead_of(goal) in described)


def fitting_arm(goal: str, arms: Sequence[ArmInfo], *, with_files: bool) -> ArmInfo | None:
    """Return the arm that fits best, the first by name of equals; ``None`` when none fits, or a program is wanted."""
    if wants_program(goal, with_files=with_files):
        return None
    best = max(sorted(arms, key=lambda arm: arm.name, reverse=True), key=lambda arm: fit(goal, arm), default=None)
    return best if best is not None and fit(goal, best) >= ENOUGH else None
