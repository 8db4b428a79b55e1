"""The built-in arms' interface to a language model: the function that completes messages."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from octollm import Message


class PromptFunction(Protocol):
    """Asks the model for one answer.

    ``max_tokens`` limits the answer; ``schema`` is a JSON Schema that the answer conforms to (it is still text);
    ``on_text`` is awaited with each piece as it is written. Raises the ``OctoError`` of the call
    (``budget_exhausted``, ``model_failed``, …); a failure never returns a partial answer.
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
    ) -> str:
        """Return the whole answer."""
        ...
