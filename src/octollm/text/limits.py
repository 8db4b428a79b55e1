"""Limits of length that a goal or a criterion sets ("in three bullet points"), and the units that they count."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

LengthUnit = Literal["word", "sentence", "bullet", "item", "paragraph", "line", "character"]

_NUMBER_WORDS = """
one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
nineteen twenty
"""
_NUMBERS = {
    word: number
    for words in (
        _NUMBER_WORDS,
        "eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf",
        "un deux trois quatre cinq six sept huit neuf dix onze douze",
        "uno dos tres cuatro cinco seis siete ocho nueve diez once doce",
    )
    for number, word in enumerate(words.split(), start=1)
} | {"einem": 1, "einen": 1, "einer": 1, "ein": 1, "eine": 1, "une": 1, "una": 1}
_ARTICLES = frozenset({"a", "an", "ein", "eine", "einem", "einen", "einer", "un", "une", "una"})
_NUMBER = rf"(?:\d{{1,5}}|a single|an?|{'|'.join(sorted(_NUMBERS, key=len, reverse=True))})"
_ITEM = re.compile(r"^\s*(?:[-*+•]|\d+[.)])\s+\S", re.MULTILINE)
_BULLET = re.compile(r"^\s*[-*+•]\s+\S", re.MULTILINE)
_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s|$)|[。！？]")
_ABBREVIATION = re.compile(
    r"\b(?:e\.g|i\.e|etc|vs|Dr|Mr|Mrs|Ms|Prof|St|No|approx|z\.B|d\.h|bzw|usw)\.|\b[A-Z]\.(?=\s?[A-Z])"
    r"|\b\d{1,2}\.(?=\s+(?:Januar|Februar|März|April|Mai|Juni|Juli|August|September|Oktober|November|Dezember)\b)"
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


COUNTERS: dict[LengthUnit, Callable[[str], int]] = {
    "word": count_words,
    "sentence": count_sentences,
    "bullet": lambda text: len(_BULLET.findall(text)) or len(_ITEM.findall(text)),
    "item": lambda text: len(_ITEM.findall(text)),
    "paragraph": _count_paragraphs,
    "line": _count_lines,
    "character": lambda text: len(text.strip()),
}
_UNIT_WORDS: dict[LengthUnit, str] = {
    "word": r"words?|wort|wörtern?|worten?|mots?|palabras?",
    "sentence": r"sentences?|satz|sätzen?|phrases?|frases?|oraciones",
    "bullet": (
        r"bullet(?:ed)?[ -]?(?:points?|items?)|bullets?|stichpunkten?|aufzählungspunkten?|punkten?|"
        r"points|puntos"
    ),
    "item": r"(?:list )?items?|listenpunkten?",
    "paragraph": r"paragraphs?|absatz|absätzen?|paragraphes?|párrafos?",
    "line": r"lines?|zeilen?|lignes?|líneas?",
    "character": r"characters?|zeichen|caractères?|caracteres?",
}
_UNIT = "(?:" + "|".join(f"(?P<{name}>{words})" for name, words in _UNIT_WORDS.items()) + r")\b"
_ADJECTIVE = r"(?:(?:short|brief|clear|concise|full|simple|complete|plain|kurzen?|knappen?)[ -]+)?"
_MOST = (
    r"at most|no more than|not more than|up to|a maximum of|maximum|max\.?|within|no longer than|not exceed(?:ing)?|"
    r"höchstens|maximal|nicht mehr als|bis zu|au plus|como máximo"
)
_BELOW = "fewer than|less than|under|below|shorter than|weniger als"
_ABOVE = "more than|over|longer than|mehr als"
_ABOUT_WORDS = r"about|around|approximately|roughly|some|etwa|ungefähr|rund|ca\.|environ|unas?"
_EXACT = "exactly|just|only|in|with|has|have|as|of|genau|mit|als|aus|en"
_LEAST = "at least|no fewer than|no less than|a minimum of|minimum|mindestens|wenigstens|au moins|al menos"
LimitKind = Literal["between", "most", "below", "least", "above", "about", "exact"]
_PATTERNS: tuple[tuple[LimitKind, str], ...] = (
        ("between", rf"\b(?P<low>{_NUMBER})(?: ?(?:-|–|to|and|bis) ?)(?P<number>{_NUMBER}) {_ADJECTIVE}{_UNIT}"),
        ("most", rf"\b(?:{_MOST}) (?P<number>{_NUMBER}) {_ADJECTIVE}{_UNIT}"),
        ("most", rf"\b(?P<number>{_NUMBER}) {_ADJECTIVE}{_UNIT} (?:or less|or fewer|at most|maximum|max\b)"),
        ("below", rf"\b(?:{_BELOW}) (?P<number>{_NUMBER}) {_ADJECTIVE}{_UNIT}"),
        ("least", rf"\b(?:{_LEAST}) (?P<number>{_NUMBER}) {_ADJECTIVE}{_UNIT}"),
        ("least", rf"\b(?P<number>{_NUMBER}) {_ADJECTIVE}{_UNIT} or more"),
        ("above", rf"\b(?:{_ABOVE}) (?P<number>{_NUMBER}) {_ADJECTIVE}{_UNIT}"),
        ("about", rf"\b(?:{_ABOUT_WORDS}) (?P<number>{_NUMBER}) {_ADJECTIVE}{_UNIT}"),
        ("exact", rf"\b(?:{_EXACT}) (?P<number>{_NUMBER}) {_ADJECTIVE}{_UNIT}"),
        ("exact", rf"\b(?P<number>{_NUMBER}) (?:key|main|(?:most )?important|top|wichtigsten?|zentralen?) {_UNIT}"),
        ("exact", rf"^\W*(?P<number>{_NUMBER}) {_ADJECTIVE}{_UNIT}\W*$"),
)  # fmt: skip
_ABOUT = 0.25
"""How far a length may be from one that is only about so."""
_ROUND = 0.15
"""How far a number of words may be from "in 50 words"."""
_FOR_EACH = re.compile(r"\b(?:each|every|per|apiece|jedes?|jeder|jeweils|pro|chaque|cada)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class LengthLimit:
    """A limit: from ``low`` to ``high`` of ``unit``, as the text says between the characters of ``span``.

    ``target`` is the number that the text names. ``is_vague`` marks "in a sentence" and "three lines of …", where the
    number may be no limit.
    """

    unit: LengthUnit
    target: int
    low: float
    high: float
    span: tuple[int, int]
    is_vague: bool

    def holds(self, text: str) -> bool:
        """Return whether a text is as long as it has to be."""
        return self.low <= COUNTERS[self.unit](text) <= self.high


@functools.cache
def _compiled_patterns() -> tuple[tuple[LimitKind, re.Pattern[str]], ...]:
    """Return the patterns, compiled by the first call: every arm imports this module, and compiling takes 30 ms."""
    return tuple((kind, re.compile(pattern, re.IGNORECASE)) for kind, pattern in _PATTERNS)


def find_limits(text: str, *, for_each: bool = False) -> list[LengthLimit]:
    """Return the limits in a text, the clearest reading of each place.

    A demand "for each" item is not understood and gives none, unless ``for_each`` asks for those limits.
    """
    found: list[LengthLimit] = []
    if _FOR_EACH.search(text) and not for_each:
        return found
    for kind, pattern in _compiled_patterns():
        for match in pattern.finditer(text):
            if any(match.start() < each.span[1] and each.span[0] < match.end() for each in found):
                continue
            unit: LengthUnit = next(name for name in COUNTERS if match[name])
            number = _read_number(match["number"])
            low, high = _bounds(kind, _read_number(match["low"]) if kind == "between" else number, number, unit)
            is_vague = match["number"].lower() in _ARTICLES or text[match.end() :].startswith(" of")
            found.append(LengthLimit(unit, number, low, high, match.span(), is_vague))
    return found


def _read_number(text: str) -> int:
    return int(text) if text.isdigit() else _NUMBERS.get(text.lower(), 1)


def _bounds(kind: LimitKind, low: int, number: int, unit: LengthUnit) -> tuple[float, float]:
    most = float("inf")
    slack = _ABOUT if kind == "about" else _ROUND if kind == "exact" and unit == "word" and number >= 20 else 0.0
    return {
        "between": (low, number), "most": (0, number), "below": (0, number - 1), "least": (number, most),
        "above": (number + 1, most), "about": (number * (1 - slack), number * (1 + slack)),
        "exact": (number * (1 - slack), number * (1 + slack)),
    }[kind]  # fmt: skip


def find_exceeded(limits: Sequence[LengthLimit], text: str) -> list[LengthLimit]:
    """Return the limits that a text does not keep."""
    return [limit for limit in limits if not limit.holds(text)]
