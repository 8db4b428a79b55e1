"""Answering a question from passages: the model writes a sentence, code attaches the lines that carry it."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence

from octollm.contracts.asking import PromptFunction, PromptMessage, system, user
from octollm.contracts.operations import Passage
from octollm.contracts.task import Check, Evidence, ExecuteResult
from octollm.contracts.words import stems
from octollm.services.arms.retriever.cite import CitationSupport, measure_support
from octollm.services.arms.retriever.focus import narrow_passages, rank_sentences

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
    said = await ask(_answer_messages(question, passages, reasons), max_tokens=MAX_ANSWER_TOKENS, on_text=on_text)
    answer, held, doubt = _assess_answer(question, said, passages)
    if _needs_second_pass(question, answer, held, doubt, passages):
        narrow = narrow_passages(question, passages)
        said = await ask(_answer_messages(question, narrow, reasons), max_tokens=MAX_ANSWER_TOKENS, on_text=on_text)
        answer, held, doubt = _assess_answer(question, said, passages)
    if doubt or held is None:
        return not_found_result(passages, doubt)
    cited = "\n".join(f"[{c.file}:{c.line_start}-{c.line_end}]" for c in held.citations)
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


def _answer_messages(question: str, passages: Sequence[Passage], reasons: tuple[str, ...]) -> list[PromptMessage]:
    shown = "\n---\n".join(f"{passage.source}:\n{passage.text}" for passage in passages)
    refused = f"\nAn earlier answer was refused: {' '.join(reasons)[:400]}" if reasons else ""
    return [system(_ANSWER_PROMPT), user(f"{shown}\n---\nQuestion: {question}{refused}")]
