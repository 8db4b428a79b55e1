"""Tool calling for a model that has none of its own: tools are described in the prompt and the reply is constrained to a JSON schema."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, cast

import msgspec

from octollm.errors import OctoError
from octollm.llm.types import (
    ChatMessage,
    ChatRequest,
    CompletionEnd,
    Function,
    FunctionCall,
    JsonSchemaFormat,
    ModelStreamChunk,
    ResponseFormat,
    TextDelta,
    Tool,
    ToolCall,
    ToolChoice,
)

StreamFunction = Callable[[ChatRequest], AsyncGenerator[ModelStreamChunk]]


class _Reply(msgspec.Struct, frozen=True):
    tool: str = ""
    arguments: msgspec.Raw = msgspec.Raw(b"{}")
    answer: str = ""


def allows_tools(request: ChatRequest) -> bool:
    """Say whether the model may call a tool to answer ``request``."""
    return bool(request.tools) and request.tool_choice != "none"


async def stream_with_tools(
    stream: StreamFunction, request: ChatRequest, call_id: str
) -> AsyncGenerator[ModelStreamChunk]:
    """Answer ``request`` by ``stream``, which knows nothing of tools; see :class:`octollm.llm.types.ChatModel`.

    ``call_id`` names the call, if it comes to one. Raises ``model_failed`` where the answer fits no tool, as when it
    was cut.
    """
    text = ""
    async with aclosing(stream(build_prompted_request(request))) as pieces:
        async for piece in pieces:
            if isinstance(piece, TextDelta):
                text += piece.text
                continue
            said = _read(text)
            if said is None and piece.finish_reason == "length":
                yield piece
            elif said is None:
                raise OctoError("The model's answer calls no tool and says nothing.", code="model_failed")
            elif said.tool:
                call = ToolCall(call_id, FunctionCall(said.tool, bytes(said.arguments).decode()))
                yield CompletionEnd("tool_calls", piece.usage, piece.exact, (call,))
            else:
                yield TextDelta(said.answer)
                yield piece


def build_prompted_request(request: ChatRequest) -> ChatRequest:
    """Return a request without tools whose answer is one JSON object: a call, or the answer itself."""
    tools = _allowed_tools(request)
    last = not isinstance(request.tool_choice, ToolChoice) and request.tool_choice != "required"
    schema = _schema(tools, answer=last)
    rules = ["Answer with one JSON object, one of these:", *(_describe_function(tool.function) for tool in tools)]
    if last:
        told = request.messages[-1].role == "tool"
        when = "Tells what the tool found." if told else "Only for small talk, and for what none of the above can do."
        rules.append(f'- {{"answer": "…"}}  {when}')
    return msgspec.structs.replace(
        request,
        messages=_with_rules(request.messages, "\n".join(rules)),
        tools=(),
        tool_choice=None,
        parallel_tool_calls=None,
        response_format=ResponseFormat("json_schema", JsonSchemaFormat(schema, "step", strict=True)),
    )


def _with_rules(messages: tuple[ChatMessage, ...], rules: str) -> tuple[ChatMessage, ...]:
    first, rest = messages[0], messages[1:]
    if first.role not in {"system", "developer"}:
        return (ChatMessage("system", rules), *messages)
    return (ChatMessage("system", f"{first.text}\n\n{rules}"), *rest)


def _describe_function(function: Function) -> str:
    """Return a call of ``function`` as it is to be written, and what it does."""
    properties = _mapping(_mapping(function.parameters).get("properties"))
    given = ", ".join(f'"{name}": {_value(_mapping(declared))}' for name, declared in properties.items())
    return f'- {{"tool": "{function.name}", "arguments": {{{given}}}}}  {function.description or ""}'.rstrip()


def _value(declared: Mapping[str, Any]) -> str:
    values = declared.get("enum")
    if isinstance(values, list) and values:
        return " | ".join(msgspec.json.encode(value).decode() for value in cast("list[object]", values))
    description = declared.get("description")
    return f"… ({description})" if description else "…"


def _mapping(value: object) -> Mapping[str, Any]:
    """Return an object of a schema that somebody sent; whatever is none has no members."""
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _allowed_tools(request: ChatRequest) -> tuple[Tool, ...]:
    choice = request.tool_choice
    if isinstance(choice, ToolChoice):
        return tuple(tool for tool in request.tools if tool.function.name == choice.function.name)
    return request.tools


def _schema(tools: tuple[Tool, ...], *, answer: bool) -> dict[str, object]:
    shared: dict[str, Any] = {}
    forms: list[dict[str, object]] = []
    for tool in tools:
        given = tool.function.parameters or {"type": "object", "properties": {}}
        # What is left open, a small model fills with whatever comes to it.
        parameters: dict[str, Any] = {"additionalProperties": False, **given}
        # A reference is resolved from the root of the whole schema.
        shared.update(parameters.pop("$defs", {}))
        forms.append(_object({"tool": {"const": tool.function.name}, "arguments": parameters}))
    if answer:
        forms.append(_object({"answer": {"type": "string", "minLength": 1}}))
    schema: dict[str, object] = {"anyOf": forms}
    return {**schema, "$defs": shared} if shared else schema


def _object(members: Mapping[str, object]) -> dict[str, object]:
    return {"type": "object", "properties": members, "required": list(members), "additionalProperties": False}


def flatten_tool_messages(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Return messages that speak of tools as a model without them understands them."""
    told: list[ChatMessage] = []
    names: dict[str | None, str] = {}
    for message in messages:
        if message.role == "tool":
            told.append(ChatMessage("user", f"Result of {names.get(message.tool_call_id, 'the tool')}: {message.text}"))
        elif message.tool_calls:
            for call in message.tool_calls:
                names[call.id] = call.function.name
                said = f'{{"tool": "{call.function.name}", "arguments": {call.function.arguments or "{}"}}}'
                told.append(ChatMessage("assistant", said))
        else:
            told.append(message)
    return told


def _read(text: str) -> _Reply | None:
    try:
        said = msgspec.json.decode(text, type=_Reply)
    except msgspec.DecodeError:
        return None
    return said if said.tool or said.answer else None
