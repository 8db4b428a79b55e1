"""Answering a question from passages: the model writes a sentence, code attaches the lines that carry it."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence

from octollm.contracts.asking import Ask, Message, system, user
from octollm.contracts.operations import Passage
from octollm.contracts.task import Check, Evidence, ExecuteResult
from octollm.contracts.words import stems
from octollm.services.arms.retriever.cite import Support, support
from octollm.services.arms.retriever.focus import narrowed, sentences

Search = Callable[[str, int], Awaitable[Sequence[Passage]]]
"""Find passages for a question, best first, at most so many."""
OnText = Callable[[str], Awaitable[None]]

PASSAGES = 4
"""Passages that the model is shown."""
MAX_ANSWER_TOKENS = 120
MIN_ANSWERED = 0.5
"""Share of the answer's own words that the cited lines must hold."""
MIN_ASKED = 0.34
"""Share of the question's words that the cited passages must hold."""
MIN_SECOND_LOOK = 0.5
"""Share of the question's words that one sentence must hold, to ask again after an answer in doubt."""
CLEARLY_MORE = 1.5
"""How much more of the question another sentence must hold, to ask again after a good answer."""
LEAST_WEIGHT = 1.0
"""What a sentence without a word of the question counts: it may well go on from the one before it."""
_SYSTEM = (
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
    question: str, ask: Ask, search: Search, *, reasons: tuple[str, ...] = (), on_text: OnText | None = None
) -> ExecuteResult:
    """Answer ``question`` with a sentence and its citations, or say that it was not found.

    An answer that the passages do not carry is withheld: the result then has ``found=False`` and says so.
    ``reasons`` say why an earlier answer was refused. Raises what ``ask`` and ``search`` raise.
    """
    passages = list(await search(question, PASSAGES))[:PASSAGES]
    if not passages:
        return not_found((), "no passage has the words of the question")
    said = await ask(_messages(question, passages, reasons), max_tokens=MAX_ANSWER_TOKENS, on_text=on_text)
    answer, held, doubt = _weigh(question, said, passages)
    if _second_look(question, answer, held, doubt, passages):
        narrow = narrowed(question, passages)
        said = await ask(_messages(question, narrow, reasons), max_tokens=MAX_ANSWER_TOKENS, on_text=on_text)
        answer, held, doubt = _weigh(question, said, passages)
    if doubt or held is None:
        return not_found(passages, doubt)
    cited = "\n".join(f"[{c.file}:{c.line_start}-{c.line_end}]" for c in held.citations)
    return ExecuteResult(
        output=f"{answer}\n\n{cited}",
        evidence=Evidence(
            kind="documents",
            citations=held.citations,
            checks=(Check("support", True, f"{held.answered:.0%} of the answer's words stand in the lines cited"),),
        ),
    )


def denies(answer: str) -> bool:
    """Return whether a model's answer says that it found nothing."""
    return bool(_DENIAL.search(answer))


def tidy(answer: str) -> str:
    """Return the first paragraph of a model's answer as one line."""
    return " ".join(answer.strip().split("\n\n")[0].removeprefix("Answer:").split())


def not_found(passages: Sequence[Passage], why: str) -> ExecuteResult:
    """Return the honest answer for a question whose answer was not found."""
    files = list(dict.fromkeys(passage.source for passage in passages))
    where = f" in {', '.join(files)}" if files else ""
    return ExecuteResult(
        output=f"Not found{where}: {why}.",
        evidence=Evidence(kind="documents", found=False, checks=(Check("support", False, why),)),
    )


def _weigh(question: str, said: str, passages: Sequence[Passage]) -> tuple[str, Support | None, str]:
    """Return the answer, what carries it, and why it is in doubt (empty when it is not)."""
    answer = tidy(said)
    if not answer or denies(answer):
        return answer, None, "the passages found do not say it"
    held = support(question, answer, passages)
    if held.echo:
        doubt = "the model's answer only repeats the question"
    elif held.numbers_missing:
        missing = ", ".join(sorted(held.numbers_missing))
        doubt = f"the model's answer has numbers that the passages do not give for it ({missing})"
    elif not held.citations or held.answered < MIN_ANSWERED:
        doubt = "the model's answer is not borne out by the passages"
    elif held.asked < MIN_ASKED:
        doubt = "the passages found do not speak of what is asked"
    else:
        doubt = ""
    return answer, held, doubt


def _second_look(question: str, answer: str, held: Support | None, doubt: str, passages: Sequence[Passage]) -> bool:
    """Return whether a sentence speaks enough of the question to ask again about the best sentences alone.

    After a doubtful answer it must have half of the question's words; after a good one it must have more of them
    than the sentence that the answer came from.
    """
    best = sentences(question, passages)
    if not best or not best[0].asked:
        return False
    if doubt:
        return len(best[0].asked) >= MIN_SECOND_LOOK * len(stems(question))
    own = stems(answer) - stems(question)
    source = max(best, key=lambda each: (len(own & stems(each.text)), each.weight))
    return bool(own) and best[0].weight > max(source.weight, LEAST_WEIGHT) * CLEARLY_MORE


def _messages(question: str, passages: Sequence[Passage], reasons: tuple[str, ...]) -> list[Message]:
    shown = "\n---\n".join(f"{passage.source}:\n{passage.text}" for passage in passages)
    refused = f"\nAn earlier answer was refused: {' '.join(reasons)[:400]}" if reasons else ""
    return [system(_SYSTEM), user(f"{shown}\n---\nQuestion: {question}{refused}")]
