"""Sentences with their sources: the model writes them, and code finds the lines that support each, or drops it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import msgspec

from octollm import Citation, Message
from octollm.contracts.operations import Passage
from octollm.services.arms.completion import PromptFunction
from octollm.services.arms.fidelity import (
    contradicts,
    find_changed_figures,
    find_figures,
    find_identifiers,
    find_missing,
    find_names,
)
from octollm.services.arms.retriever.chunks import DATA_RULE, SourceText, show_document
from octollm.services.arms.retriever.support import measure_support, split_sentences
from octollm.text.language import detect_language, is_same_language
from octollm.text.lexical import stems, tokenize
from octollm.text.limits import count_words

MIN_SENTENCE_SUPPORT = 0.6
"""Share of a sentence's words that the cited lines must have."""
MAX_SENTENCE_CHARS = 300
_MIN_SENTENCE_WORDS = 3
_MIN_SENTENCE_CHARS = 8
_MAX_SIMILARITY = 0.6
"""Jaccard index of two sentences that say the same."""
_TOKENS_PER_SENTENCE = 60
_BULLET = re.compile(r"^\s*(?:[-*+•]|\(?\d{1,3}[.)])\s+")


@dataclass(frozen=True, slots=True)
class CitedSentence:
    """A sentence and the lines that it stands on. ``is_quoted`` marks one that is the document's own."""

    text: str
    citations: tuple[Citation, ...]
    is_quoted: bool = False

    def render(self) -> str:
        """Return the sentence, followed by its citations."""
        return f"{self.text} {' '.join(dict.fromkeys(citation.reference for citation in self.citations))}"


class _Sentences(msgspec.Struct, frozen=True):
    sentences: tuple[str, ...]


def sentence_tokens(number: int) -> int:
    """Return the limit of tokens of an answer with so many sentences."""
    return _TOKENS_PER_SENTENCE * number + 40


async def write_sentences(
    ask: PromptFunction, name: str, text: str, instruction: str, number: int, *, max_words: int = 0
) -> list[str]:
    """Return at most ``number`` sentences that the model writes about a text; none if its answer does not parse."""
    chars = min(MAX_SENTENCE_CHARS, 8 * max_words) if max_words else MAX_SENTENCE_CHARS
    schema: dict[str, object] = {
        "type": "object",
        "properties": {
            "sentences": {
                "type": "array",
                "minItems": 1,
                "maxItems": number,
                "items": {"type": "string", "minLength": 8, "maxLength": max(40, chars)},
            }
        },
        "required": ["sentences"],
        "additionalProperties": False,
    }
    answer = await ask(
        [Message.system(DATA_RULE + instruction), Message.user(f"{show_document(name, text)}\n\n{instruction}")],
        max_tokens=sentence_tokens(number),
        schema=schema,
    )
    try:
        written = msgspec.json.decode(answer.encode("utf-8", "surrogatepass"), type=_Sentences).sentences
    except msgspec.DecodeError:
        return []
    return [each for each in map(clean_sentence, written[:number]) if each]


def clean_sentence(text: str) -> str:
    """Return a sentence in one line, without a bullet, with a full stop."""
    plain = " ".join(_BULLET.sub("", text).split())
    # What looks like a reference would be taken for one of ours.
    plain = re.sub(r"\s*\[[^\]]*\]", "", plain)
    if plain and plain[-1].isalnum():
        plain += "。" if not plain[-1].isascii() and not plain[-1].isalpha() else "."
    return plain


def find_support(
    sentence: str, passages: Sequence[Passage], sources: Sequence[SourceText]
) -> tuple[tuple[Citation, ...], str]:
    """Return the lines that support a sentence, and why they do not; empty if they do."""
    held = measure_support("", sentence, passages)
    by_name = {source.name: source for source in sources}
    citations = tuple(
        by_name[each.file].cite(each.line_start, each.line_end, each.text) if each.file in by_name else each
        for each in held.citations
    )
    cited = "\n".join(citation.text for citation in citations)
    if not citations or held.answer_coverage < MIN_SENTENCE_SUPPORT:
        return citations, "the lines do not say it"
    _, added = find_changed_figures(cited, sentence)
    if added:
        return citations, f"the lines do not have {', '.join(added)}"
    if find_missing(find_identifiers(sentence), cited):
        return citations, "the lines do not have a name in it"
    if contradicts(sentence, cited):
        return citations, "the lines say the opposite"
    return citations, ""


def _is_sentence(text: str) -> bool:
    """Return whether a text has several words, or in a script without spaces several characters."""
    return count_words(text) >= _MIN_SENTENCE_WORDS or (len(text) >= _MIN_SENTENCE_CHARS and not text.isascii())


def cite_sentences(
    written: Sequence[str], passages: Sequence[Passage], sources: Sequence[SourceText]
) -> list[CitedSentence]:
    """Return the sentences that the passages support, each with its lines; the others are dropped."""
    kept: list[CitedSentence] = []
    for sentence in written:
        citations, fault = find_support(sentence, passages, sources)
        if not fault and _is_sentence(sentence):
            kept.append(CitedSentence(sentence, citations))
    return kept


