"""Answers a question from passages (grounded generation).

The model writes a sentence, code attaches the lines that support it, and an answer without support is withheld.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence

from octollm import Check, Evidence, ExecuteResult, Message
from octollm.contracts.operations import Passage
from octollm.services.arms.completion import PromptFunction
from octollm.services.arms.retriever.support import (
    CitationSupport,
    Relevance,
    measure_support,
    narrow_passages,
    rank_sentences,
)
from octollm.text.lexical import stems

Search = Callable[[str, int], Awaitable[Sequence[Passage]]]
"""Find passages for a question, best first, at most so many."""
OnText = Callable[[str], Awaitable[None]]

MAX_SHOWN_PASSAGES = 4
"""Passages that the model is shown."""
MAX_ANSWER_TOKENS = 120
MIN_ANSWER_COVERAGE = 0.5
"""Share of the answer's own words that the cited lines must hold."""
MAX_DOUBTFUL_COVERAGE = 0.5
"""Up to this share of the question's content terms, the sentences that an answer stands in may be about another fact.

In the test corpus a sentence about another fact of the same text has at most half of them, in 13 languages.
"""
QUESTION_CHECK = "question"
"""The name of the check whether the cited lines speak of what is asked."""
MAX_NAMED_WORDS = 5
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
    uncertain = describe_uncertainty(held.relevance)
    checks = [Check("support", True, f"{held.answer_coverage:.0%} of the answer's words stand in the lines cited")]
    checks.append(Check(QUESTION_CHECK, not uncertain, uncertain or "the lines cited have the words of the question"))
    return ExecuteResult(
        output=f"{answer}\n\n{cited}" + (f"\n\nNote: {uncertain}" if uncertain else ""),
        evidence=Evidence(
            kind="documents",
            citations=held.citations,
            checks=tuple(checks),
            notes=(uncertain,) if uncertain else (),
        ),
    )


def describe_uncertainty(relevance: Relevance) -> str:
    """Return why an answer is not certain, for its reader; an empty string if it is."""
    if relevance.coverage > MAX_DOUBTFUL_COVERAGE:
        return ""
    words = ", ".join(relevance.missing[:MAX_NAMED_WORDS])
    return f"not certain, check it: the lines cited do not have these words of the question: {words}"


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
    else:
        doubt = _find_other_subject(held.relevance)
    return answer, held, doubt


def _find_other_subject(relevance: Relevance) -> str:
    """Return why an answer is about something else than the question; an empty string if it may be about it.

    Words decide: a passage that is only similar is no evidence. Only where it was found by its meaning and has none of
    the words, as one in another language or in other words, is the answer shown as uncertain.
    """
    if not relevance.coverage and relevance.other_coverage > MAX_DOUBTFUL_COVERAGE:
        return "the model's answer is about something else than is asked"
    if not relevance.passage_coverage and not relevance.is_similar:
        return "the passages found do not speak of what is asked"
    return ""


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
