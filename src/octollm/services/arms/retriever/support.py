"""How far passages support an answer, and whether what they say is what was asked."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from octollm import Citation
from octollm.contracts.operations import Passage
from octollm.services.arms.fidelity import find_unsupported_figures
from octollm.text.lexical import content_words, extract_numbers, stem, stems
from octollm.text.question_terms import ContentTerm, TermIndex, content_terms, recognize_language

MAX_CITATION_LINES = 3
"""Lines of one citation."""
MAX_CITATIONS = 2
_ANSWER_WEIGHT = 3
_QUESTION_WEIGHT = 1
_LINE_COST = 0.4
_NUMBER_PREFIX = "#"
_CLAUSE = re.compile(r"[,;?]\s+(?:and|und|et|y)\s+|\?\s+", re.IGNORECASE)
_MIN_CLAUSE_WORDS = 2
_TITLE = re.compile(r"[^.!?:;\u3002\uff01\uff1f]{2,80}")
"""A line that may be the title of the lines below it."""
_HOW_LONG = re.compile(r"\bhow long\b", re.IGNORECASE)
_DURATION = re.compile(r"\b(?:seconds?|minutes?|hours?|days?|weeks?|months?|years?|decades?)\b", re.IGNORECASE)
"""Answers *how long*: the lines need not say *long*."""
_YES_NO = re.compile(r"\W*(?:yes|no)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class CitationSupport:
    """How far passages support an answer, and whether they speak of what is asked.

    ``answer_coverage`` is the share of the answer's own words in the cited lines. ``missing_numbers`` are the answer's
    numbers that the cited lines lack. ``is_echo`` marks an answer without a word beyond the question's that is not a
    plain yes or no.
    """

    citations: tuple[Citation, ...]
    answer_coverage: float
    missing_numbers: frozenset[str]
    is_echo: bool
    relevance: Relevance


@dataclass(frozen=True, slots=True)
class Relevance:
    """Whether the sentences that an answer stands in speak of what the question asks.

    ``coverage`` is the share of the question's content terms that they have, with their headings and the file's name;
    a term of a script without spaces is a pair or three of letters. ``missing`` are the words that they lack.
    ``passage_coverage`` is that of the whole passages cited. ``other_coverage`` is the highest of a sentence elsewhere
    that does not lead up to the answer. ``is_similar``: a passage cited was found by its meaning.
    """

    coverage: float = 1.0
    missing: tuple[str, ...] = ()
    passage_coverage: float = 1.0
    other_coverage: float = 0.0
    is_similar: bool = False


def measure_support(question: str, answer: str, passages: Sequence[Passage]) -> CitationSupport:
    """Choose the few lines that share most with ``answer``, and measure how far they support it."""
    question_keys = stems(question)
    answer_keys = _match_keys(answer)
    own_keys = (answer_keys - question_keys) or answer_keys
    citations: list[Citation] = []
    missing, used = set(own_keys), list[Passage]()
    for _ in range(MAX_CITATIONS):
        best = _best_window(missing, question_keys, passages)
        if best is None:
            break
        citation, passage = best
        citations.append(citation)
        used.append(passage)
        missing -= _match_keys(citation.text)
        if not missing or len(own_keys) - len(missing) == 0:
            break
    languages = find_languages(passages)
    cited_text = "\n".join(citation.text for citation in citations)
    cited_terms = TermIndex(cited_text, languages)
    # The stems above are English: a word in another inflection of its own language is not missing.
    missing -= {stem(word) for word in content_words(answer) if stem(word) in missing and cited_terms.has_word(word)}
    return CitationSupport(
        citations=tuple(citations),
        answer_coverage=1 - len(missing) / len(own_keys) if own_keys else 0.0,
        missing_numbers=frozenset(find_unsupported_figures(question, cited_text, answer)),
        is_echo=not (answer_keys - question_keys) and not _YES_NO.match(answer),
        relevance=_measure_relevance(question, answer, list(zip(citations, used, strict=True)), passages, languages),
    )


def find_languages(passages: Sequence[Passage]) -> tuple[str, ...]:
    """Return the languages (ISO 639-1) of the documents that passages are from."""
    texts: dict[str, list[str]] = {}
    for passage in passages:
        texts.setdefault(passage.source, []).append(passage.text)
    return tuple(dict.fromkeys(filter(None, (recognize_language("\n".join(each)) for each in texts.values()))))


def _measure_relevance(
    question: str,
    answer: str,
    cited: Sequence[tuple[Citation, Passage]],
    passages: Sequence[Passage],
    languages: Sequence[str],
) -> Relevance:
    """Return how far the cited sentences speak of the question; of two questions in one, of the better covered."""
    if not question.strip() or not cited:
        return Relevance()
    if _DURATION.search(answer):
        question = _HOW_LONG.sub(" ", question)
    asked = set(content_terms(question, languages))
    said = content_terms(answer, languages)
    own = [term for term in said if term not in asked] or said
    near, leading = list[str](), list[str]()
    for citation, passage in cited:
        sentences, before = _find_cited_sentences(citation, passage, own, languages)
        near += [passage.source, *_headings(citation, passage), *sentences]
        leading += before
    whole = [text for _, passage in cited for text in (passage.source, passage.text)]
    others = [
        sentence
        for passage in passages
        for sentence in split_sentences(passage.text)
        if sentence not in near and sentence not in leading
    ]
    parts = [part for part in _CLAUSE.split(question) if len(stems(part)) >= _MIN_CLAUSE_WORDS]
    measured: list[Relevance] = []
    for part in dict.fromkeys((question, *parts)):
        terms = content_terms(part, languages)
        share, missing = _cover(terms, near, languages)
        if share:
            # A sentence that goes on from the one before it shares its subject.
            share, missing = _cover(terms, [*near, *leading], languages)
        measured.append(
            Relevance(
                share,
                missing,
                _cover(terms, whole, languages)[0],
                max((_cover(terms, [other], languages)[0] for other in others), default=0.0),
                any("vectors" in passage.matched for _, passage in cited),
            )
        )
    return max(measured, key=lambda each: (each.coverage, each.passage_coverage))


def _cover(
    terms: Sequence[ContentTerm], texts: Sequence[str], languages: Sequence[str]
) -> tuple[float, tuple[str, ...]]:
    """Return the share of terms that texts have, and the words of the others."""
    index = TermIndex("\n".join(texts), languages)
    missing = [term for term in terms if not index.has(term)]
    share = 1 - len(missing) / len(terms) if terms else 1.0
    return share, tuple(dict.fromkeys(term.text for term in missing))


def _find_cited_sentences(
    citation: Citation, passage: Passage, own: Sequence[ContentTerm], languages: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Return the sentences of the cited lines that have most of the answer, and those that lead up to them."""
    lines = [line.strip() for line in citation.text.split("\n") if line.strip()]
    shown = (*lines, " ".join(lines))
    cited: list[tuple[float, str, str]] = []
    for unit in split_units(passage.text):
        before = ""
        for sentence in filter(str.strip, _SENTENCE_END.split(unit)):
            if any(sentence.strip() in line or line in sentence for line in shown):
                cited.append((_cover(own, [sentence], languages)[0], sentence, before))
            before = sentence
    most = max((share for share, _, _ in cited), default=0.0)
    if not most:
        return lines, []
    best = [(sentence, before) for share, sentence, before in cited if share == most]
    return [sentence for sentence, _ in best], [before for _, before in best if before]


