"""Checks of a text by code: limits of length, number of items, language, format, required and forbidden words.

They are read from acceptance criteria, and from a goal where it sets a limit of its own ("in three bullet points").
What is not understood is not checked, and said to be so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from octollm import Check
from octollm.contracts.output_schema import extract_json
from octollm.text.lexical import content_words

MAX_CRITERION_CHARS = 2000
"""Characters of a criterion that are searched for limits."""
MAX_GOAL_CHARS = 1000
GOAL_START_CHARS = 300
"""Characters of a longer goal that are searched for limits."""
_NUMBER_WORDS = """
one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
nineteen twenty
"""
_NUMBERS = {word: number for number, word in enumerate(_NUMBER_WORDS.split(), start=1)}
_NUMBER = rf"(?:\d{{1,5}}|a single|an?|{'|'.join(_NUMBERS)})"
_ITEM = re.compile(r"^\s*(?:[-*+•]|\d+[.)])\s+\S", re.MULTILINE)
_BULLET = re.compile(r"^\s*[-*+•]\s+\S", re.MULTILINE)
_NUMBERED = re.compile(r"^\s*\d+[.)]\s+\S", re.MULTILINE)
_TABLE = re.compile(r"^\s*\|?[^|\n]+\|.*\n\s*\|?\s*:?-{2,}", re.MULTILINE)
_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s|$)|[。！？]")
_ABBREVIATION = re.compile(
    r"\b(?:e\.g|i\.e|etc|vs|Dr|Mr|Mrs|Ms|Prof|St|No|approx|z\.B|d\.h|bzw|usw)\.|\b[A-Z]\.(?=\s?[A-Z])"
)


def count_words(text: str) -> int:
    """Count what is between white space and has a letter or digit."""
    return sum(any(char.isalnum() for char in part) for part in text.split())


def count_sentences(text: str) -> int:
    """Count the sentences; a list item or last line without a full stop is one."""
    count = 0
    for line in text.splitlines():
        plain = _ABBREVIATION.sub("x", re.sub(r"^\s*(?:[-*+•]|\d+[.)])\s+", "", line)).strip()
        if any(char.isalnum() for char in plain):
            ends = _SENTENCE_END.findall(plain)
            count += len(ends) + (_SENTENCE_END.search(plain[-4:]) is None)
    return count


def _count_paragraphs(text: str) -> int:
    return sum(bool(part.strip()) for part in re.split(r"\n\s*\n", text))


def _count_lines(text: str) -> int:
    return sum(bool(line.strip()) for line in text.splitlines())


_COUNTERS: dict[str, Callable[[str], int]] = {
    "word": count_words,
    "sentence": count_sentences,
    "bullet": lambda text: len(_BULLET.findall(text)) or len(_ITEM.findall(text)),
    "item": lambda text: len(_ITEM.findall(text)),
    "paragraph": _count_paragraphs,
    "line": _count_lines,
    "character": lambda text: len(text.strip()),
}
_UNIT = (
    r"(?P<unit>words?|sentences?|bullet(?:ed)?[ -]?(?:points?|items?)|bullets?|(?:list )?items?|paragraphs?|lines?|"
    r"characters?)\b"
)
_ADJECTIVE = r"(?:(?:short|brief|clear|concise|full|simple|complete|plain)[ -]+)?"
_MOST = r"at most|no more than|not more than|up to|a maximum of|maximum|max\.?|within|no longer than|not exceed(?:ing)?"
_LEAST = "at least|no fewer than|no less than|a minimum of|minimum"
_LIMITS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (kind, re.compile(pattern, re.IGNORECASE))
    for kind, pattern in (
        ("between", rf"\b(?P<low>{_NUMBER})(?: ?(?:-|–|to|and) ?)(?P<number>{_NUMBER}) {_ADJECTIVE}{_UNIT}"),
        ("most", rf"\b(?:{_MOST}) (?P<number>{_NUMBER}) {_ADJECTIVE}{_UNIT}"),
        ("most", rf"\b(?P<number>{_NUMBER}) {_ADJECTIVE}{_UNIT} (?:or less|or fewer|at most|maximum|max\b)"),
        ("below", rf"\b(?:fewer than|less than|under|below|shorter than) (?P<number>{_NUMBER}) {_ADJECTIVE}{_UNIT}"),
        ("least", rf"\b(?:{_LEAST}) (?P<number>{_NUMBER}) {_ADJECTIVE}{_UNIT}"),
        ("least", rf"\b(?P<number>{_NUMBER}) {_ADJECTIVE}{_UNIT} or more"),
        ("above", rf"\b(?:more than|over|longer than) (?P<number>{_NUMBER}) {_ADJECTIVE}{_UNIT}"),
        ("about", rf"\b(?:about|around|approximately|roughly|some) (?P<number>{_NUMBER}) {_ADJECTIVE}{_UNIT}"),
        ("exact", rf"\b(?:exactly|just|only|in|with|has|have|as|of) (?P<number>{_NUMBER}) {_ADJECTIVE}{_UNIT}"),
        ("exact", rf"^\W*(?P<number>{_NUMBER}) {_ADJECTIVE}{_UNIT}\W*$"),
    )
)  # fmt: skip
_ABOUT = 0.25
"""How far a length may be from one that is only about so."""
_ROUND = 0.15
"""How far a number of words may be from "in 50 words"."""


@dataclass(frozen=True, slots=True)
class _Finding:
    """What one rule found: the part of the criterion that it understood, and why the text does not meet it, if so."""

    part: tuple[int, int]
    fault: str


def check_text(goal: str, criteria: Sequence[str], output: str) -> list[Check]:
    """Return a check for each criterion and for each limit that the goal sets; ``checked_by`` says who did it.

    A criterion that is understood in part has a check for that part, and one that nobody has done for the rest.
    """
    checks = [_to_check(goal[slice(*each.part)], each.fault) for each in _find_all(goal, output, is_goal=True)]
    for criterion in criteria:
        findings = _find_all(criterion, output, is_goal=False)
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


def _find_all(text: str, output: str, *, is_goal: bool) -> list[_Finding]:
    if is_goal:
        # Further down a long goal has what it is about, such as a text to summarise.
        text = text if len(text) <= MAX_GOAL_CHARS else text[:GOAL_START_CHARS]
        if not _WRITING.search(text):
            return []
    text = text[:MAX_CRITERION_CHARS]
    findings = [*_check_limits(text, output, is_goal=is_goal), *_check_language(text, output)]
    findings += _check_format(text, output)
    return findings if is_goal else [*findings, *_check_words(text, output)]


def _number(text: str) -> int:
    return int(text) if text.isdigit() else _NUMBERS.get(text.lower(), 1)


def _check_limits(text: str, output: str, *, is_goal: bool) -> list[_Finding]:
    findings: list[_Finding] = []
    if _FOR_EACH.search(text):
        return findings
    taken: list[tuple[int, int]] = []
    for kind, pattern in _LIMITS:
        for match in pattern.finditer(text):
            if any(match.start() < end and start < match.end() for start, end in taken):
                continue
            taken.append(match.span())
            unit = next(name for name in _COUNTERS if match["unit"].lower().removeprefix("list ").startswith(name))
            is_vague = match["number"].lower() in ("a", "an") or text[match.end() :].startswith(" of")
            if is_goal and (is_vague or unit == "character"):
                continue
            number, count = _number(match["number"]), _COUNTERS[unit](output)
            low = _number(match["low"]) if kind == "between" else number
            low, high = _bounds(kind, low, number, unit)
            fault = (
                "" if low <= count <= high else f"{' '.join(match.group().split())}: the result has {count} {unit}s."
            )
            findings.append(_Finding(match.span(), fault))
    return findings


def _bounds(kind: str, low: int, number: int, unit: str) -> tuple[float, float]:
    most = float("inf")
    slack = _ABOUT if kind == "about" else _ROUND if kind == "exact" and unit == "word" and number >= 20 else 0.0
    return {
        "between": (low, number), "most": (0, number), "below": (0, number - 1), "least": (number, most),
        "above": (number + 1, most), "about": (number * (1 - slack), number * (1 + slack)),
        "exact": (number * (1 - slack), number * (1 + slack)),
    }[kind]  # fmt: skip


# Language

_SCRIPTS: dict[str, str] = {
    "Russian": "\u0400-\u04ff", "Ukrainian": "\u0400-\u04ff", "Bulgarian": "\u0400-\u04ff", "Greek": "\u0370-\u03ff",
    "Chinese": "\u4e00-\u9fff", "Japanese": "\u3040-\u30ff\u4e00-\u9fff", "Korean": "\uac00-\ud7af",
    "Arabic": "\u0600-\u06ff", "Hebrew": "\u0590-\u05ff", "Hindi": "\u0900-\u097f", "Thai": "\u0e00-\u0e7f",
}  # fmt: skip
_COMMON_WORDS: dict[str, frozenset[str]] = {
    language: frozenset(words.split())
    for language, words in {
        "English": "the and of to is are was were that this with for from have has it they which would not you be by",
        "German": "der die das und ist sind war nicht ein eine einen mit von zu den dem auf für im sich auch wird es",
        "French": "le les des et est sont une dans que qui pour pas du au avec sur ce cette il elle nous vous par",
        "Spanish": "el los las y es son una que para no del con por como se su está más lo al pero este esta",
        "Italian": "il gli di e è sono una che per non del con della nel come si più questo questa alla da ma",
        "Portuguese": "os as e é são uma que para não do da com por como se mais em ao pelo pela este esta um",
        "Dutch": "de het een en is zijn van niet met op te voor dat die aan er ook wordt bij naar om door",
        "Polish": "i w na jest nie się z do że to są jak po od za przez dla oraz ale był która który",
        "Swedish": "och är att det som en på för av med inte den till har var ett om från så kan vid men",
    }.items()
}
_LANGUAGE_NAMES = "|".join([*_COMMON_WORDS, *_SCRIPTS, "Deutsch"])
_LANGUAGE = re.compile(
    rf"\b(?:in|into|auf) (?P<name>{_LANGUAGE_NAMES})\b(?!\s+(?!and\b|or\b|only\b|with\b|in\b|using\b)[a-z])"
)
_WRITING = re.compile(
    r"\b(?:answer|write|reply|respond|explain|summari[sz]e|translate|describe|say|tell|list|give|draft|compose)\b",
    re.IGNORECASE,
)
"""Goals that ask for a text; in others a number of words may well be what the question is about."""
_FOR_EACH = re.compile(r"\b(?:each|every|per|apiece)\b", re.IGNORECASE)
MIN_LANGUAGE_WORDS = 6
"""Words of a text whose language can be told."""


def detect_language(text: str) -> str:
    """Return the language of a text by its script or its common words; the empty string where that is not clear."""
    letters = [char for char in text if char.isalpha()]
    for language, script in _SCRIPTS.items():
        if letters and len(re.findall(f"[{script}]", text)) * 2 > len(letters):
            return language
    words = re.findall(r"[^\W\d_]+", text.lower())
    if len(words) < MIN_LANGUAGE_WORDS:
        return ""
    hits = {language: sum(word in common for word in words) for language, common in _COMMON_WORDS.items()}
    best, second = sorted(hits, key=lambda each: -hits[each])[:2]
    return best if hits[best] >= 2 and hits[best] >= 1.5 * hits[second] else ""


def _check_language(text: str, output: str) -> list[_Finding]:
    names = {match["name"].replace("Deutsch", "German"): match.span() for match in _LANGUAGE.finditer(text)}
    if len(names) != 1:
        return []
    [(name, span)] = names.items()
    found = detect_language(output)
    same_script = name in _SCRIPTS and found in _SCRIPTS and _SCRIPTS[name] in (_SCRIPTS[found], _SCRIPTS["Japanese"])
    if not found:
        return []
    return [_Finding(span, "" if found == name or same_script else f"in {name}: the result is in {found}.")]


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
