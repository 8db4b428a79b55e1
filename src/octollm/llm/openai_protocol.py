"""OpenAI's chat completions protocol as a client uses it: server-sent events, request body, response chunks, assembled tool calls."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Literal

import msgspec

from octollm.llm.types import (
    ChatRequest,
    FinishReason,
    FunctionCall,
    ResponseFormat,
    StreamOptions,
    Tool,
    ToolCall,
    ToolChoice,
)

MAX_EVENT_BYTES = 1024 * 1024


async def iter_sse_data(
    chunks: AsyncIterator[bytes | memoryview | bytearray], max_event_bytes: int = MAX_EVENT_BYTES
) -> AsyncGenerator[bytes]:
    """Yield the data of each event; comments and other fields are passed over. Raises ``ValueError`` past the bound."""
    data: list[bytes] = []
    size = 0
    async for line in _iter_lines(chunks, max_event_bytes):
        if not line:
            if data:
                yield b"\n".join(data)
            data, size = [], 0
        elif line.startswith(b"data:"):
            value = line[5:].removeprefix(b" ")
            size += len(value)
            if size > max_event_bytes:
                raise ValueError("an event is too long")
            data.append(value)
    if data:  # some servers leave out the last empty line
        yield b"\n".join(data)


async def _iter_lines(chunks: AsyncIterator[bytes | memoryview | bytearray], limit: int) -> AsyncGenerator[bytes]:
    """Yield lines without their ends. A lone CR, which no server of chat completions sends, does not end one."""
    buffer = bytearray()
    async for chunk in chunks:
        buffer += chunk
        *whole, rest = bytes(buffer).split(b"\n")
        for line in whole:
            yield line.removesuffix(b"\r")
        buffer = bytearray(rest)
        if len(buffer) > limit:
            raise ValueError("a line is too long")
    if buffer:
        yield bytes(buffer).removesuffix(b"\r")


_MAX_TOOL_CALLS = 128


class OpenAIMessage(msgspec.Struct, frozen=True, omit_defaults=True):
    """A message as it is sent."""

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] | None = None
    tool_call_id: str | None = None


class OpenAIRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """The body of a request; what is absent is left to the provider."""

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
    """What the provider counted."""

    prompt_tokens: int
    completion_tokens: int = 0


class OpenAIFunctionDelta(msgspec.Struct, frozen=True):
    """A piece of the call of a function."""

    name: str | None = None
    arguments: str | None = None


class OpenAIToolCallDelta(msgspec.Struct, frozen=True):
    """A piece of one call; ``index`` says of which."""

    index: int = 0
    id: str | None = None
    function: OpenAIFunctionDelta = OpenAIFunctionDelta()


class OpenAIDelta(msgspec.Struct, frozen=True):
    """What a chunk adds."""

    content: str | None = None
    tool_calls: tuple[OpenAIToolCallDelta, ...] | None = None


class OpenAIChunkChoice(msgspec.Struct, frozen=True):
    """The one choice of a chunk."""

    delta: OpenAIDelta = OpenAIDelta()
    finish_reason: str | None = None


class OpenAIError(msgspec.Struct, frozen=True):
    """The provider's own words for a failure."""

    message: str = ""
    code: str | int | None = None


class OpenAIChunk(msgspec.Struct, frozen=True):
    """One server-sent event."""

    choices: tuple[OpenAIChunkChoice, ...] = ()
    usage: OpenAIUsage | None = None
    error: OpenAIError | None = None


class OpenAIModelEntry(msgspec.Struct, frozen=True):
    """An entry of the provider's list of models."""

    id: str


class OpenAIModelList(msgspec.Struct, frozen=True):
    """``GET /models``."""

    data: tuple[OpenAIModelEntry, ...]


class OpenAIErrorBody(msgspec.Struct, frozen=True):
    """The body of a refusal."""

    error: OpenAIError


class ToolCallAccumulator:
    """The calls that an answer asks for, put together from the pieces that they come in."""

    def __init__(self) -> None:
        self._parts: dict[int, list[str]] = {}

    def add(self, delta: OpenAIToolCallDelta) -> int:
        """Add a piece; return how many bytes it has. Raises ``ValueError`` past the bound of calls."""
        if delta.index not in self._parts and len(self._parts) >= _MAX_TOOL_CALLS:
            raise ValueError("too many calls")
        part = self._parts.setdefault(delta.index, ["", "", ""])
        pieces = (delta.id or "", delta.function.name or "", delta.function.arguments or "")
        for place, piece in enumerate(pieces):
            part[place] += piece
        return sum(len(piece.encode("utf-8", "surrogatepass")) for piece in pieces[1:])

    def calls(self) -> tuple[ToolCall, ...]:
        """Return the calls in the provider's order."""
        return tuple(
            ToolCall(call_id or f"call-{index}", FunctionCall(name, arguments or "{}"))
            for index, (call_id, name, arguments) in sorted(self._parts.items())
        )


def build_request(model: str, request: ChatRequest) -> OpenAIRequest:
    """Return the body that asks ``model`` for what ``request`` asks, as a stream with its usage."""
    return OpenAIRequest(
        model=model,
        messages=tuple(
            OpenAIMessage(message.role, message.text, message.tool_calls, message.tool_call_id)
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
    """Return our word for a provider's reason; one that we do not know is an ordinary end."""
    if reason is None or reason == "":
        return None
    known: dict[str, FinishReason] = {
        "length": "length",
        "content_filter": "content_filter",
        "tool_calls": "tool_calls",
    }
    return known.get(reason, "stop")
