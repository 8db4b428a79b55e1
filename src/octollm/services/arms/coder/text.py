"""Answering a goal that wants neither code nor data: the model's own text, which nothing here can check."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from octollm.contracts.asking import PromptFunction, system, user
from octollm.contracts.task import Check, Evidence, ExecuteResult
from octollm.errors import OctoError

OnText = Callable[[str], Awaitable[None]]

MAX_TEXT_TOKENS = 400
MAX_TEXT_NOTES = 4000
_TEXT_PROMPT = "Do what is asked, briefly. Say so when you do not know."


async def write_text(
    goal: str,
    ask: PromptFunction,
    *,
    notes: str = "",
    reasons: Sequence[str] = (),
    max_tokens: int = MAX_TEXT_TOKENS,
    on_text: OnText | None = None,
) -> ExecuteResult:
    """Return the model's text, marked as not checked. ``notes`` are what earlier steps found.

    Raises ``OctoError`` (``model_output_invalid``) for an empty answer, and what ``ask`` raises.
    """
    known = f"{notes[:MAX_TEXT_NOTES]}\n\n" if notes else ""
    refused = f"\n\nAn earlier answer was refused: {' '.join(reasons)[:600]}" if reasons else ""
    answer = await ask([system(_TEXT_PROMPT), user(f"{known}{goal}{refused}")], max_tokens=max_tokens, on_text=on_text)
    if not answer.strip():
        raise OctoError("The model gave no text.", code="model_output_invalid")
    check = Check("checked", False, "the model's own words: nothing was run or looked up")
    return ExecuteResult(output=answer.strip(), evidence=Evidence(kind="text", checks=(check,)))
