"""OpenAI's chat completions protocol, the client's side: request body, response chunks, and assembled tool calls.

The response structs accept any member that they do not name: providers add their own.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from octollm.llm.types import (
    ChatRequest,
    FinishReason,
    FunctionCall,
    ImagePart,
    ResponseFormat,
    StreamOptions,
    TextPart,
    Tool,
    ToolCall,
    ToolChoice,
)

MAX_EVENT_BYTES = 1024 * 1024
_MAX_TOOL_CALLS = 128


class OpenAIMessage(msgspec.Struct, frozen=True, omit_defaults=True):
    """A message of a request."""

    role: str
    content: str | tuple[TextPart | ImagePart, ...]
    tool_calls: tuple[ToolCall, ...] | None = None
    tool_call_id: str | None = None


class OpenAIRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """The body of a request; the provider's default applies to what is absent."""

    model: str
    messages: tuple[OpenAIMessage, ...]
    stream: Literal[True] | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] | None = None
    response_format: ResponseFormat | None = None
    tools: tuple[Tool, ...] | None = None
    tool_choice: str | ToolChoice | None = None
    parallel_tool_calls: bool | None = None


class OpenAIUsage(msgspec.Struct, frozen=True):
    """The provider's token counts."""

    prompt_tokens: int
    completion_tokens: int = 0


class OpenAIFunctionDelta(msgspec.Struct, frozen=True):
    """A fragment of a function call."""

    name: str | None = None
    arguments: str | None = None


class OpenAIToolCallDelta(msgspec.Struct, frozen=True):
    """A fragment of the tool call number ``index``."""

    index: int = 0
    id: str | None = None
    function: OpenAIFunctionDelta = OpenAIFunctionDelta()


class OpenAIDelta(msgspec.Struct, frozen=True):
    """The increment of a chunk: text, or fragments of tool calls."""

    content: str | None = None
    tool_calls: tuple[OpenAIToolCallDelta, ...] | None = None


class OpenAIChunkChoice(msgspec.Struct, frozen=True):
    """The one choice of a chunk."""

    delta: OpenAIDelta = OpenAIDelta()
    finish_reason: str | None = None


class OpenAIError(msgspec.Struct, frozen=True):
    """An error object of the provider."""

    message: str = ""
    code: str | int | None = None


class OpenAIChunk(msgspec.Struct, frozen=True):
    """The data of one server-sent event of a response."""

    choices: tuple[OpenAIChunkChoice, ...] = ()
    usage: OpenAIUsage | None = None
    error: OpenAIError | None = None


class OpenAIEmbedding(msgspec.Struct, frozen=True):
    """One embedding."""

    index: int
    embedding: tuple[float, ...]


class OpenAIEmbeddings(msgspec.Struct, frozen=True):
    """The response of ``POST /embeddings``."""

    data: tuple[OpenAIEmbedding, ...]
    usage: OpenAIUsage | None = None


class OpenAIModelEntry(msgspec.Struct, frozen=True):
    """An entry of the list of models."""

    id: str


class OpenAIModelList(msgspec.Struct, frozen=True):
    """The response of ``GET /models``."""

    data: tuple[OpenAIModelEntry, ...]


class OpenAIErrorBody(msgspec.Struct, frozen=True):
    """The body of an error response."""

    error: OpenAIError


class ToolCallAccumulator:
    """Assembles the tool calls of a response from their fragments."""

    def __init__(self) -> None:
        self._parts: dict[int, list[str]] = {}

    def add(self, delta: OpenAIToolCallDelta) -> int:
        """Add a fragment and return its size in bytes. Raises ``ValueError`` at more than 128 calls."""
        if delta.index not in self._parts and len(self._parts) >= _MAX_TOOL_CALLS:
            raise ValueError("too many calls")
        part = self._parts.setdefault(delta.index, ["", "", ""])
        fragments = (delta.id or "", delta.function.name or "", delta.function.arguments or "")
        for position, fragment in enumerate(fragments):
            part[position] += fragment
        return sum(len(fragment.encode("utf-8", "surrogatepass")) for fragment in fragments[1:])

    def calls(self) -> tuple[ToolCall, ...]:
        """Return the assembled calls in the order of their index."""
        return tuple(
            ToolCall(call_id or f"call-{index}", FunctionCall(name, arguments or "{}"))
            for index, (call_id, name, arguments) in sorted(self._parts.items())
        )


def build_request(model: str, request: ChatRequest) -> OpenAIRequest:
    """Return the body of ``request`` for ``model``, as a stream that ends with its usage."""
    return OpenAIRequest(
        model=model,
        messages=tuple(
            # Parts only where there are images: some providers take nothing but text.
            OpenAIMessage(
                message.role,
                message.content if message.images and message.content is not None else message.text,
                message.tool_calls,
                message.tool_call_id,
            )
            for message in request.messages
        ),
        stream=True,
        stream_options=StreamOptions(include_usage=True),
        max_tokens=request.max_tokens,
        max_completion_tokens=request.max_completion_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        seed=request.seed,
        stop=request.stops or None,
        response_format=request.response_format,
        tools=request.tools or None,
        tool_choice=request.tool_choice,
        parallel_tool_calls=request.parallel_tool_calls,
    )


def parse_finish_reason(reason: str | None) -> FinishReason | None:
    """Map a provider's finish reason to ours; an unknown one counts as ``stop``."""
    if reason is None or reason == "":
        return None
    known: dict[str, FinishReason] = {
        "length": "length",
        "content_filter": "content_filter",
        "tool_calls": "tool_calls",
    }
    return known.get(reason, "stop")
