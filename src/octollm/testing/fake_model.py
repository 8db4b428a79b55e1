"""A model whose answers are the test's, in the place of a real one; all around it is real."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from octollm.errors import OctoError, RemoteError
from octollm.llm.types import (
    ChatMessage,
    ChatRequest,
    ChatUsage,
    CompletionEnd,
    FunctionCall,
    ModelStreamChunk,
    TextDelta,
    ToolCall,
    bound_tool_tokens,
)
from octollm.rpc.shapes import encode

_CHUNK_CHARS = 8
"""Characters of one piece."""


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The model wants a tool called."""

    name: str
    arguments: Mapping[str, object] = field(default_factory=dict[str, object])


FakeAnswer = object
"""Text; :class:`ToolUse`; an ``OctoError``, which is raised; anything else is written as JSON."""
FakeAnswers = Iterable[FakeAnswer] | Callable[[ChatRequest], FakeAnswer]
"""Answers in order, or a function from what is asked to its answer."""


class FakeModel:
    """Answers as it is told; counts a word as a token. ``asked`` has every request. One text is one answer."""

    name = "fake"
    round_context = 100_000

    def __init__(self, answers: FakeAnswers = ()) -> None:
        self._answers: Callable[[ChatRequest], FakeAnswer] | Iterator[FakeAnswer]
        self._answers = answers if callable(answers) else iter([answers] if isinstance(answers, str) else answers)
        self.requests: list[ChatRequest] = []

    @property
    def prompts(self) -> list[str]:
        """Return the last message of each request."""
        return [request.messages[-1].text for request in self.requests]

    async def count_tokens(self, messages: Sequence[ChatMessage]) -> int:
        """Count words."""
        return sum(len(message.text.split()) for message in messages)

    async def stream(self, request: ChatRequest) -> AsyncGenerator[ModelStreamChunk]:
        """Write the next answer in pieces; see :class:`octollm.llm.types.ChatModel`."""
        self.requests.append(request)
        answer = self._next(request)
        if isinstance(answer, OctoError):
            raise answer
        prompt = await self.count_tokens(request.messages) + bound_tool_tokens(request)
        if isinstance(answer, ToolUse):
            call = FunctionCall(answer.name, encode(dict(answer.arguments)).decode())
            calls = (ToolCall(f"call-{len(self.requests)}", call),)
            yield CompletionEnd("tool_calls", ChatUsage.of(prompt, len(call.arguments.split())), tool_calls=calls)
            return
        text = answer if isinstance(answer, str) else encode(answer).decode()
        words = text.split()
        cut = request.completion_limit is not None and len(words) > request.completion_limit
        if cut:
            words = words[: request.completion_limit]
            text = " ".join(words)
        for start in range(0, len(text), _CHUNK_CHARS):
            yield TextDelta(text[start : start + _CHUNK_CHARS])
        yield CompletionEnd("length" if cut else "stop", ChatUsage.of(prompt, len(words)))

    async def aclose(self) -> None:
        """Free nothing."""

    def _next(self, request: ChatRequest) -> FakeAnswer:
        if callable(self._answers):
            return self._answers(request)
        for answer in self._answers:
            return answer
        return RemoteError(
            f"The test's model has no answer left; it was asked: {request.messages[-1].text[:200]!r}",
            code="model_failed",
            status=503,
            retryable=False,
        )
