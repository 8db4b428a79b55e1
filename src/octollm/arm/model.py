"""The model, as an arm sees it: messages in, text out, streamed, counted and budgeted by ``models``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from octollm.contracts.problems import Problem
from octollm.contracts.task import Usage
from octollm.errors import OctoError
from octollm.rpc.caller import Caller, Outgoing
from octollm.rpc.http import Streamed, TransportError
from octollm.rpc.problems import error_of

OnText = Callable[[str], Awaitable[None]]
_MAX_EVENT = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Completion:
    """What the model wrote. ``finish_reason`` is ``length`` when it was cut at the limit."""

    text: str
    finish_reason: str
    usage: Usage
    model: str


class _Delta(msgspec.Struct, frozen=True):
    content: str | None = None


class _Choice(msgspec.Struct, frozen=True):
    delta: _Delta = _Delta()
    finish_reason: str | None = None


class _Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float = 0.0


class _Chunk(msgspec.Struct, frozen=True):
    choices: tuple[_Choice, ...] = ()
    usage: _Usage | None = None
    model: str = ""
    error: Problem | None = None


@dataclass(slots=True)
class Meter:
    """What the models were used for in one call of an arm."""

    usage: Usage = field(default_factory=Usage)

    def add(self, usage: Usage) -> None:
        """Count ``usage``."""
        self.usage = self.usage + usage


class ModelClient:
    """Calls ``models`` in the OpenAI protocol. ``outgoing`` turns a body into a call with the authority for it."""

    def __init__(self, caller: Caller, outgoing: Callable[[bytes], Awaitable[Outgoing]], meter: Meter) -> None:
        self._caller = caller
        self._outgoing = outgoing
        self._meter = meter

    async def chat(
        self,
        messages: Sequence[tuple[str, str]],
        *,
        max_tokens: int | None = None,
        schema: dict[str, Any] | None = None,
        temperature: float = 0.0,
        seed: int = 0,
        on_text: OnText | None = None,
    ) -> Completion:
        """Ask the model; ``messages`` are (role, content). With ``schema`` the answer is JSON that fits it.

        ``on_text`` is given each piece as it is written. Raises ``budget_exhausted``, ``no_model``,
        ``model_failed`` and the transport's failures.
        """
        request: dict[str, Any] = {
            "model": "default",
            "messages": [{"role": role, "content": content} for role, content in messages],
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
        outgoing = await self._outgoing(msgspec.json.encode(request))

        heard = _Heard(on_text)

        async def consume(streamed: Streamed) -> Completion:
            heard.begin()
            return await _read(streamed, heard)

        completion = await self._caller.stream(outgoing, consume)
        self._meter.add(completion.usage)
        return completion


class _Heard:
    """Hands text on once: a call that is made again after it broke begins with what was heard already."""

    def __init__(self, on_text: OnText | None) -> None:
        self._on_text = on_text
        self._heard = 0
        self._at = 0

    def begin(self) -> None:
        """Begin an answer."""
        self._at = 0

    async def hear(self, text: str) -> None:
        """Take a piece of the answer, and hand on what is new of it."""
        self._at += len(text)
        new = self._at - self._heard
        if self._on_text is not None and new > 0:
            self._heard = self._at
            await self._on_text(text[-new:])


async def _read(streamed: Streamed, heard: _Heard) -> Completion:
    text: list[str] = []
    finish, usage, model = "stop", Usage(), ""
    async for data in _events(streamed.chunks):
        if data == b"[DONE]":
            return Completion("".join(text), finish, usage, model)
        try:
            chunk = msgspec.json.decode(data, type=_Chunk)
        except msgspec.DecodeError as error:
            raise OctoError("models sent a chunk that is not understood.", code="peer_protocol") from error
        if chunk.error is not None:
            raise error_of(chunk.error, "models")
        model = chunk.model or model
        if chunk.usage is not None:
            usage = Usage(chunk.usage.prompt_tokens, chunk.usage.completion_tokens, chunk.usage.cost_usd)
        for choice in chunk.choices:
            finish = choice.finish_reason or finish
            if choice.delta.content:
                text.append(choice.delta.content)
                await heard.hear(choice.delta.content)
    raise TransportError("models ended its answer early.", code="connection_lost", began=True)


async def _events(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield the data of server-sent events (WHATWG HTML section 9.2), one line of data each."""
    rest = b""
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) > _MAX_EVENT:
            raise OctoError("models sent a line that is too long.", code="peer_protocol")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()
