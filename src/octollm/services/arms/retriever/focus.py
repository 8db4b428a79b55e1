"""The sentences that speak most of what is asked: for a second look where the first answer is in doubt."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from octollm.contracts.operations import Passage
from octollm.contracts.words import stems

MAX_SENTENCES = 4
"""Sentences of a second look."""
_SENTENCE_END = re.compile(r"(?<=[.!?:])\s+(?=[A-Z0-9`\"'(*-])")
_STRUCTURED_LINE = re.compile(r"^\s*(?:[-*|#>]|\d+[.)]|```|E?\d+:)")


@dataclass(frozen=True, slots=True)
class Sentence:
    """A sentence, list item or table row; ``asked`` the question's words in it, ``weight`` their rarity added up."""

    passage: int
    text: str
    question_words: frozenset[str]
    weight: float


def rank_sentences(question: str, passages: Sequence[Passage]) -> list[Sentence]:
    """Return the sentences of the passages, those that speak most of the question first."""
    asked = stems(question)
    units = [
        (number, text, stems(text)) for number, passage in enumerate(passages) for text in split_sentences(passage.text)
    ]
    seen = Counter(word for _, _, held in units for word in held & asked)
    found = [
        Sentence(number, text, held & asked, sum(math.log(1 + len(units) / seen[word]) for word in held & asked))
        for number, text, held in units
    ]
    return sorted(found, key=lambda each: -each.weight)


def split_sentences(text: str) -> list[str]:
    """Split a passage into sentences; lines of lists, tables and headings stand for themselves."""
    units: list[str] = []
    held = ""
    for line in text.split("\n"):
        if not line.strip() or _STRUCTURED_LINE.match(line):
            units.append(held)
            held = line.strip()
        else:
            held = f"{held} {line.strip()}".strip()
    units.append(held)
    return [sentence for unit in units for sentence in _SENTENCE_END.split(unit) if sentence.strip()]


def narrow_passages(question: str, passages: Sequence[Passage]) -> list[Passage]:
    """Return passages cut down to the sentences that speak most of the question, in their order."""
    best = [each for each in rank_sentences(question, passages)[:MAX_SENTENCES] if each.question_words]
    cut: list[Passage] = []
    for number, passage in enumerate(passages):
        kept = [each.text for each in best if each.passage == number]
        if kept:
            ordered = [text for text in split_sentences(passage.text) if text in kept]
            text = "\n".join(ordered)
            cut.append(
                Passage(passage.source, passage.digest, passage.line_start, passage.line_end, text, passage.score)
            )
    return cut
