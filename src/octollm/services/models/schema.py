"""Response schema of the models service: OpenAI's chat completions and chunks, with ``usage.cost_usd``."""

from __future__ import annotations

from typing import Literal

import msgspec

from octollm.contracts.problems import Problem
from octollm.framing import encode_sse
from octollm.llm.types import (
    ChatChoice,
    ChatChunk,
    ChatDelta,
    ChatUsage,
    ChunkChoice,
    FinishReason,
    ToolCall,
    ToolCallDelta,
)


class PricedUsage(ChatUsage, frozen=True):
    """Tokens of one call and their price in US dollars."""

    cost_usd: float = 0.0


class PricedChatCompletion(msgspec.Struct, frozen=True):
    """An answer in one piece, also the form in which it is journaled. ``created`` is in epoch seconds."""

    id: str
    created: int
    model: str
    choices: tuple[ChatChoice, ...]
    usage: PricedUsage
    object: Literal["chat.completion"] = "chat.completion"

    @property
    def text(self) -> str:
        """Return what the model wrote."""
        return "".join(choice.message.content for choice in self.choices)

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """Return the calls that the answer asks for."""
        return tuple(call for choice in self.choices for call in choice.message.tool_calls or ())

    @property
    def finish_reason(self) -> FinishReason:
        """Return why it ended."""
        return self.choices[-1].finish_reason if self.choices else "stop"


class ModelInfo(msgspec.Struct, frozen=True):
    """A model that may be named in a request."""

    id: str
    created: int = 0
    owned_by: str = "octollm"
    object: Literal["model"] = "model"


class ModelList(msgspec.Struct, frozen=True):
    """``GET /v1/models``."""

    data: tuple[ModelInfo, ...]
    object: Literal["list"] = "list"


DONE_EVENT = b"data: [DONE]\n\n"
KEEPALIVE_COMMENT = b": still working\n\n"
"""Keeps a connection alive; clients pass over comments (WHATWG HTML section 9.2.6)."""


class ChunkEncoder:
    """The events of one streamed answer, encoded."""

    def __init__(self, answer_id: str, created: int, model: str) -> None:
        self._id = answer_id
        self._created = created
        self._model = model

    def encode_start(self) -> bytes:
        """Return the first event: who speaks."""
        return self._encode_choice(ChunkChoice(ChatDelta(role="assistant", content="")))

    def encode_text(self, text: str) -> bytes:
        """Return an event with text that was written since the last one."""
        return self._encode_choice(ChunkChoice(ChatDelta(content=text)))

    def encode_end(self, completion: PricedChatCompletion, *, with_usage: bool) -> bytes:
        """Return the last events: why it ended, what it cost if that was asked for, and the mark of the end."""
        events = self._encode_tool_calls(completion) + self._encode_choice(
            ChunkChoice(ChatDelta(), completion.finish_reason)
        )
        if with_usage:
            events += encode_sse(ChatChunk(self._id, self._created, self._model, (), completion.usage))
        return events + DONE_EVENT

    def _encode_tool_calls(self, completion: PricedChatCompletion) -> bytes:
        deltas = tuple(ToolCallDelta(index, call.id, call.function) for index, call in enumerate(completion.tool_calls))
        return self._encode_choice(ChunkChoice(ChatDelta(tool_calls=deltas))) if deltas else b""

    def _encode_choice(self, choice: ChunkChoice) -> bytes:
        return encode_sse(ChatChunk(self._id, self._created, self._model, (choice,)))


def encode_error_event(problem: Problem) -> bytes:
    """Return the event that ends a stream which cannot go on."""
    return encode_sse(problem)
