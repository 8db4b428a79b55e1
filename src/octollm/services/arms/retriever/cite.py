"""Which lines of the passages carry an answer, by the words that they share with it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from octollm.contracts.operations import Passage
from octollm.contracts.task import Citation
from octollm.contracts.words import extract_numbers, extract_numbers_and_words, stems

MAX_CITATION_LINES = 3
"""Lines of one citation."""
MAX_CITATIONS = 2
_ANSWER_WEIGHT = 3
_QUESTION_WEIGHT = 1
_LINE_COST = 0.4
_NUMBER_PREFIX = "#"
_YES_NO = re.compile(r"\W*(?:yes|no)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class CitationSupport:
    """How far passages carry an answer.

    ``answered`` is the share of the answer's own words that the cited lines hold; ``asked`` the share of the
    question's words that the passages of the citations hold; ``numbers_missing`` the answer's numbers that the cited
    lines do not have; ``echo`` says that the answer has no word beyond the question's, and is no plain yes or no.
    """

    citations: tuple[Citation, ...]
    answer_coverage: float
    question_coverage: float
    missing_numbers: frozenset[str]
    is_echo: bool


def measure_support(question: str, answer: str, passages: Sequence[Passage]) -> CitationSupport:
    """Choose the few lines that share most with ``answer``, and measure how far they carry it."""
    asked = stems(question)
    said = _match_keys(answer)
    own = (said - asked) or said
    citations: list[Citation] = []
    missing, used = set(own), list[Passage]()
    for _ in range(MAX_CITATIONS):
        best = _best_window(missing, asked, passages)
        if best is None:
            break
        citation, passage = best
        citations.append(citation)
        used.append(passage)
        missing -= _match_keys(citation.text)
        if not missing or len(own) - len(missing) == 0:
            break
    held = stems("\n".join(passage.text + " " + passage.source for passage in used))
    cited = extract_numbers_and_words("\n".join(citation.text for citation in citations))
    return CitationSupport(
        citations=tuple(citations),
        answer_coverage=1 - len(missing) / len(own) if own else 0.0,
        question_coverage=len(asked & held) / len(asked) if asked else 1.0,
        missing_numbers=extract_numbers(answer) - cited - extract_numbers(question),
        is_echo=not (said - asked) and not _YES_NO.match(answer),
    )


def _match_keys(text: str) -> set[str]:
    return set(stems(text)) | {_NUMBER_PREFIX + number for number in extract_numbers(text)}


def _best_window(own: set[str], asked: frozenset[str], passages: Sequence[Passage]) -> tuple[Citation, Passage] | None:
    """Return the window of lines with most of the words that are still missing; few lines before many."""
    best: tuple[float, Citation, Passage] | None = None
    for rank, passage in enumerate(passages):
        lines = passage.text.split("\n")
        for start in range(len(lines)):
            for length in range(1, min(MAX_CITATION_LINES, len(lines) - start) + 1):
                text = "\n".join(lines[start : start + length])
                if not lines[start].strip() or not lines[start + length - 1].strip():
                    continue
                held = _match_keys(text)
                hits = len(own & held)
                if not hits:
                    continue
                score = _ANSWER_WEIGHT * hits + _QUESTION_WEIGHT * len(asked & held) - _LINE_COST * length - rank * 0.1
                if best is None or score > best[0]:
                    first = passage.line_start + start
                    last = min(first + length - 1, passage.line_end)
                    best = (score, Citation(passage.source, min(first, last), last, text), passage)
    return (best[1], best[2]) if best else None
