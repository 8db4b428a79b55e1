"""Parsing of the model's answer: streamed chat chunks and problem documents.

`models` streams OpenAI chat completion chunks as server-sent events, which are combined into one ModelCompletion. If
the author uses another client, its exceptions carry the problem document, which is extracted from them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import msgspec

from octollm.arm.messages import ToolCall
from octollm.contracts.problems import ERROR_KINDS, Problem
from octollm.contracts.task import Usage
from octollm.errors import OctoError, RemoteError
from octollm.framing import LineTooLongError, iter_sse
from octollm.rpc.http_client import StreamedResponse, TransportError
from octollm.rpc.problems import remote_error

_MAX_CAUSES = 8
"""The maximum length of an exception's chain of causes."""


def extract_problem(error: BaseException | None) -> RemoteError | None:
    """Return the problem document of ``models`` that caused ``error``, or ``None``.

    An exception of OpenAI's SDK has it as the content of its ``response``: its ``body`` is only the member ``error``.
    """
    for _ in range(_MAX_CAUSES):
        if error is None:
            return None
        problem = _read_problem(error)
        if problem is None:
            error = error.__cause__ or error.__context__
            continue
        # The error body of another server may have the same members, so only our own codes are accepted.
        return remote_error(problem, "models") if problem.code in ERROR_KINDS else None
    return None


def _read_problem(error: BaseException) -> Problem | None:
    try:
        content: object = getattr(getattr(error, "response", None), "content", None)
        if isinstance(content, bytes):
            return msgspec.json.decode(content, type=Problem)
        return msgspec.convert(getattr(error, "body", None), Problem)
    except (msgspec.DecodeError, RuntimeError):  # httpx: a response that was not read is a RuntimeError
        return None


OnText = Callable[[str], Awaitable[None]]
_MAX_EVENT_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class ModelCompletion:
    """The text of the model, and the tool calls that it requests.

    ``finish_reason`` is ``length`` when the text was cut at the limit, ``content_filter`` when the provider's filter
    withheld the rest, ``tool_calls`` when tools are to be called.
    """

    text: str
    finish_reason: str
    usage: Usage
    model: str
    tool_calls: tuple[ToolCall, ...] = ()


def check_not_filtered(completion: ModelCompletion) -> None:
    """Raise ``OctoError`` (``model_output_filtered``) for an answer that the provider's filter withheld."""
    if completion.finish_reason == "content_filter":
        raise OctoError("The provider's content filter withheld the model's answer.", code="model_output_filtered")


def check_whole(completion: ModelCompletion, max_tokens: int | None) -> None:
    """Raise ``OctoError`` for an answer that is not whole; one cut at the caller's own ``max_tokens`` is what it wants.

    The codes are ``model_output_filtered`` and ``model_output_truncated``.
    """
    check_not_filtered(completion)
    if completion.finish_reason == "length" and max_tokens is None:
        raise OctoError(
            f"The model's answer was cut at {completion.usage.completion_tokens} tokens.",
            code="model_output_truncated",
        )


class _Function(msgspec.Struct, frozen=True):
    name: str
    arguments: str


class _ToolCall(msgspec.Struct, frozen=True):
    id: str
    function: _Function


class _Delta(msgspec.Struct, frozen=True):
    content: str | None = None
    tool_calls: tuple[_ToolCall, ...] | None = None


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


class TextDeduplicator:
    """Delivers text once: after a broken connection the call is repeated, and its stream starts from the beginning."""

    def __init__(self, on_text: OnText | None) -> None:
        self._on_text = on_text
        self._delivered = 0
        self._position = 0

    def start(self) -> None:
        """Start an answer, or its repetition."""
        self._position = 0

    async def write(self, text: str) -> None:
        """Deliver the part of a piece that was not delivered before."""
        self._position += len(text)
        new = self._position - self._delivered
        if self._on_text is not None and new > 0:
            self._delivered = self._position
            await self._on_text(text[-new:])


async def read_completion(streamed: StreamedResponse, sink: TextDeduplicator) -> ModelCompletion:
    """Read a streamed answer to its end; raise the error that it reports, and ``connection_lost`` if it is cut off."""
    text: list[str] = []
    tool_calls: list[ToolCall] = []
    finish, usage, model = "stop", Usage(), ""
    async for data in _iter_events(streamed.chunks):
        if data == b"[DONE]":
            return ModelCompletion("".join(text), finish, usage, model, tuple(tool_calls))
        try:
            chunk = msgspec.json.decode(data, type=_Chunk)
        except msgspec.DecodeError as error:
            raise OctoError("models sent a malformed chunk.", code="peer_protocol") from error
        if chunk.error is not None:
            raise remote_error(chunk.error, "models")
        model = chunk.model or model
        if chunk.usage is not None:
            usage = Usage(chunk.usage.prompt_tokens, chunk.usage.completion_tokens, chunk.usage.cost_usd)
        for choice in chunk.choices:
            finish = choice.finish_reason or finish
            # Unlike OpenAI, `models` sends each tool call complete in one chunk, so no fragments need to be joined.
            calls = choice.delta.tool_calls or ()
            tool_calls.extend(ToolCall(call.id, call.function.name, call.function.arguments) for call in calls)
            if choice.delta.content:
                text.append(choice.delta.content)
                await sink.write(choice.delta.content)
    raise TransportError("models ended its answer early.", code="connection_lost", request_sent=True)


async def _iter_events(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    try:
        async for data in iter_sse(chunks, _MAX_EVENT_BYTES):
            if data is not None:
                yield data
    except LineTooLongError as error:
        raise OctoError("models sent a line that is too long.", code="peer_protocol") from error
