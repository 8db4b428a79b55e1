"""The model client of an arm.

Messages in, text out: whole, streamed, or structured by a strict JSON schema; tool calls; and the usage added up.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast

import msgspec

from octollm.arm.completion import ModelCompletion, OnText, TextDeduplicator, read_completion
from octollm.arm.messages import Message, Tool, tool_to_chat
from octollm.contracts.task import Usage
from octollm.errors import OctoError
from octollm.rpc.client import OutgoingCall, ServiceClient
from octollm.rpc.codec import decode, json_schemas
from octollm.rpc.http_client import StreamedResponse

T = TypeVar("T")
ToolChoice = Literal["auto", "none", "required"] | Tool[Any]

_MAX_QUEUED = 64
"""Pieces by which the model may be ahead of its reader."""


@dataclass(frozen=True, slots=True)
class ModelEndpoint:
    """Where any OpenAI client finds the models. ``api_key`` is this call's narrowed authority: it ends with it.

    ``headers`` say which work a request belongs to, and when that ends.
    """

    base_url: str
    api_key: str = field(repr=False)
    headers: Mapping[str, str]


class ModelClient:
    """Calls ``models`` in the OpenAI protocol. ``prepare_call`` turns a body into a call with the authority for it.

    Every method raises ``authority_missing`` where the arm does not declare ``models:chat``, ``budget_exhausted``,
    ``no_model``, ``context_too_long``, ``model_failed`` and the transport's failures. ``usage`` is what was used so
    far by this call.
    """

    def __init__(
        self,
        caller: ServiceClient,
        prepare_call: Callable[[bytes], Awaitable[OutgoingCall]],
        endpoint: Callable[[], Awaitable[ModelEndpoint]],
    ) -> None:
        self._caller = caller
        self._prepare_call = prepare_call
        self._endpoint = endpoint
        self._running: set[asyncio.Task[ModelCompletion]] = set()
        self.usage = Usage()

    async def complete(
        self, prompt: str, *, system: str = "", max_tokens: int | None = None, temperature: float = 0.0, seed: int = 0
    ) -> str:
        """Return the model's answer to one prompt. ``temperature`` is 0 to 2; ``seed`` makes other answers."""
        messages = _messages(prompt, system)
        return (await self.chat(messages, max_tokens=max_tokens, temperature=temperature, seed=seed)).text

    async def structured(
        self,
        prompt: str,
        answer: type[T],
        *,
        system: str = "",
        max_tokens: int | None = None,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> T:
        """Return the model's answer as an ``answer``: a dataclass, a Struct or a Pydantic model.

        The model is held to its JSON schema. Raises ``model_output_invalid`` when the answer does not fit all the
        same, as when it was cut at ``max_tokens``.
        """
        completion = await self.chat(
            _messages(prompt, system),
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            schema=strict_schema(answer),
        )
        try:
            return decode(completion.text.encode(), answer)
        except OctoError as error:
            cut = " It was cut at the token limit." if completion.finish_reason == "length" else ""
            raise OctoError(
                f"The model's answer does not fit {getattr(answer, '__name__', answer)}.{cut}",
                code="model_output_invalid",
                field_errors=error.field_errors,
            ) from error

    async def stream(
        self, prompt: str, *, system: str = "", max_tokens: int | None = None, temperature: float = 0.0, seed: int = 0
    ) -> AsyncGenerator[str]:
        """Yield the model's answer to one prompt as it is written; leaving the loop stops the model."""
        pieces: asyncio.Queue[str | None] = asyncio.Queue(_MAX_QUEUED)

        async def run_chat() -> ModelCompletion:
            try:
                return await self.chat(
                    _messages(prompt, system),
                    max_tokens=max_tokens,
                    temperature=temperature,
                    seed=seed,
                    on_text=pieces.put,
                )
            finally:
                # Wakes the reader at the end. Without room for it there are pieces to read, or nobody reads any more.
                with contextlib.suppress(asyncio.QueueFull):
                    pieces.put_nowait(None)

        task = asyncio.create_task(run_chat())
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        try:
            while (piece := await _next_piece(pieces, task)) is not None:
                yield piece
            await task
        finally:
            await _cancel_and_wait(task)

    async def chat(
        self,
        messages: Sequence[Message | tuple[str, str]],
        *,
        max_tokens: int | None = None,
        schema: dict[str, Any] | None = None,
        tools: Sequence[Tool[Any]] = (),
        tool_choice: ToolChoice = "auto",
        temperature: float = 0.0,
        seed: int = 0,
        on_text: OnText | None = None,
    ) -> ModelCompletion:
        """Ask the model; a message may also be a pair of role and content.

        With ``schema`` the answer is JSON that fits it. With ``tools`` it may be ``tool_calls`` instead of text:
        ``tool_choice`` is ``auto``, ``none``, ``required`` for any of them, or the one that must be called. ``on_text``
        is called with each piece as it is written. Raises ``no_model`` for images where the model reads none.
        """
        request: dict[str, Any] = {
            "model": "default",
            "messages": [
                message.to_chat() if isinstance(message, Message) else {"role": message[0], "content": message[1]}
                for message in messages
            ],
            "temperature": temperature,
            "seed": seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if max_tokens is not None:
            request["max_completion_tokens"] = max_tokens
        if schema is not None:
            request["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": schema, "strict": True},
            }
        if tools:
            request["tools"] = [tool_to_chat(tool, strict_schema(tool.parameters)) for tool in tools]
            request["tool_choice"] = (
                {"type": "function", "function": {"name": tool_choice.name}}
                if isinstance(tool_choice, Tool)
                else tool_choice
            )
        outgoing = await self._prepare_call(msgspec.json.encode(request))

        sink = TextDeduplicator(on_text)

        async def consume(streamed: StreamedResponse) -> ModelCompletion:
            sink.start()
            return await read_completion(streamed, sink)

        completion = await self._caller.stream(outgoing, consume)
        self.add_usage(completion.usage)
        return completion

    async def endpoint(self) -> ModelEndpoint:
        """Return ``base_url``, ``api_key`` and ``headers`` for an OpenAI client of one's own.

        Its calls are budgeted, journaled and cancelled like those of this client. The key lives as long as this
        call may, opens nothing but ``models:chat``, and must not be kept.
        """
        return await self._endpoint()

    def add_usage(self, usage: Usage) -> None:
        """Count what a client of one's own used, so that the result tells it. The budget knows it anyway."""
        self.usage = self.usage + usage

    async def aclose(self) -> None:
        """Stop what still runs: a stream that was left open does not outlive its call."""
        for task in tuple(self._running):
            await _cancel_and_wait(task)


async def _next_piece(pieces: asyncio.Queue[str | None], task: asyncio.Task[ModelCompletion]) -> str | None:
    """Return the next piece; ``None`` once there is none left and the answer has ended."""
    if pieces.empty() and task.done():
        return None
    return await pieces.get()


async def _cancel_and_wait(task: asyncio.Task[ModelCompletion]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, OctoError):  # its failure was raised where it was awaited
        await task


def _messages(prompt: str, system: str) -> list[tuple[str, str]]:
    return [("system", system), ("user", prompt)] if system else [("user", prompt)]


_REF_PREFIX = "#/components/schemas/"


def strict_schema(kind: object) -> dict[str, Any]:
    """Return the strict JSON schema of ``kind``, self-contained with ``$defs``; raise ``TypeError`` if it has none.

    Strict is what providers ask for: every property required, no further ones, no defaults.
    """
    [schema], components = json_schemas([kind])
    root = str(schema.get("$ref", "")).removeprefix(_REF_PREFIX)
    if root:
        schema = components[root]
    shared = {
        name: _make_strict(component)
        for name, component in components.items()
        if _is_referenced(name, schema, components)
    }
    strict: dict[str, Any] = _make_strict(schema)
    return {**strict, "$defs": shared} if shared else strict


def _is_referenced(name: str, schema: object, components: dict[str, Any]) -> bool:
    """Say whether ``schema``, or what it refers to, refers to the component ``name``."""
    seen: set[str] = set()
    waiting = [schema]
    while waiting:
        for ref in _find_refs(waiting.pop()):
            if ref == name:
                return True
            if ref not in seen:
                seen.add(ref)
                waiting.append(components[ref])
    return False


def _find_refs(schema: object) -> list[str]:
    if isinstance(schema, list):
        return [ref for item in cast("list[object]", schema) for ref in _find_refs(item)]
    if not isinstance(schema, dict):
        return []
    members = cast("dict[str, object]", schema)
    own = members.get("$ref")
    refs = [own.removeprefix(_REF_PREFIX)] if isinstance(own, str) and own.startswith(_REF_PREFIX) else []
    return refs + [ref for item in members.values() for ref in _find_refs(item)]


def _make_strict(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_make_strict(item) for item in cast("list[Any]", schema)]
    if not isinstance(schema, dict):
        return schema
    members = cast("dict[str, Any]", schema)
    made: dict[str, Any] = {}
    for name, item in members.items():
        if name == "properties":  # below it are the author's names, not the schema's
            made[name] = {own: _make_strict(member) for own, member in item.items()}
        elif name == "$ref":
            made[name] = "#/$defs/" + item.removeprefix(_REF_PREFIX)
        elif name != "default":
            made[name] = _make_strict(item)
    if made.get("type") == "object" and "properties" in made:
        made["additionalProperties"] = False
        made["required"] = list(made["properties"])
    return made
