"""The arms' interface to a language model: prompt messages and the function that completes them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Literal, Protocol

import msgspec


class PromptMessage(msgspec.Struct, frozen=True):
    """One message of a chat (the OpenAI chat format)."""

    role: Literal["system", "user", "assistant"]
    content: str


class PromptFunction(Protocol):
    """Ask the model for one answer.

    ``max_tokens`` bounds the answer; ``schema`` is a JSON Schema that the answer has to fit (it is still text
    here); ``on_text`` is awaited with each piece as it is written. Raises ``OctoError`` of the call
    (``budget_exhausted``, ``model_failed``, …), never returns a partial answer for a failure.
    """

    async def __call__(
        self,
        messages: Sequence[PromptMessage],
        *,
        max_tokens: int,
        schema: dict[str, object] | None = None,
        temperature: float = 0.0,
        seed: int = 0,
        on_text: Callable[[str], Awaitable[None]] | None = None,
    ) -> str:
        """Return the whole answer."""
        ...


def system(content: str) -> PromptMessage:
    """Return a system message."""
    return PromptMessage("system", content)


def user(content: str) -> PromptMessage:
    """Return a user message."""
    return PromptMessage("user", content)


def assistant(content: str) -> PromptMessage:
    """Return an assistant message: what the model said before."""
    return PromptMessage("assistant", content)
