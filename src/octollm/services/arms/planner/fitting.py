"""Whether a goal is one that an arm of somebody's own is for, told by the arm's name and description.

No model is asked, so that the same goal always goes the same way, and anybody can say why.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from octollm.contracts.goals import is_programming_goal
from octollm.contracts.task import ArmInfo
from octollm.contracts.words import stem, stems, tokenize

MIN_MATCH_SCORE = 2
"""Points from which on an arm fits. One word in common is an accident."""

_POLITE_TEXT = """
please kindly can could would will you i we want need like let us to me my the a an just help have get
"""
_GENERAL_TEXT = """
write answer question text file data word number find show help language python code function test table list sentence
short long good new user goal task result step agent tool work information content name value tell give make do use say
"""
_POLITE_WORDS = frozenset(_POLITE_TEXT.split())
_GENERAL_STEMS = frozenset(stem(word) for word in _GENERAL_TEXT.split())
_NAME_PART = re.compile(r"[a-z0-9]+")


def leading_stem(text: str) -> str:
    """Return the stem of the word that ``text`` begins with, politeness passed over: what it is about to do."""
    return next((stem(word) for word in tokenize(text) if word not in _POLITE_WORDS), "")


def score_arm(goal: str, arm: ArmInfo) -> int:
    """Return how well ``arm`` fits ``goal``, in points.

    A point for each word of meaning that its description and the goal share, one for each part of its name that the
    goal has, and one more when the goal begins with a word of the description: *Translate …* for an arm that
    *translates*. Words that fit any goal, such as *write* and *text*, count nothing.
    """
    described = (stems(arm.description) | {leading_stem(arm.description)}) - _GENERAL_STEMS
    said = (stems(goal) | {leading_stem(goal)}) - _GENERAL_STEMS
    named = {stem(part) for part in _NAME_PART.findall(arm.name)} - _GENERAL_STEMS
    return len(described & said) + len(named & said) + (leading_stem(goal) in described)


def find_matching_arm(goal: str, arms: Sequence[ArmInfo], *, with_files: bool) -> ArmInfo | None:
    """Return the arm that fits best, the first by name of equals; ``None`` when none fits, or a program is wanted."""
    if is_programming_goal(goal, has_files=with_files):
        return None
    best = max(sorted(arms, key=lambda arm: arm.name, reverse=True), key=lambda arm: score_arm(goal, arm), default=None)
    return best if best is not None and score_arm(goal, best) >= MIN_MATCH_SCORE else None
