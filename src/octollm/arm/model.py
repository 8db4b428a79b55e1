"""The model client of an arm: completions (complete, streamed or structured by a JSON schema), tool calls, usage."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast

import msgspec

from octollm.arm.completion import (
    ModelCompletion,
    OnText,
    TextDeduplicator,
    check_not_filtered,
    check_whole,
    read_completion,
)
from octollm.arm.messages import Message, Tool, tool_to_chat
from octollm.contracts.task import Usage
from octollm.errors import OctoError
from octollm.rpc.client import OutgoingCall, ServiceClient
from octollm.rpc.codec import decode, json_schemas
from octollm.rpc.http_client import StreamedResponse

T = TypeVar("T")
ToolChoice = Literal["auto", "none", "required"] | Tool[Any]

_MAX_QUEUED = 64
"""Pieces of text between the model and a slow reader of :meth:`ModelClient.stream`; then the model waits."""


@dataclass(frozen=True, slots=True)
class ModelEndpoint:
    """The endpoint of ``models`` for any OpenAI client. ``api_key`` is a token for ``models:chat`` in this call only.

    ``headers`` carry correlation id, trace and deadline.
    """

    base_url: str
    api_key: str = field(repr=False)
    headers: Mapping[str, str]


class ModelClient:
    """Calls ``models`` with the OpenAI protocol. ``prepare_call`` turns a body into a call with token and key.

    Every method raises ``authority_missing`` if the arm does not declare ``models:chat``, ``budget_exhausted``,
    ``no_model``, ``context_too_long``, ``model_failed``, and transport errors. ``usage`` is the total of this call so
    far.
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
        """Return the model's answer to one prompt. ``temperature`` is 0 to 2; another ``seed`` gives another sample.

        Raises ``model_output_filtered`` where the provider's filter withheld the answer, and without ``max_tokens``
        ``model_output_truncated`` where the budget or the model's context cut it.
        """
        messages = _messages(prompt, system)
        completion = await self.chat(messages, max_tokens=max_tokens, temperature=temperature, seed=seed)
        check_whole(completion, max_tokens)
        return completion.text

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

        The model's output is constrained to its JSON schema. Raises ``model_output_invalid`` when the answer still
        does not fit, for example because it was cut off at ``max_tokens``.
        """
        completion = await self.chat(
            _messages(prompt, system),
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            schema=strict_schema(answer),
        )
        check_not_filtered(completion)
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
        """Yield the model's answer to one prompt as it arrives; leaving the loop cancels the model call.

        Raises at the end as :meth:`complete` does.
        """
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
                # Wakes the reader at the end. A full queue needs no wake-up: it has pieces to read, and when they are
                # read, ``_next_piece`` sees that the task is done.
                with contextlib.suppress(asyncio.QueueFull):
                    pieces.put_nowait(None)

        task = asyncio.create_task(run_chat())
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        try:
            while (piece := await _next_piece(pieces, task)) is not None:
                yield piece
            check_whole(await task, max_tokens)
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
        """Call the model; a message may also be a pair of role and content.

        With ``schema`` the answer is JSON that conforms to it. With ``tools`` it may have ``tool_calls`` instead of
        text: ``tool_choice`` is ``auto``, ``none``, ``required`` (any tool), or the tool that must be called.
        ``on_text`` is called with each piece of text. Raises ``no_model`` for images if the model supports none.
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
        """Return ``base_url``, ``api_key`` and ``headers`` for another OpenAI client.

        Its calls are budgeted, journaled and cancelled like those of this client. The key is valid until this call's
        deadline, for ``models:chat`` only, and must not be stored.
        """
        return await self._endpoint()

    def add_usage(self, usage: Usage) -> None:
        """Add the usage of another client, for the result's ``usage``. The budget ledger counts it by itself."""
        self.usage = self.usage + usage

    async def aclose(self) -> None:
        """Cancel running streams, so that one that was not read to its end does not outlive its call."""
        for task in tuple(self._running):
            await _cancel_and_wait(task)


async def _next_piece(pieces: asyncio.Queue[str | None], task: asyncio.Task[ModelCompletion]) -> str | None:
    """Return the next piece; ``None`` at the end of the answer."""
    if pieces.empty() and task.done():
        return None
    return await pieces.get()


async def _cancel_and_wait(task: asyncio.Task[ModelCompletion]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, OctoError):  # `stream` has raised a failure already
        await task


def _messages(prompt: str, system: str) -> list[tuple[str, str]]:
    return [("system", system), ("user", prompt)] if system else [("user", prompt)]


_REF_PREFIX = "#/components/schemas/"


def strict_schema(kind: object) -> dict[str, Any]:
    """Return the strict JSON schema of ``kind``, self-contained with ``$defs``; raise ``TypeError`` if it has none.

    Strict as OpenAI's structured outputs require: all properties required, no additional ones, no defaults.
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
    """Return whether ``schema`` refers to the component ``name``, directly or through other components."""
    visited: set[str] = set()
    pending = [schema]
    while pending:
        for ref in _find_refs(pending.pop()):
            if ref == name:
                return True
            if ref not in visited:
                visited.add(ref)
                pending.append(components[ref])
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
    strict: dict[str, Any] = {}
    for name, item in members.items():
        if name == "properties":  # below it are the author's names, not the schema's
            strict[name] = {own: _make_strict(member) for own, member in item.items()}
        elif name == "$ref":
            strict[name] = "#/$defs/" + item.removeprefix(_REF_PREFIX)
        elif name != "default":
            strict[name] = _make_strict(item)
    if strict.get("type") == "object" and "properties" in strict:
        strict["additionalProperties"] = False
        strict["required"] = list(strict["properties"])
    return strict
