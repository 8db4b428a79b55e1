"""Answers a question from passages (grounded generation).

The model writes a sentence, code attaches the lines that support it, and an answer without support is withheld.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import msgspec

from octollm import Check, Citation, Evidence, ExecuteResult, Message
from octollm.contracts.operations import Passage
from octollm.services.arms.completion import PromptFunction
from octollm.text.lexical import extract_numbers, extract_numbers_and_words, stems

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
    """How far passages support an answer.

    ``answer_coverage`` is the share of the answer's own words in the cited lines, ``question_coverage`` the share of
    the question's words in the cited passages. ``missing_numbers`` are the answer's numbers that the cited lines lack.
    ``is_echo`` marks an answer without a word beyond the question's that is not a plain yes or no.
    """

    citations: tuple[Citation, ...]
    answer_coverage: float
    question_coverage: float
    missing_numbers: frozenset[str]
    is_echo: bool


def measure_support(question: str, answer: str, passages: Sequence[Passage]) -> CitationSupport:
    """Choose the few lines that share most with ``answer``, and measure how far they carry it."""
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
    passage_keys = stems("\n".join(passage.text + " " + passage.source for passage in used))
    cited = extract_numbers_and_words("\n".join(citation.text for citation in citations))
    return CitationSupport(
        citations=tuple(citations),
        answer_coverage=1 - len(missing) / len(own_keys) if own_keys else 0.0,
        question_coverage=len(question_keys & passage_keys) / len(question_keys) if question_keys else 1.0,
        missing_numbers=extract_numbers(answer) - cited - extract_numbers(question),
        is_echo=not (answer_keys - question_keys) and not _YES_NO.match(answer),
    )


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
_SENTENCE_END = re.compile(r"(?<=[.!?:])\s+(?=[A-Z0-9`\"'(*-])")
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


def split_sentences(text: str) -> list[str]:
    """Split a passage into sentences; lines of lists, tables and headings stand for themselves."""
    units: list[str] = []
    paragraph = ""
    for line in text.split("\n"):
        if not line.strip() or _STRUCTURED_LINE.match(line):
            units.append(paragraph)
            paragraph = line.strip()
        else:
            paragraph = f"{paragraph} {line.strip()}".strip()
    units.append(paragraph)
    return [sentence for unit in units for sentence in _SENTENCE_END.split(unit) if sentence.strip()]


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


Search = Callable[[str, int], Awaitable[Sequence[Passage]]]
"""Find passages for a question, best first, at most so many."""
OnText = Callable[[str], Awaitable[None]]

MAX_SHOWN_PASSAGES = 4
"""Passages that the model is shown."""
MAX_ANSWER_TOKENS = 120
MIN_ANSWER_COVERAGE = 0.5
"""Share of the answer's own words that the cited lines must hold."""
MIN_QUESTION_COVERAGE = 0.34
"""Share of the question's words that the cited passages must hold."""
MIN_SECOND_PASS_COVERAGE = 0.5
"""Share of the question's words that one sentence must hold, to ask again after an answer in doubt."""
SECOND_PASS_WEIGHT_RATIO = 1.5
"""How much more of the question another sentence must hold, to ask again after a good answer."""
MIN_SOURCE_WEIGHT = 1.0
"""What a sentence without a word of the question counts: it may well go on from the one before it."""
_ANSWER_PROMPT = (
    "Answer the question in one short sentence, from the passages only. "
    "If the passages do not say it, reply: Not found."
)
_DENIAL = re.compile(
    r"^\W*(not found|not (?:stated|mentioned|specified|given|provided|available)|n/?a\b|unknown|no information|"
    r"i (?:do not|don't|cannot|can't)|there is no (?:information|mention))|"
    r"(?:passages?|text|document|context) (?:do(?:es)? not|don't|doesn't) "
    r"(?:say|mention|state|specify|provide|contain|give)|"
    r"is not (?:mentioned|stated|specified|provided|given)|\bnot found\.?$",
    re.IGNORECASE,
)


