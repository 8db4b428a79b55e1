"""Chat completions types, the supported subset of OpenAI's, and the interface of a model."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

import msgspec
from msgspec import UNSET, Meta, UnsetType

Role = Literal["system", "developer", "user", "assistant", "tool"]
FinishReason = Literal["stop", "length", "content_filter", "tool_calls"]


MAX_IMAGE_TOKENS = {"low": 3_000, "auto": 40_000, "high": 40_000}
"""Upper bounds of the tokens that providers count for one image, by its ``detail``."""


class TextPart(msgspec.Struct, frozen=True, tag_field="type", tag="text"):
    """A text part of a message's content."""

    text: str


class ImageUrl(msgspec.Struct, frozen=True):
    """An image in place, as a ``data:`` URL (RFC 2397). An address is refused: nobody fetches on a model's behalf."""

    url: Annotated[str, Meta(pattern=r"^data:image/(png|jpeg|gif|webp);base64,")]
    detail: Literal["low", "high", "auto"] = "auto"


class ImagePart(msgspec.Struct, frozen=True, tag_field="type", tag="image_url"):
    """An image part of a message's content."""

    image_url: ImageUrl


class FunctionCall(msgspec.Struct, frozen=True):
    """A function call by the model; ``arguments`` is the text of a JSON object as the model wrote it, unchecked."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct, frozen=True):
    """A tool call by the model; the message with its result refers to ``id``."""

    id: str
    function: FunctionCall
    type: Literal["function"] = "function"


class ChatMessage(msgspec.Struct, frozen=True):
    """One message. ``content`` is a text, or parts: texts, which are concatenated, and images.

    ``tool_calls`` are those of an ``assistant`` message; ``tool_call_id`` names the call whose result a ``tool``
    message is.
    """

    role: Role
    content: str | tuple[TextPart | ImagePart, ...] | None = None
    tool_calls: tuple[ToolCall, ...] | None = None
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        """Return the content as one text, empty when there is none."""
        if self.content is None:
            return ""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content if isinstance(part, TextPart))

    @property
    def images(self) -> tuple[ImagePart, ...]:
        """Return the images in the content, in order."""
        parts = () if self.content is None or isinstance(self.content, str) else self.content
        return tuple(part for part in parts if isinstance(part, ImagePart))


class JsonSchemaFormat(msgspec.Struct, frozen=True, omit_defaults=True):
    """A JSON schema to which the answer must conform."""

    schema: dict[str, object]
    name: str = "answer"
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True, omit_defaults=True):
    """The format of the answer. ``json_schema`` is required for that type and invalid for the others."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    def __post_init__(self) -> None:
        """Raise ``ValueError`` when the type and the schema do not match."""
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema must be present exactly when type is 'json_schema'")


class StreamOptions(msgspec.Struct, frozen=True, omit_defaults=True):
    """``include_usage`` requests a last chunk with the token usage."""

    include_usage: bool = False


class Function(msgspec.Struct, frozen=True, omit_defaults=True):
    """A function that the model may call; ``parameters`` is the JSON schema of its arguments."""

    name: str
    description: str | None = None
    parameters: dict[str, object] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, frozen=True):
    """A tool that the model may call; functions are the only type."""

    function: Function
    type: Literal["function"] = "function"


class FunctionName(msgspec.Struct, frozen=True):
    """A reference to a function."""

    name: str


class ToolChoice(msgspec.Struct, frozen=True):
    """The one tool that the model must call."""

    function: FunctionName
    type: Literal["function"] = "function"


class ChatRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """The body of ``POST /v1/chat/completions``. Token limits apply to the completion."""

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
        """Return the token limit of the completion, from the newer field if both are set; ``None`` is no limit."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        """Return the stop sequences."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else self.stop


class ChatUsage(msgspec.Struct, frozen=True):
    """The token counts of one call."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, prompt_tokens: int, completion_tokens: int) -> ChatUsage:
        """Return the counts with their sum."""
        return cls(prompt_tokens, completion_tokens, prompt_tokens + completion_tokens)


class CompletionMessage(msgspec.Struct, frozen=True):
    """The assistant's message of a completion."""

    content: str
    role: Literal["assistant"] = "assistant"
    tool_calls: tuple[ToolCall, ...] | UnsetType = UNSET


