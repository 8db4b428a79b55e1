"""The chat completions types (the subset of OpenAI's that is served), and the interface of a model."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

import msgspec
from msgspec import UNSET, Meta, UnsetType

Role = Literal["system", "developer", "user", "assistant", "tool"]
FinishReason = Literal["stop", "length", "content_filter", "tool_calls"]


class TextPart(msgspec.Struct, frozen=True):
    """A part of a message's content."""

    text: str
    type: Literal["text"] = "text"


class FunctionCall(msgspec.Struct, frozen=True):
    """A function that the model wants called; ``arguments`` is the text of a JSON object, as the model wrote it."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct, frozen=True):
    """One call that the model wants done; the message with its result names ``id``."""

    id: str
    function: FunctionCall
    type: Literal["function"] = "function"


class ChatMessage(msgspec.Struct, frozen=True):
    """One message. ``content`` is text, or text parts that are read as one text.

    ``tool_calls`` are the assistant's; ``tool_call_id`` says which of them a ``tool`` message answers.
    """

    role: Role
    content: str | tuple[TextPart, ...] | None = None
    tool_calls: tuple[ToolCall, ...] | None = None
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        """Return the content as one text; absent content is the empty text."""
        if self.content is None:
            return ""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class JsonSchemaFormat(msgspec.Struct, frozen=True, omit_defaults=True):
    """A JSON schema that the answer must fit."""

    schema: dict[str, object]
    name: str = "answer"
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True, omit_defaults=True):
    """The form of the answer. ``json_schema`` is wanted exactly when the type says so."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    def __post_init__(self) -> None:
        """Refuse a type that does not go with the schema."""
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema is wanted exactly when type is 'json_schema'")


class StreamOptions(msgspec.Struct, frozen=True, omit_defaults=True):
    """``include_usage`` asks for a last chunk with the usage."""

    include_usage: bool = False


class Function(msgspec.Struct, frozen=True, omit_defaults=True):
    """A function that the model may want called; ``parameters`` is a JSON schema."""

    name: str
    description: str | None = None
    parameters: dict[str, object] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, frozen=True):
    """A tool that the model may use: a function."""

    function: Function
    type: Literal["function"] = "function"


class FunctionName(msgspec.Struct, frozen=True):
    """A function, by its name."""

    name: str


class ToolChoice(msgspec.Struct, frozen=True):
    """The one tool that the model has to use."""

    function: FunctionName
    type: Literal["function"] = "function"


class ChatRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """The body of ``POST /v1/chat/completions``. Token limits count tokens of the answer."""

    model: str
    messages: Annotated[tuple[ChatMessage, ...], Meta(min_length=1)]
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    seed: int | None = None
    stop: str | Annotated[tuple[str, ...], Meta(max_length=16)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[tuple[Tool, ...], Meta(max_length=128)] = ()
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    @property
    def completion_limit(self) -> int | None:
        """Return the limit of the answer in tokens; the newer field wins, ``None`` means no limit of its own."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        """Return the texts that end the answer."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else self.stop


class ChatUsage(msgspec.Struct, frozen=True):
    """Tokens of one call."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, prompt_tokens: int, completion_tokens: int) -> ChatUsage:
        """Return the usage with its total."""
        return cls(prompt_tokens, completion_tokens, prompt_tokens + completion_tokens)


class CompletionMessage(msgspec.Struct, frozen=True):
    """The message of an answer."""

    content: str
    role: Literal["assistant"] = "assistant"
    tool_calls: tuple[ToolCall, ...] | UnsetType = UNSET


class ChatChoice(msgspec.Struct, frozen=True):
    """The one choice of an answer."""

    message: CompletionMessage
    finish_reason: FinishReason
    index: int = 0


class ChatCompletion(msgspec.Struct, frozen=True):
    """An answer in one piece. ``created`` is in epoch seconds."""

    id: str
    created: int
    model: str
    choices: tuple[ChatChoice, ...]
    usage: ChatUsage
    object: Literal["chat.completion"] = "chat.completion"


class ToolCallDelta(msgspec.Struct, frozen=True):
    """A call that the model wants done; ours come whole, in the chunk before the last."""

    index: int
    id: str
    function: FunctionCall
    type: Literal["function"] = "function"


class ChatDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a chunk adds."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: tuple[ToolCallDelta, ...] | None = None


class ChunkChoice(msgspec.Struct, frozen=True):
    """The one choice of a chunk; ``finish_reason`` is on the last one that has a choice."""

    delta: ChatDelta
    finish_reason: FinishReason | None = None
    index: int = 0


class ChatChunk(msgspec.Struct, frozen=True):
    """One server-sent event of a streamed answer. With ``include_usage`` the last has no choice but the usage."""

    id: str
    created: int
    model: str
    choices: tuple[ChunkChoice, ...]
    usage: ChatUsage | UnsetType | None = UNSET
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text that the model wrote since the last one."""

    text: str


@dataclass(frozen=True, slots=True)
class CompletionEnd:
    """The end of an answer, with the calls that it asks for.

    ``exact`` is false where ``usage`` is an upper bound, not the provider's own count.
    """

    finish_reason: FinishReason
    usage: ChatUsage
    exact: bool = True
    tool_calls: tuple[ToolCall, ...] = ()


ModelStreamChunk = TextDelta | CompletionEnd


class ChatModel(Protocol):
    """A model that answers chats."""

    @property
    def name(self) -> str:
        """Return the model's name, e.g. ``qwen2.5-coder-0.5b`` or ``openai:gpt-4o-mini``."""
        ...

    @property
    def context_tokens(self) -> int:
        """Return how many tokens prompt and answer may have together."""
        ...

    async def count_tokens(self, messages: Sequence[ChatMessage]) -> int:
        """Count the prompt with its template: exactly where the tokenizer is at hand, else an upper bound."""
        ...

    def stream(self, request: ChatRequest) -> AsyncGenerator[ModelStreamChunk]:
        """Answer ``request``: text deltas, then one :class:`CompletionEnd`.

        Closing the generator, or cancelling the task that waits on it, stops the generation; use it inside
        ``contextlib.aclosing``. Raises :class:`octollm.errors.OctoError`: ``context_too_long``, ``overloaded``,
        ``invalid_body``, ``no_model``, ``model_failed``.
        """
        ...

    async def aclose(self) -> None:
        """Free what the model holds; running generations end with ``model_failed``. May be called again."""
        ...


def bound_prompt_tokens(messages: Sequence[ChatMessage]) -> int:
    """Bound the tokens of ``messages`` from above: no tokenizer makes more tokens than there are UTF-8 bytes.

    Sixteen tokens a message and sixteen more stand for what a template puts around them.
    """
    called = (call.function for message in messages for call in message.tool_calls or ())
    return (
        16
        + sum(16 + len(message.text.encode("utf-8", "surrogatepass")) for message in messages)
        + sum(16 + len(call.name) + len(call.arguments.encode("utf-8", "surrogatepass")) for call in called)
    )


def bound_tool_tokens(request: ChatRequest) -> int:
    """Bound the tokens that the description of a request's tools takes in the prompt: its bytes as JSON."""
    return len(msgspec.json.encode(request.tools)) if request.tools else 0