async def answer_question(
    question: str, ask: PromptFunction, search: Search, *, reasons: tuple[str, ...] = (), on_text: OnText | None = None
) -> ExecuteResult:
    """Answer ``question`` with a sentence and its citations, or say that it was not found.

    An answer that the passages do not carry is withheld: the result then has ``found=False`` and says so.
    ``reasons`` say why an earlier answer was refused. Raises what ``ask`` and ``search`` raise.
    """
    passages = list(await search(question, MAX_SHOWN_PASSAGES))[:MAX_SHOWN_PASSAGES]
    if not passages:
        return not_found_result((), "no passage has the words of the question")
    said = await ask(
        _answer_messages(question, passages, reasons),
        max_tokens=MAX_ANSWER_TOKENS,
        on_text=on_text,
        suffices=has_whole_paragraph,
    )
    answer, held, doubt = _assess_answer(question, said, passages)
    if _needs_second_pass(question, answer, held, doubt, passages):
        narrow = narrow_passages(question, passages)
        said = await ask(
            _answer_messages(question, narrow, reasons),
            max_tokens=MAX_ANSWER_TOKENS,
            on_text=on_text,
            suffices=has_whole_paragraph,
        )
        answer, held, doubt = _assess_answer(question, said, passages)
    if doubt or held is None:
        return not_found_result(passages, doubt)
    cited = "\n".join(dict.fromkeys(citation.reference for citation in held.citations))
    return ExecuteResult(
        output=f"{answer}\n\n{cited}",
        evidence=Evidence(
            kind="documents",
            citations=held.citations,
            checks=(
                Check("support", True, f"{held.answer_coverage:.0%} of the answer's words stand in the lines cited"),
            ),
        ),
    )


def is_denial(answer: str) -> bool:
    """Return whether a model's answer says that it found nothing."""
    return bool(_DENIAL.search(answer))


def first_paragraph(answer: str) -> str:
    """Return the first paragraph of a model's answer as one line."""
    return " ".join(answer.strip().split("\n\n")[0].removeprefix("Answer:").split())


def has_whole_paragraph(answer: str) -> bool:
    """Return whether an answer that was cut has its first paragraph whole; the rest is not used."""
    return "\n\n" in answer.strip()


def not_found_result(passages: Sequence[Passage], why: str) -> ExecuteResult:
    """Return the honest answer for a question whose answer was not found."""
    files = list(dict.fromkeys(passage.source for passage in passages))
    where = f" in {', '.join(files)}" if files else ""
    return ExecuteResult(
        output=f"Not found{where}: {why}.",
        evidence=Evidence(kind="documents", found=False, checks=(Check("support", False, why),)),
    )


def _assess_answer(question: str, said: str, passages: Sequence[Passage]) -> tuple[str, CitationSupport | None, str]:
    """Return the answer, what carries it, and why it is in doubt (empty when it is not)."""
    answer = first_paragraph(said)
    if not answer or is_denial(answer):
        return answer, None, "the passages found do not say it"
    held = measure_support(question, answer, passages)
    if held.is_echo:
        doubt = "the model's answer only repeats the question"
    elif held.missing_numbers:
        missing = ", ".join(sorted(held.missing_numbers))
        doubt = f"the model's answer has numbers that the passages do not give for it ({missing})"
    elif not held.citations or held.answer_coverage < MIN_ANSWER_COVERAGE:
        doubt = "the model's answer is not borne out by the passages"
    elif held.question_coverage < MIN_QUESTION_COVERAGE:
        doubt = "the passages found do not speak of what is asked"
    else:
        doubt = ""
    return answer, held, doubt


def _needs_second_pass(
    question: str, answer: str, held: CitationSupport | None, doubt: str, passages: Sequence[Passage]
) -> bool:
    """Return whether a sentence speaks enough of the question to ask again about the best sentences alone.

    After a doubtful answer it must have half of the question's words; after a good one it must have more of them
    than the sentence that the answer came from.
    """
    best = rank_sentences(question, passages)
    if not best or not best[0].question_words:
        return False
    if doubt:
        return len(best[0].question_words) >= MIN_SECOND_PASS_COVERAGE * len(stems(question))
    own = stems(answer) - stems(question)
    source = max(best, key=lambda each: (len(own & stems(each.text)), each.weight))
    return bool(own) and best[0].weight > max(source.weight, MIN_SOURCE_WEIGHT) * SECOND_PASS_WEIGHT_RATIO


def _answer_messages(question: str, passages: Sequence[Passage], reasons: tuple[str, ...]) -> list[Message]:
    shown = "\n---\n".join(f"{passage.source}:\n{passage.text}" for passage in passages)
    refused = f"\nAn earlier answer was refused: {' '.join(reasons)[:400]}" if reasons else ""
    return [Message.system(_ANSWER_PROMPT), Message.user(f"{shown}\n---\nQuestion: {question}{refused}")]
