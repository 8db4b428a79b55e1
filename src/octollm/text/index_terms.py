"""Full text in any language: the terms of a passage and of a query, and ranking by BM25.

Scripts with spaces are cut into words, each with its stem in the language of its document. Chinese, Japanese, Korean
and the scripts of South-East Asia are cut into overlapping n-grams, as Lucene's CJK analyzer does. The long words of
German and its relatives get n-grams besides, so that a compound is found by its parts.
"""

from __future__ import annotations

import functools
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import snowballstemmer

from octollm.text.lexical import STOP_WORDS

TERMS_VERSION = 1
"""Rises when the terms of a text change: passages with terms of an older version are indexed again."""
MAX_TERM_CHARS = 40
MAX_QUERY_TERMS = 128
"""Terms of a query that are looked at; the rarest of them decide."""
_COMPOUND_CHARS = 10
"""From this length on, a word of the Latin script may be a compound."""
_PART_CHARS = 5
"""Letters of the n-grams of a compound, and the shortest part that finds one."""
_PART_MARK = "_"

# Ranges of https://www.unicode.org/Public/UCD/latest/ucd/Scripts.txt.
_CJK = (
    r"\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
)
_SOUTH_EAST_ASIAN = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
_INDIC = r"\u0900-\u0dff"
_RUN = re.compile(
    rf"([{_CJK}]+)|([{_SOUTH_EAST_ASIAN}]+)|(\d+)|((?:[^\W\d_{_CJK}{_SOUTH_EAST_ASIAN}]|[{_INDIC}])[\w{_INDIC}]*)"
)
_WITHIN_WORD = re.compile(rf"[{_CJK}]|[{_SOUTH_EAST_ASIAN}]")
_MARKS = re.compile(r"[\u0300-\u036f\u0591-\u05c7\u0610-\u061a\u0640\u064b-\u065f\u0670\u06d6-\u06ed]")
"""Accents, and the vowel signs of Hebrew and Arabic, which most texts leave out."""
_ARABIC_LETTERS = str.maketrans({"ة": "ه", "ى": "ي", "ک": "ك", "ی": "ي"})
_LATIN = re.compile(r"[a-z]+")
_STEMMERS = {
    "ar": "arabic", "ca": "catalan", "cs": "czech", "da": "danish", "de": "german", "el": "greek", "en": "english",
    "es": "spanish", "et": "estonian", "eu": "basque", "fa": "persian", "fi": "finnish", "fr": "french",
    "ga": "irish", "hi": "hindi", "hu": "hungarian", "hy": "armenian", "id": "indonesian", "it": "italian",
    "lt": "lithuanian", "ne": "nepali", "nl": "dutch", "no": "norwegian", "pl": "polish", "pt": "portuguese",
    "ro": "romanian", "ru": "russian", "sr": "serbian", "sv": "swedish", "ta": "tamil", "tr": "turkish",
}  # fmt: skip
STEMMED_LANGUAGES = frozenset(_STEMMERS)
"""The languages (ISO 639-1) whose inflected words have a stem in common."""


def index_terms(text: str, language: str = "") -> list[str]:
    """Return the terms of a passage in order: words with their stems, and n-grams. None has a blank in it.

    ``language`` is that of the document (ISO 639-1); any other gives no stems.
    """
    terms: list[str] = []
    for run, size in _runs(text):
        if size:
            # The ends, too: a shorter query finds each gram that begins with it.
            terms += (run[start : start + size] for start in range(len(run)))
            continue
        terms.append(run)
        stem = _stem(run, language)
        if stem != run:
            terms.append(stem)
        if len(run) >= _COMPOUND_CHARS and _LATIN.fullmatch(run):
            terms += _parts(run)
    return terms


@dataclass(frozen=True, slots=True)
class QueryTerm:
    """A term of a query: it matches a passage with any of ``forms``, or with all of ``parts``, in a compound.

    With ``is_prefix`` it matches every term that begins with its one form.
    """

    forms: tuple[str, ...]
    parts: tuple[str, ...] = ()
    is_prefix: bool = False

    def count(self, bag: Mapping[str, int]) -> float:
        """Return how often it occurs among the terms of a passage; in a compound it counts half."""
        if self.is_prefix:
            return sum(count for term, count in bag.items() if term.startswith(self.forms[0]))
        whole = max(bag.get(form, 0) for form in self.forms)
        if whole or not self.parts:
            return whole
        return min(bag.get(part, 0) for part in self.parts) / 2


def query_terms(query: str, languages: Sequence[str] = ()) -> list[QueryTerm]:
    """Return the distinct terms of a query, in order, at most :data:`MAX_QUERY_TERMS`.

    ``languages`` are those of the documents: a question has the inflections of its own language, which is unknown.
    English words that say nothing are left out, unless there are no others.
    """
    terms: dict[QueryTerm, bool] = {}
    for run, size in _runs(query):
        for term in _ngram_terms(run, size) if size else (_word_term(run, languages),):
            terms[term] = run in STOP_WORDS
        if len(terms) > MAX_QUERY_TERMS:
            break
    chosen = [term for term, says_nothing in terms.items() if not says_nothing] or list(terms)
    return chosen[:MAX_QUERY_TERMS]


