"""What a question asks about: its words in its language without those that say nothing, and whether lines have them."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import stopwordsiso
from py3langid.langid import MODEL_FILE, LanguageIdentifier

from octollm.text.index_terms import STEMMED_LANGUAGES, QueryTerm, index_terms, query_terms
from octollm.text.lexical import STOP_WORDS

_SAMPLE_CHARS = 4000
_OTHER_LANGUAGES = frozenset(
    ["bg", "bn", "he", "hr", "ja", "km", "ko", "lo", "mk", "ms", "sk", "sl", "th", "uk", "ur", "vi", "zh"]
)
_LANGUAGES = STEMMED_LANGUAGES.union(_OTHER_LANGUAGES)
"""Recognized languages: among fewer the choice is surer, above all between neighbours and dialects."""


def recognize_language(text: str) -> str:
    """Return the language of a text (ISO 639-1) by its beginning; empty for one without words."""
    sample = text[:_SAMPLE_CHARS]
    if not any(character.isalpha() for character in sample):
        return ""
    language, _ = _identifier().classify(sample)
    return language if language in _LANGUAGES else ""


class _Identifier(Protocol):
    labels: list[str]

    def set_languages(self, langs: list[str], /) -> None: ...
    def classify(self, text: str, /) -> tuple[str, float]: ...


@functools.cache
def _identifier() -> _Identifier:
    # Read once, at the first text: half a second of one core.
    identifier = cast("_Identifier", LanguageIdentifier.from_model_file(MODEL_FILE))  # pyright: ignore[reportUnknownMemberType]
    identifier.set_languages(sorted(_LANGUAGES.intersection(identifier.labels)))
    return identifier


_QUESTION_WORDS = {
    "cs": "jaký jaká jaké kolik stojí",
    "da": "koster",
    "de": "beträgt gilt kostet lautet heißt",
    "el": "πόσο πόσα πόσες πού πότε ποια",
    "es": "cuesta cuestan dura",
    "fr": "coûte coûtent dure combien",
    "he": "כמה",
    "it": "costa costano dura",
    "nl": "hoeveel hoelang kost kosten heet bedraagt",
    "no": "koster",
    "pl": "jaka jakie wynosi kosztuje ile",
    "pt": "quantos quantas custa custam dura",
    "ru": "составляет стоит сколько",
    "sv": "kostar",
    "tr": "kaç kadar",
    "uk": "скільки хто коштує",
    "vi": "bao nhiêu",
}
"""Words of questions that the lists of stop words lack: how many, how much, costs, amounts to."""
_UNSPACED_FUNCTION_WORDS = {
    "zh": "多长时间|多少|多长|多久|多大|多|为什么|什么样|什么|甚么|怎么样|怎么|怎样|为何|如何|何时|哪里|哪儿|哪个|哪些|"
    "哪|几点|几|谁|请问|需要|可以|应该|应当|必须|是|的|了|吗|呢|吧|在|有|和|与|要|去|能|会|到|从",
    "ja": "[\u3040-\u309f]+|何|誰|幾",
    "ko": "얼마나|얼마|무엇|무슨|누구|누가|어디|어느|언제|며칠|어떤|몇|입니까|습니까|합니까|됩니까|인가요|나요|까요|"
    r"하는|하면|[는은을를의에]\b|에서\b|으로\b",
    "th": "เท่าไหร่|เท่าไร|เท่าใด|อะไร|ที่ไหน|แค่ไหน|เมื่อไร|เมื่อไหร่|อย่างไร|ใคร|ไหน|กี่|คือ|ต้อง|สามารถ|"
    "ของ|ที่|และ|หรือ|เป็น|ได้|ใน|จะ|มี|ให้",
}
"""Of scripts without spaces; a list of words would cut through others. Hiragana writes mostly grammar."""


@functools.lru_cache(maxsize=64)
def _stop_words(language: str) -> frozenset[str]:
    if language == "en":
        return STOP_WORDS
    words: set[str] = stopwordsiso.stopwords(language) if stopwordsiso.has_lang(language) else set()
    return frozenset(_fold(word) for word in (*words, *_QUESTION_WORDS.get(language, "").split()))


def _fold(word: str) -> str:
    """Fold as the index does."""
    return query_terms(word)[0].forms[0] if query_terms(word) else word


@dataclass(frozen=True, slots=True)
class ContentTerm:
    """A word of a question that says what is asked, or a piece of one in a script without spaces."""

    text: str
    term: QueryTerm


def content_terms(question: str, languages: Sequence[str]) -> list[ContentTerm]:
    """Return the distinct content terms of a question in order; all of its terms if it has no others.

    ``languages`` (ISO 639-1) are those of the texts that may answer it; its own is recognized besides.
    """
    known = tuple(dict.fromkeys((*languages, recognize_language(question), "en")))
    plain = unicodedata.normalize("NFKC", question)
    for language in known:
        if function_words := _UNSPACED_FUNCTION_WORDS.get(language):
            plain = re.sub(function_words, " ", plain)
    stops = frozenset[str]().union(*(_stop_words(language) for language in known))
    every = query_terms(plain, known) or query_terms(question, known)
    terms = [term for term in every if term.forms[0] not in stops]
    return [ContentTerm(term.forms[0], term) for term in terms or every]


class TermIndex:
    """The terms of lines in their languages, to be looked up."""

    def __init__(self, text: str, languages: Sequence[str]) -> None:
        """``languages`` (ISO 639-1) are those of the texts that the lines are from: a line alone does not show it."""
        self._languages = languages or ("",)
        self._bag: Mapping[str, int] = Counter(
            term for language in self._languages for term in index_terms(text, language)
        )

    def has(self, term: ContentTerm) -> bool:
        """Return whether the lines have a term: inflected, or as a part of a compound, too."""
        return term.term.count(self._bag) > 0

    def has_word(self, word: str) -> bool:
        """Return whether the lines have all terms of a word."""
        terms = query_terms(word, self._languages)
        return bool(terms) and all(term.count(self._bag) > 0 for term in terms)
