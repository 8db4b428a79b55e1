"""Words of a text: tokenizing, stop words, a light English stemmer, and numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator

_WORD = re.compile(r"\d+(?:[.,:/-]\d+)*|[^\W\d_](?:[^\W_]|(?<=\w)['’](?=\w))*", re.UNICODE)
_UNSPACED = re.compile(
    r"([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf"
    r"\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]+)"
)
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
STOP_WORDS = frozenset(_STOP_WORD_TEXT.split())
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
    """Return the words and numbers of ``text`` in lower case, in order.

    Scripts without spaces (Chinese, Japanese, Thai and their neighbours) and Korean are cut into overlapping pairs.
    """
    words = (match.group().lower().replace("’", "'") for match in _WORD.finditer(text))
    return [piece for word in words for piece in ((word,) if word.isascii() else _pairs(word))]


def _pairs(word: str) -> Iterator[str]:
    for run in _UNSPACED.split(word):
        if run and _UNSPACED.fullmatch(run):
            yield from (run[start : start + 2] for start in range(max(1, len(run) - 1)))
        elif run:
            yield run


def content_words(text: str) -> list[str]:
    """Return the distinct words of ``text`` in order, without stop words and single letters."""
    words = (
        word
        for word in tokenize(text)
        if word not in STOP_WORDS and (len(word) > 1 or word.isdigit() or not word.isascii())
    )
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