class ChatChoice(msgspec.Struct, frozen=True):
    """The one choice of a completion."""

    message: CompletionMessage
    finish_reason: FinishReason
    index: int = 0


class ChatCompletion(msgspec.Struct, frozen=True):
    """A completion in one piece. ``created`` is in seconds since the epoch."""

    id: str
    created: int
    model: str
    choices: tuple[ChatChoice, ...]
    usage: ChatUsage
    object: Literal["chat.completion"] = "chat.completion"


class ToolCallDelta(msgspec.Struct, frozen=True):
    """A tool call in a chunk. We send each call complete, in the chunk before the last."""

    index: int
    id: str
    function: FunctionCall
    type: Literal["function"] = "function"


class ChatDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    """The increment of a chunk: role, text or tool calls."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: tuple[ToolCallDelta, ...] | None = None


class ChunkChoice(msgspec.Struct, frozen=True):
    """The one choice of a chunk; the last chunk with a choice has ``finish_reason``."""

    delta: ChatDelta
    finish_reason: FinishReason | None = None
    index: int = 0


class ChatChunk(msgspec.Struct, frozen=True):
    """The data of one server-sent event. With ``include_usage`` the last chunk has the usage and no choice."""

    id: str
    created: int
    model: str
    choices: tuple[ChunkChoice, ...]
    usage: ChatUsage | UnsetType | None = UNSET
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


@dataclass(frozen=True, slots=True)
class TextDelta:
    """The text that the model generated since the previous chunk."""

    text: str


@dataclass(frozen=True, slots=True)
class CompletionEnd:
    """The end of a completion, with its tool calls.

    ``exact`` is false when ``usage`` is an upper bound instead of the provider's count.
    """

    finish_reason: FinishReason
    usage: ChatUsage
    exact: bool = True
    tool_calls: tuple[ToolCall, ...] = ()


ModelStreamChunk = TextDelta | CompletionEnd


class ChatModel(Protocol):
    """A chat model."""

    @property
    def name(self) -> str:
        """Return the model's name, e.g. ``qwen2.5-coder-0.5b`` or ``openai:gpt-4o-mini``."""
        ...

    @property
    def context_tokens(self) -> int:
        """Return the context: the most tokens of prompt and completion together."""
        ...

    async def count_tokens(self, messages: Sequence[ChatMessage]) -> int:
        """Return the prompt's tokens with its template: exact with a local tokenizer, else an upper bound."""
        ...

    def stream(self, request: ChatRequest) -> AsyncGenerator[ModelStreamChunk]:
        """Stream a completion: text deltas, then one :class:`CompletionEnd`.

        Closing the generator, or cancelling the task that iterates it, stops the generation; use
        ``contextlib.aclosing``. Raises :class:`octollm.errors.OctoError`: ``context_too_long``, ``overloaded``,
        ``invalid_body``, ``no_model``, ``model_failed``.
        """
        ...

    async def aclose(self) -> None:
        """Release the model's resources; running generations end with ``model_failed``. Idempotent."""
        ...


def bound_prompt_tokens(messages: Sequence[ChatMessage]) -> int:
    """Return an upper bound of the tokens of ``messages``: no tokenizer makes more tokens than there are UTF-8 bytes.

    Sixteen tokens per message, and sixteen more, allow for the chat template.
    """
    calls = (call.function for message in messages for call in message.tool_calls or ())
    return (
        16
        + sum(16 + len(message.text.encode("utf-8", "surrogatepass")) for message in messages)
        + sum(MAX_IMAGE_TOKENS[part.image_url.detail] for message in messages for part in message.images)
        + sum(16 + len(call.name) + len(call.arguments.encode("utf-8", "surrogatepass")) for call in calls)
    )


def bound_tool_tokens(request: ChatRequest) -> int:
    """Return an upper bound of the tokens that describe a request's tools in the prompt: their bytes as JSON."""
    return len(msgspec.json.encode(request.tools)) if request.tools else 0
