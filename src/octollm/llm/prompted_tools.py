"""Tool calling for a model without native support.

The tools are described in the prompt, and the reply is constrained to a JSON schema: one call, or the answer.
"""

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
    """Return whether ``request`` has tools and allows the model to call them."""
    return bool(request.tools) and request.tool_choice != "none"


async def stream_with_tools(
    stream: StreamFunction, request: ChatRequest, call_id: str
) -> AsyncGenerator[ModelStreamChunk]:
    """Stream a completion with tools by ``stream``, which has none; see :class:`octollm.llm.types.ChatModel`.

    ``call_id`` becomes the id of a tool call. Raises ``model_failed`` when the reply is neither a call nor an answer.
    """
    text = ""
    async with aclosing(stream(build_prompted_request(request))) as pieces:
        async for piece in pieces:
            if isinstance(piece, TextDelta):
                text += piece.text
                continue
            reply = _parse_reply(text)
            if reply is None and piece.finish_reason == "length":
                yield piece
            elif reply is None:
                raise OctoError("The model's answer has neither a tool call nor a text.", code="model_failed")
            elif reply.tool:
                call = ToolCall(call_id, FunctionCall(reply.tool, bytes(reply.arguments).decode()))
                yield CompletionEnd("tool_calls", piece.usage, piece.exact, (call,))
            else:
                yield TextDelta(reply.answer)
                yield piece


def build_prompted_request(request: ChatRequest) -> ChatRequest:
    """Return a request without tools whose reply is one JSON object: a call, or the answer itself."""
    tools = _allowed_tools(request)
    may_answer = not isinstance(request.tool_choice, ToolChoice) and request.tool_choice != "required"
    schema = _schema(tools, answer=may_answer)
    rules = ["Answer with one JSON object, one of these:", *(_describe_function(tool.function) for tool in tools)]
    if may_answer:
        has_result = request.messages[-1].role == "tool"
        # A prompt for a small model: its wording was chosen by measurement.
        small_talk = "Only for small talk, and for what none of the above can do."
        rules.append(f'- {{"answer": "…"}}  {"Tells what the tool found." if has_result else small_talk}')
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
    """Return a line that shows the JSON of a call of ``function`` with its description."""
    properties = _mapping(_mapping(function.parameters).get("properties"))
    arguments = ", ".join(f'"{name}": {_placeholder(_mapping(schema))}' for name, schema in properties.items())
    return f'- {{"tool": "{function.name}", "arguments": {{{arguments}}}}}  {function.description or ""}'.rstrip()


def _placeholder(schema: Mapping[str, Any]) -> str:
    values = schema.get("enum")
    if isinstance(values, list) and values:
        return " | ".join(msgspec.json.encode(value).decode() for value in cast("list[object]", values))
    description = schema.get("description")
    return f"… ({description})" if description else "…"


def _mapping(value: object) -> Mapping[str, Any]:
    """Return ``value`` if it is a JSON object, else an empty one: the schema comes from the caller, unchecked."""
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
        schema_of_tool = tool.function.parameters or {"type": "object", "properties": {}}
        # Closed by default: a small model invents members wherever the schema allows them.
        parameters: dict[str, Any] = {"additionalProperties": False, **schema_of_tool}
        # `$ref` is resolved from the root of the combined schema, so the definitions move there.
        shared.update(parameters.pop("$defs", {}))
        forms.append(_object({"tool": {"const": tool.function.name}, "arguments": parameters}))
    if answer:
        forms.append(_object({"answer": {"type": "string", "minLength": 1}}))
    schema: dict[str, object] = {"anyOf": forms}
    return {**schema, "$defs": shared} if shared else schema


def _object(members: Mapping[str, object]) -> dict[str, object]:
    return {"type": "object", "properties": members, "required": list(members), "additionalProperties": False}


def flatten_tool_messages(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Return ``messages`` with tool calls and results rewritten as plain assistant and user messages."""
    plain: list[ChatMessage] = []
    names: dict[str | None, str] = {}
    for message in messages:
        if message.role == "tool":
            name = names.get(message.tool_call_id, "the tool")
            plain.append(ChatMessage("user", f"Result of {name}: {message.text}"))
        elif message.tool_calls:
            for call in message.tool_calls:
                names[call.id] = call.function.name
                text = f'{{"tool": "{call.function.name}", "arguments": {call.function.arguments or "{}"}}}'
                plain.append(ChatMessage("assistant", text))
        else:
            plain.append(message)
    return plain


def _parse_reply(text: str) -> _Reply | None:
    try:
        reply = msgspec.json.decode(text, type=_Reply)
    except msgspec.DecodeError:
        return None
    return reply if reply.tool or reply.answer else None