def _headings(citation: Citation, passage: Passage) -> list[str]:
    """Return the headings above the cited lines within their passage."""
    above = passage.text.split("\n")[: max(0, citation.line_start - passage.line_start)]
    titles = [line for line in above[:1] if _TITLE.fullmatch(line)]
    return titles + [line for line in above if line.startswith("#") or line.rstrip().endswith((":", "\uff1a"))]


def _match_keys(text: str) -> set[str]:
    return set(stems(text)) | {_NUMBER_PREFIX + number for number in extract_numbers(text)}


def _best_window(
    own_keys: set[str], question_keys: frozenset[str], passages: Sequence[Passage]
) -> tuple[Citation, Passage] | None:
    """Return the window of lines with most of the words that are still missing; few lines before many."""
    best: tuple[float, Citation, Passage] | None = None
    for rank, passage in enumerate(passages):
        lines = passage.text.split("\n")
        for start in range(len(lines)):
            for length in range(1, min(MAX_CITATION_LINES, len(lines) - start) + 1):
                text = "\n".join(lines[start : start + length])
                if not lines[start].strip() or not lines[start + length - 1].strip():
                    continue
                window_keys = _match_keys(text)
                hits = len(own_keys & window_keys)
                if not hits:
                    continue
                score = (
                    _ANSWER_WEIGHT * hits
                    + _QUESTION_WEIGHT * len(question_keys & window_keys)
                    - _LINE_COST * length
                    - rank * 0.1
                )
                if best is None or score > best[0]:
                    first = passage.line_start + start
                    last = min(first + length - 1, passage.line_end)
                    best = (score, Citation(passage.source, min(first, last), last, text, passage.location), passage)
    return (best[1], best[2]) if best else None