def quote_sentences(source: SourceText, passages: Sequence[Passage]) -> list[CitedSentence]:
    """Return the document's own sentences in passages, with their lines: what a summary falls back on."""
    quoted: list[CitedSentence] = []
    for passage in passages:
        for sentence in split_sentences(passage.text):
            text = clean_sentence(sentence.lstrip("#>| "))
            if not _is_sentence(text) or len(text) > 2 * MAX_SENTENCE_CHARS:
                continue
            if sentence.lstrip().startswith("#") or (sentence.count("|") > 1):
                continue
            citations, fault = find_support(text, [passage], [source])
            if not fault:
                quoted.append(CitedSentence(text, citations[:1], is_quoted=True))
    return quoted


def rank_by_centrality(
    sentences: Sequence[CitedSentence], text: str, focus: Collection[str], number: int
) -> list[CitedSentence]:
    """Return the ``number`` sentences that speak most of a text, without two that say the same, best first.

    Maximal marginal relevance: the weight of a sentence's words in the text and in ``focus``, less what earlier
    sentences say already, and less for lines that one of them cites.
    """
    counts = Counter(word for line in text.split("\n") for word in stems(line))
    keys = [stems(sentence.text) for sentence in sentences]

    def weight(words: frozenset[str]) -> float:
        own = sum(math.log(1 + counts[word]) for word in words) / math.sqrt(len(words) or 1)
        return own * (1 + 2 * len(words & set(focus)))

    left = list(range(len(sentences)))
    chosen: list[int] = []
    while left and len(chosen) < number:
        used = Counter(sentences[at].citations[0] for at in chosen)
        best = max(
            left,
            key=lambda at: (
                weight(keys[at]) * (1 - _overlap(keys, at, chosen)) / (1 + used[sentences[at].citations[0]]),
                -at,
            ),
        )
        left.remove(best)
        if not any(_repeats(sentences, keys, best, other) for other in chosen):
            chosen.append(best)
    return [sentences[at] for at in chosen]


def _repeats(sentences: Sequence[CitedSentence], keys: Sequence[frozenset[str]], one: int, other: int) -> bool:
    """Return whether a sentence says what another one does: with the same words, and no number of its own."""
    similar = _overlap(keys, one, [other]) >= _MAX_SIMILARITY
    return similar and find_figures(sentences[one].text) <= find_figures(sentences[other].text)


def _overlap(keys: Sequence[frozenset[str]], one: int, others: Sequence[int]) -> float:
    """Return how much of a sentence its most similar one of ``others`` says, as the Jaccard index."""
    return max((len(keys[one] & keys[at]) / (len(keys[one] | keys[at]) or 1) for at in others), default=0.0)


_BROKEN_NUMBER = re.compile(r"\b\d{1,3}(?:,\d{3})+,\d{1,2}\b|\b\d{1,3}(?:\.\d{3})+\.\d{1,2}\b")
"""Thousands and decimals with one mark, as in ``34,300,00``: only one of the two was changed."""
MAX_KEPT_WORDS = 0.5
"""Share of the words of a translation that may be those of its source: related languages share some."""
MIN_TRANSLATED_RATIO, MAX_TRANSLATED_RATIO = 0.3, 3.5
"""How long a translation may be, as a share of its source."""


def _share_kept(source: str, translated: str) -> float:
    """Return the share of a translation's longer words that its source has, without names and identifiers."""
    known = {word for word in tokenize(source) if word.isalpha()}
    names = {word for name in (*find_names(source), *find_identifiers(source)) for word in tokenize(name)}
    own = [word for word in tokenize(translated) if len(word) > 3 and word.isalpha() and word not in names]
    return sum(word in known for word in own) / len(own) if len(own) > 3 else 0.0


def find_translation_fault(source: str, translated: str, language: str) -> str:
    """Return why a text cannot be the translation of its source, as far as code can tell; empty if it can."""
    if not translated.strip():
        return "nothing was written"
    ratio = len(translated) / max(1, len(source))
    if len(source) > 40 and not MIN_TRANSLATED_RATIO / 2 <= ratio <= MAX_TRANSLATED_RATIO:
        return "its length does not fit"
    missing, added = find_changed_figures(source, translated)
    if missing:
        return f"it lacks {', '.join(missing[:5])}"
    if added:
        return f"it adds {', '.join(added[:5])}"
    if lost := find_missing(find_identifiers(source), translated):
        return f"it lacks {', '.join(lost[:3])}"
    if strange := find_missing(find_identifiers(translated), source):
        return f"it adds {', '.join(strange[:3])}"
    if broken := [each for each in _BROKEN_NUMBER.findall(translated) if each not in source]:
        return f"{broken[0]} is no number"
    found = detect_language(translated)
    if found and language and not is_same_language(found, language):
        return f"it is in {found}"
    if _share_kept(source, translated) > MAX_KEPT_WORDS:
        return "it is half in the language of the source"
    if len(tokenize(source)) > 1 and translated.strip(" ,.").casefold() == source.strip(" ,.").casefold():
        return "it is the same text"
    return ""
