"""The built-in arms' interface to a language model: the function that completes messages."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from octollm import Message, OctoError

_CLOSED_BLOCK = re.compile(r"^[ \t]*```.*\n(?s:.+?)\n[ \t]*```", re.MULTILINE)


class PromptFunction(Protocol):
    """Asks the model for one answer.

    ``max_tokens`` limits the answer; ``schema`` is a JSON Schema that the answer conforms to (it is still text);
    ``on_text`` is awaited with each piece as it is written. Raises the ``OctoError`` of the call
    (``budget_exhausted``, ``model_failed``, …); a failure never returns a partial answer.

    An answer that was cut at ``max_tokens`` is asked for again with a larger limit, unless ``suffices`` says that what
    there is of it is enough. Raises ``model_output_truncated`` when the second answer is cut as well, and
    ``model_output_filtered`` for an answer that the provider's filter withheld.
    """

    async def __call__(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int,
        schema: dict[str, object] | None = None,
        temperature: float = 0.0,
        seed: int = 0,
        on_text: Callable[[str], Awaitable[None]] | None = None,
        suffices: Callable[[str], bool] | None = None,
    ) -> str:
        """Return the whole answer."""
        ...


async def ask_draft(
    ask: PromptFunction,
    messages: Sequence[Message],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    on_text: Callable[[str], Awaitable[None]] | None = None,
) -> str:
    """Ask for code that is run before anybody believes it; return the empty string for an answer that was cut.

    What stands in a closed block of code is whole, whatever was cut after it.
    """
    try:
        return await ask(
            messages,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            on_text=on_text,
            suffices=has_closed_block,
        )
    except OctoError as error:
        if error.code != "model_output_truncated":
            raise
        return ""


def has_closed_block(answer: str) -> bool:
    """Return whether an answer has a block of code from its opening to its closing fence."""
    return _CLOSED_BLOCK.search(answer) is not None
