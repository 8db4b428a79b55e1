"""Lexical search: tokenizing, stop words, a light English stemmer, numbers in text, and BM25 ranking."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

_WORD = re.compile(r"\d+(?:[.,:/-]\d+)*|[^\W\d_](?:[^\W_]|(?<=\w)['’](?=\w))*", re.UNICODE)
_STOP_WORD_TEXT = """
a about above after again all also am an and any are as at be because been before being below between both
but by can could did do does doing don't done down during each either else ever every few for from further
get gets give given gives go goes got had has have having he her here hers him his how i if in into is isn't it
its itself just know let let's like make makes many may me might mine more most much must my no nor not of off
on once one only or other our ours out over own please same say says shall she should so some such tell than
that the their them then there these they thing things this those through to too under until up us use used uses
using very was we were what what's when where whether which while who whom whose why will with within would
you your yours document documents passage passages mean means mention mentioned mentions according stated
described describe describes explain
"""
_STOP_WORDS = frozenset(_STOP_WORD_TEXT.split())
_NUMBER_WORDS = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
)
_SUFFIXES = (
    ("iness", "y"), ("ies", "y"), ("ied", "y"), ("ily", "y"), ("ations", "ate"), ("ation", "ate"),
    ("ings", ""), ("ing", ""),
    ("edly", ""), ("ed", ""), ("ly", ""), ("ments", ""), ("ment", ""), ("sses", "ss"), ("es", ""), ("s", ""),
)  # fmt: skip


def tokenize(text: str) -> list[str]:
    """Return the words and numbers of ``text`` in lower case, in order."""
    return [match.group().lower().replace("’", "'") for match in _WORD.finditer(text)]


def content_words(text: str) -> list[str]:
    """Return the distinct words of ``text`` in order, without stop words and single letters."""
    words = (word for word in tokenize(text) if word not in _STOP_WORDS and (len(word) > 1 or word.isdigit()))
    return list(dict.fromkeys(words))


def stem(word: str) -> str:
    """Return the stem that the inflected forms of an English word share; numbers and short words are unchanged."""
    if len(word) <= 3 or word[0].isdigit():
        return word
    word = word.removesuffix("'s")
    for suffix, replacement in _SUFFIXES:
        if word.endswith(suffix) and len(word) - len(suffix) + len(replacement) >= 3:
            word = word[: -len(suffix)] + replacement
            break
    if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "aeiouls":
        word = word[:-1]
    return word.removesuffix("e") if len(word) > 3 else word


def stems(text: str) -> frozenset[str]:
    """Return the stems of the content words of ``text``."""
    return frozenset(stem(word) for word in content_words(text))


def extract_numbers(text: str) -> frozenset[str]:
    """Return the numbers of ``text`` as written, without thousands separators (``1,200`` is ``1200``)."""
    numbers = (word for word in tokenize(text) if word[0].isdigit())
    return frozenset(re.sub(r",(?=\d{3}(?:\D|$))", "", number) for number in numbers)


def extract_numbers_and_words(text: str) -> frozenset[str]:
    """Return the numbers of ``text`` in digits, including those in words (``four``) up to twelve."""
    spelled = (str(_NUMBER_WORDS.index(word)) for word in tokenize(text) if word in _NUMBER_WORDS)
    return extract_numbers(text) | frozenset(spelled)


# The usual constants: saturation of a term's frequency, and the weight of a text's length.
BM25_K1, BM25_B = 1.2, 0.75


def bm25(terms: Sequence[str], texts: Sequence[str], *, total: int) -> list[float]:
    """Return the BM25 score of each of ``texts`` for ``terms``; higher is better, never negative.

    ``texts`` are all passages of a collection that contain any of the terms; ``total`` is the collection's size. See
    Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond" (2009).
    """
    # Not SQLite's own BM25: that counts the passages of all tenants, which would reveal something about the others'
    # texts, and it gives no weight to a term that half of a few passages contain.
    query = list(dict.fromkeys(stem(term) for term in terms))
    counters = [Counter(stem(word) for word in tokenize(text)) for text in texts]
    lengths = [counter.total() for counter in counters]
    mean = sum(lengths) / len(lengths) if any(lengths) else 1.0
    weights = {term: _idf(sum(term in counter for counter in counters), max(total, len(texts))) for term in query}
    return [
        sum(weights[term] * _saturated(counter[term], length / mean) for term in query if term in counter)
        for counter, length in zip(counters, lengths, strict=True)
    ]


def _idf(matching: int, total: int) -> float:
    """Return the inverse document frequency in Lucene's form, which is never negative."""
    return math.log(1 + (total - matching + 0.5) / (matching + 0.5))


def _saturated(count: int, relative_length: float) -> float:
    return count * (BM25_K1 + 1) / (count + BM25_K1 * (1 - BM25_B + BM25_B * relative_length))
