"""Input for a model: messages, images, and the tools that it may call."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from octollm.errors import OctoError
from octollm.rpc.codec import decode

Role = Literal["system", "user", "assistant", "tool"]
ImageType = Literal["image/png", "image/jpeg", "image/gif", "image/webp"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Image:
    """An image in a message. ``detail="high"`` gives a higher resolution, and costs more tokens."""

    data: bytes
    media_type: ImageType = "image/png"
    detail: Literal["low", "high"] = "low"

    def to_part(self) -> dict[str, object]:
        """Return the image as a content part of OpenAI's chat format."""
        url = f"data:{self.media_type};base64,{b64encode(self.data).decode()}"
        return {"type": "image_url", "image_url": {"url": url, "detail": self.detail}}


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool call that the model requests. ``arguments`` is unparsed JSON; :meth:`Tool.arguments_of` decodes it."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Tool(Generic[T]):
    """A function that the model may request to call, with arguments of the type ``parameters``.

    ``parameters`` is a dataclass, a msgspec Struct or a Pydantic model; its JSON schema is sent to the model.
    """

    name: str
    parameters: type[T]
    description: str = ""

    def arguments_of(self, call: ToolCall) -> T:
        """Return the arguments of a call; raise ``model_output_invalid`` when they do not fit ``parameters``."""
        try:
            return decode(call.arguments.encode(), self.parameters)
        except OctoError as error:
            raise OctoError(
                f"The model called {self.name} with arguments that do not fit {self.parameters.__name__}.",
                code="model_output_invalid",
                field_errors=error.field_errors,
            ) from error


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation, created by the class method of its role."""

    role: Role
    content: str = ""
    images: tuple[Image, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""

    @classmethod
    def system(cls, content: str) -> Message:
        """Return instructions for the whole conversation."""
        return cls("system", content)

    @classmethod
    def user(cls, content: str, *, images: Sequence[Image] = ()) -> Message:
        """Return a message of the user, with images for a model that supports them."""
        return cls("user", content, tuple(images))

    @classmethod
    def assistant(cls, content: str = "", *, tool_calls: Sequence[ToolCall] = ()) -> Message:
        """Return an earlier answer of the model, with its tool calls."""
        return cls("assistant", content, tool_calls=tuple(tool_calls))

    @classmethod
    def tool(cls, call: ToolCall, result: str) -> Message:
        """Return the result of a tool that the model called."""
        return cls("tool", result, tool_call_id=call.id)

    def to_chat(self) -> dict[str, Any]:
        """Return the message in OpenAI's chat format."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.images:
            message["content"] = [{"type": "text", "text": self.content}, *(image.to_part() for image in self.images)]
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.tool_calls
            ]
        if self.tool_call_id:
            message["tool_call_id"] = self.tool_call_id
        return message


def tool_to_chat(tool: Tool[Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool in OpenAI's chat format; ``schema`` is that of its parameters."""
    function: dict[str, Any] = {"name": tool.name, "parameters": dict(schema)}
    if tool.description:
        function["description"] = tool.description
    return {"type": "function", "function": function}