MAX_SENTENCES = 4
"""Sentences of a second look."""
_GERMAN_MONTH = "(?:Januar|Februar|März|April|Mai|Juni|Juli|August|September|Oktober|November|Dezember)"
_SENTENCE_END = re.compile(
    # Before any letter but a small one of Latin, Greek or Cyrillic; and after the full stops of Chinese and Japanese.
    rf"(?<=[.!?:\u061f])\s+(?=(?:[^\W_a-zß-öø-ÿα-ωа-я]|[`\"'(*-]))(?!(?<=\d\.\s){_GERMAN_MONTH}\b)"
    r"|(?<=[\u3002\uff01\uff1f])\s*(?=\S)"
)
"""``2. April`` is no end of a sentence."""
_WITHOUT_FULL_STOP = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]$")
"""Thai and its neighbours have no mark at the end of a sentence, so the end of a line is one."""
_STRUCTURED_LINE = re.compile(r"^\s*(?:[-*|#>]|\d+[.)]|```|E?\d+:)")


@dataclass(frozen=True, slots=True)
class Sentence:
    """A sentence, list item or table row.

    ``question_words`` are the question's words in it, and ``weight`` is the sum of their rarity.
    """

    passage: int
    text: str
    question_words: frozenset[str]
    weight: float


def rank_sentences(question: str, passages: Sequence[Passage]) -> list[Sentence]:
    """Return the sentences of the passages, those that speak most of the question first."""
    question_keys = stems(question)
    units = [
        (number, text, stems(text)) for number, passage in enumerate(passages) for text in split_sentences(passage.text)
    ]
    seen = Counter(word for _, _, keys in units for word in keys & question_keys)
    sentences = [
        Sentence(
            number,
            text,
            keys & question_keys,
            sum(math.log(1 + len(units) / seen[word]) for word in keys & question_keys),
        )
        for number, text, keys in units
    ]
    return sorted(sentences, key=lambda each: -each.weight)


def split_units(text: str) -> list[str]:
    """Split a passage into paragraphs; lines of lists, tables and headings stand for themselves."""
    units: list[str] = []
    paragraph = ""
    for line in text.split("\n"):
        if not line.strip() or _STRUCTURED_LINE.match(line) or _WITHOUT_FULL_STOP.search(paragraph):
            units.append(paragraph)
            paragraph = line.strip()
        else:
            paragraph = f"{paragraph} {line.strip()}".strip()
    units.append(paragraph)
    return units


def split_sentences(text: str) -> list[str]:
    """Split a passage into sentences; lines of lists, tables and headings stand for themselves."""
    return [sentence for unit in split_units(text) for sentence in _SENTENCE_END.split(unit) if sentence.strip()]


def narrow_passages(question: str, passages: Sequence[Passage]) -> list[Passage]:
    """Return passages cut down to the sentences that speak most of the question, in their order."""
    best = [each for each in rank_sentences(question, passages)[:MAX_SENTENCES] if each.question_words]
    cut: list[Passage] = []
    for number, passage in enumerate(passages):
        chosen = [each.text for each in best if each.passage == number]
        if chosen:
            ordered = [text for text in split_sentences(passage.text) if text in chosen]
            text = "\n".join(ordered)
            cut.append(msgspec.structs.replace(passage, text=text))
    return cut