def _ngram_terms(run: str, size: int) -> Iterator[QueryTerm]:
    if len(run) < size:
        yield QueryTerm((run,), is_prefix=True)
    for start in range(len(run) - size + 1):
        yield QueryTerm((run[start : start + size],))


def _word_term(word: str, languages: Sequence[str]) -> QueryTerm:
    forms = tuple(dict.fromkeys((word, *(_stem(word, language) for language in languages))))
    # Without its ending, since that may be another within a compound.
    part = min((form for form in forms if word.startswith(form) and len(form) >= _PART_CHARS), key=len, default="")
    return QueryTerm(forms, tuple(_parts(part)) if _LATIN.fullmatch(part) else ())


def _parts(word: str) -> Iterator[str]:
    for start in range(len(word) - _PART_CHARS + 1):
        yield _PART_MARK + word[start : start + _PART_CHARS]


def _runs(text: str) -> Iterator[tuple[str, int]]:
    """Yield the words, with size 0, and the runs to be cut into n-grams, with the size of these."""
    # Compatibility forms are one: full-width letters, half-width katakana, ligatures, Arabic presentation forms.
    folded = _MARKS.sub("", unicodedata.normalize("NFKC", text).casefold())
    for match in _RUN.finditer(folded):
        cjk, south_east_asian, digits, word = match.groups()
        if cjk:
            yield cjk, 2
        elif south_east_asian:
            # A letter there says less than an ideograph.
            yield south_east_asian, 3
        elif digits:
            yield digits[:MAX_TERM_CHARS], 0
        else:
            # A word ends where a script without spaces begins.
            for piece in _WITHIN_WORD.split(word):
                plain = _MARKS.sub("", unicodedata.normalize("NFD", piece)).translate(_ARABIC_LETTERS).replace("_", "")
                if plain:
                    yield unicodedata.normalize("NFC", plain)[:MAX_TERM_CHARS], 0


class _Stemmer(Protocol):
    def stemWord(self, word: str, /) -> str: ...  # noqa: N802 - the library's name


@functools.lru_cache(maxsize=65_536)
def _stem(word: str, language: str) -> str:
    algorithm = _STEMMERS.get(language)
    if algorithm is None or word.isdigit():
        return word
    # A stemmer has a state, so threads share none; making one is cheap beside its work.
    stemmer = cast("_Stemmer", snowballstemmer.stemmer(algorithm))  # pyright: ignore[reportUnknownMemberType]
    return stemmer.stemWord(word) or word


# The usual constants: saturation of a term's frequency, and the weight of a text's length.
BM25_K1, BM25_B = 1.2, 0.75


def inverse_document_frequency(matching: int, total: int) -> float:
    """Return the weight of a term that ``matching`` of ``total`` passages have, in Lucene's form: never negative."""
    matching = min(matching, total)
    return math.log(1 + (total - matching + 0.5) / (matching + 0.5))


@dataclass(frozen=True, slots=True)
class LexicalMatch:
    """How a passage matches a query: its BM25 score, and the sum of the weights of the terms that it has."""

    score: float
    matched_weight: float


def match_bm25(
    terms: Sequence[QueryTerm], weights: Sequence[float], passages: Sequence[Sequence[str]]
) -> list[LexicalMatch]:
    """Return how each passage, given by its terms, matches; a higher score is better, 0 without a common term.

    ``weights`` are the inverse document frequencies of ``terms``. See Robertson and Zaragoza, "The Probabilistic
    Relevance Framework: BM25 and Beyond" (2009).
    """
    lengths = [len(passage) for passage in passages]
    mean = sum(lengths) / len(lengths) if any(lengths) else 1.0
    matches: list[LexicalMatch] = []
    for passage, length in zip(passages, lengths, strict=True):
        bag = Counter(passage)
        norm = BM25_K1 * (1 - BM25_B + BM25_B * length / mean)
        score = matched = 0.0
        for term, weight in zip(terms, weights, strict=True):
            count = term.count(bag)
            if count:
                score += weight * count * (BM25_K1 + 1) / (count + norm)
                matched += weight * min(1.0, count)
        matches.append(LexicalMatch(score, matched))
    return matches


RRF_K = 60
"""The constant of Cormack, Clarke and Büttcher, "Reciprocal Rank Fusion" (2009)."""


def fuse_rankings(*rankings: Sequence[tuple[int, float]]) -> dict[int, float]:
    """Return the weighted reciprocal rank fusion of rankings: the score of each id.

    A ranking is a list of ids, best first, each with the weight that its rank has.
    """
    scores: dict[int, float] = {}
    for ranking in rankings:
        for rank, (each, weight) in enumerate(ranking, start=1):
            scores[each] = scores.get(each, 0.0) + weight / (RRF_K + rank)
    return scores


def word_weight(coverage: float) -> float:
    """Return the weight of a rank by words beside one by vectors, which is 1.

    ``coverage`` is the share of the query's weight that a passage has. A passage with all the words, such as an order
    number, comes before any that is only similar; a few common words of a long question say little.
    """
    return 2.0 * coverage * coverage
