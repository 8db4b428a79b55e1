"""Checks of a text by code: limits of length, number of items, language, format, required and forbidden words.

They are read from acceptance criteria, and from a goal where it sets a limit of its own ("in three bullet points").
What is not understood is not checked, and said to be so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from octollm import Check
from octollm.contracts.output_schema import extract_json
from octollm.text.language import detect_language, find_requested_language, is_same_language
from octollm.text.lexical import content_words
from octollm.text.limits import COUNTERS, find_limits

MAX_CRITERION_CHARS = 2000
"""Characters of a criterion that are searched for limits."""
MAX_GOAL_CHARS = 1000
GOAL_START_CHARS = 300
"""Characters of a longer goal that are searched for limits."""
_BULLET = re.compile(r"^\s*[-*+•]\s+\S", re.MULTILINE)
_NUMBERED = re.compile(r"^\s*\d+[.)]\s+\S", re.MULTILINE)
_TABLE = re.compile(r"^\s*\|?[^|\n]+\|.*\n\s*\|?\s*:?-{2,}", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class _Finding:
    """What one rule found: the part of the criterion that it understood, and why the text does not meet it, if so."""

    part: tuple[int, int]
    fault: str


def check_text(goal: str, criteria: Sequence[str], output: str, *, may_be_shorter: bool = False) -> list[Check]:
    """Return a check for each criterion and for each limit that the goal sets; ``checked_by`` says who did it.

    A criterion that is understood in part has a check for that part, and one that nobody has done for the rest.
    ``may_be_shorter`` is for texts that end where their source has no more.
    """
    checks = [
        _to_check(goal[slice(*each.part)], each.fault)
        for each in _find_all(goal, output, is_goal=True, may_be_shorter=may_be_shorter)
    ]
    for criterion in criteria:
        findings = _find_all(criterion, output, is_goal=False, may_be_shorter=may_be_shorter)
        checks.extend(_to_check(criterion[slice(*each.part)], each.fault) for each in findings)
        if not findings or _has_rest(criterion, findings):
            checks.append(unchecked(criterion))
    return list({(check.name, check.detail): check for check in checks}.values())


def unchecked(what: str) -> Check:
    """Return the check that nobody has done."""
    return Check("unchecked", False, what[:300], checked_by="nobody")


def _to_check(part: str, fault: str) -> Check:
    return Check("criterion", not fault, fault or " ".join(part.split()), checked_by="code")


_FILLER_TEXT = """
answer response reply output text result summary written write writes length long limit limited short contain contains
include includes format formatted language valid word phrase string object array list table point points document only
exactly keep stay less fewer
"""
_FILLER = frozenset(_FILLER_TEXT.split())


def _has_rest(criterion: str, findings: Sequence[_Finding]) -> bool:
    """Return whether a criterion says more than what the rules have understood."""
    rest = list(criterion)
    for finding in findings:
        rest[slice(*finding.part)] = " " * (finding.part[1] - finding.part[0])
    return any(word not in _FILLER for word in content_words("".join(rest)))


def _find_all(text: str, output: str, *, is_goal: bool, may_be_shorter: bool) -> list[_Finding]:
    if is_goal:
        # Further down a long goal has what it is about, such as a text to summarise.
        text = text if len(text) <= MAX_GOAL_CHARS else text[:GOAL_START_CHARS]
        if not _WRITING.search(text):
            return []
    text = text[:MAX_CRITERION_CHARS]
    limits = _check_limits(text, output, is_goal=is_goal, may_be_shorter=may_be_shorter)
    findings = [*limits, *_check_language(text, output)]
    findings += _check_format(text, output)
    return findings if is_goal else [*findings, *_check_words(text, output)]


def _check_limits(text: str, output: str, *, is_goal: bool, may_be_shorter: bool) -> list[_Finding]:
    findings: list[_Finding] = []
    for limit in find_limits(text):
        if is_goal and (limit.is_vague or limit.unit == "character"):
            continue
        count = COUNTERS[limit.unit](output)
        phrase = " ".join(text[slice(*limit.span)].split())
        low = 0 if may_be_shorter else limit.low
        fault = "" if low <= count <= limit.high else f"{phrase}: the result has {count} {limit.unit}s."
        findings.append(_Finding(limit.span, fault))
    return findings


_WRITING = re.compile(
    r"\b(?:answer|write|reply|respond|explain|summari[sz]e|translate|describe|say|tell|list|give|draft|compose|compare|"
    r"rewrite|extract|fasse|übersetze|beschreibe|erkläre|liste|schreibe|vergleiche|résume[rz]?|resume|traduis|traduce)\b",
    re.IGNORECASE,
)
"""Goals that ask for a text; in others a number of words may well be what the question is about."""


def _check_language(text: str, output: str) -> list[_Finding]:
    requested = find_requested_language(text)
    found = detect_language(output)
    if requested is None or not found:
        return []
    name, span = requested
    fault = "" if is_same_language(name, found) else f"in {name}: the result is in {found}."
    return [_Finding(span, fault)]


# Format


def _is_json(text: str) -> bool:
    try:
        json.loads(extract_json(text))
    except (ValueError, RecursionError):
        return False
    return True


def _has_table(text: str) -> bool:
    return _TABLE.search(text) is not None


def _has_numbers(text: str) -> bool:
    return len(_NUMBERED.findall(text)) > 1


def _has_bullets(text: str) -> bool:
    return len(_BULLET.findall(text)) > 1


_KINDS = r"(?: (?:document|object|array))"
_FORMATS = tuple(
    (re.compile(pattern, re.IGNORECASE), fault, holds)
    for pattern, fault, holds in (
        (rf"\b(?:as|in|valid|is|one|an?) JSON{_KINDS}?\b|\bJSON{_KINDS}\b", "is no JSON document", _is_json),
        (
            r"\b(?:as|in|with|is|has) an? (?:Markdown )?table\b|\bMarkdown table\b",
            "has no table",
            _has_table,
        ),
        (
            r"\b(?:as|in|with|is|has) an? numbered list\b",
            "has no numbered list",
            _has_numbers,
        ),
        (
            r"\b(?:as|in|with|use|uses|using) (?:an? )?(?:bullet(?:ed|-point)? list|bullet points|bullets)\b",
            "has no bullet points",
            _has_bullets,
        ),
    )
)


def _check_format(text: str, output: str) -> list[_Finding]:
    return [
        _Finding(match.span(), "" if holds(output) else f"{match.group()}: the result {fault}.")
        for pattern, fault, holds in _FORMATS
        if (match := pattern.search(text))
    ]


# Words

_QUOTED = r"[\"“'‘`](?P<word>[^\"”'’`\n]{1,80})[\"”'’`]"
_NEGATION = (
    r"(?:must|should|do|does|may) not (?:mention|contain|include|use|have|say)|"
    r"never (?:mentions?|contains?|uses?|says?)|without|avoids?|no"
)
_FORBIDDEN = re.compile(rf"\b(?:{_NEGATION})(?: the)?(?: words?| phrase| term)? {_QUOTED}", re.IGNORECASE)
_REQUIRED = re.compile(
    rf"\b(?:mentions?|contains?|includes?|uses?|has|have|says?)(?: the)?(?: words?| phrase| term)? {_QUOTED}",
    re.IGNORECASE,
)


def _check_words(text: str, output: str) -> list[_Finding]:
    findings: list[_Finding] = []
    for match in _FORBIDDEN.finditer(text):
        fault = f"The result has “{match['word']}”, which it must not have." if _has(output, match["word"]) else ""
        findings.append(_Finding(match.span(), fault))
    for match in _REQUIRED.finditer(text):
        if not any(start <= match.start() < end for start, end in (each.part for each in findings)):
            fault = "" if _has(output, match["word"]) else f"The result lacks “{match['word']}”."
            findings.append(_Finding(match.span(), fault))
    return findings


def _has(output: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word.strip())}(?!\w)", output, re.IGNORECASE) is not None
