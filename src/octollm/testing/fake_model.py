"""Fake models with scripted answers.

FakeModel works in process; ScriptedModel is an OpenAI-compatible provider on a socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import zlib
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from octollm.errors import OctoError, RemoteError
from octollm.framing import encode_sse
from octollm.llm.types import (
    ChatMessage,
    ChatRequest,
    ChatUsage,
    CompletionEnd,
    FunctionCall,
    ModelStreamChunk,
    TextDelta,
    ToolCall,
    bound_tool_tokens,
)
from octollm.rpc.codec import encode
from octollm.rpc.transport import listen, serve_app

_CHUNK_CHARS = 8
"""Characters of one piece."""


@dataclass(frozen=True, slots=True)
class ToolUse:
    """An answer of the model that requests a tool call."""

    name: str
    arguments: Mapping[str, object] = field(default_factory=dict[str, object])


FakeAnswer = object
"""Text; :class:`ToolUse`; an ``OctoError``, which is raised; anything else is written as JSON."""
FakeAnswers = Iterable[FakeAnswer] | Callable[[ChatRequest], FakeAnswer]
"""Answers in order, or a function from what is asked to its answer."""


class FakeModel:
    """Answers as it is told; counts a word as a token. ``asked`` has every request. One text is one answer."""

    name = "fake"
    context_tokens = 100_000

    def __init__(self, answers: FakeAnswers = ()) -> None:
        self._answers: Callable[[ChatRequest], FakeAnswer] | Iterator[FakeAnswer]
        self._answers = answers if callable(answers) else iter([answers] if isinstance(answers, str) else answers)
        self.requests: list[ChatRequest] = []

    @property
    def prompts(self) -> list[str]:
        """Return the last message of each request."""
        return [request.messages[-1].text for request in self.requests]

    async def count_tokens(self, messages: Sequence[ChatMessage]) -> int:
        """Count words."""
        return sum(len(message.text.split()) for message in messages)

    async def stream(self, request: ChatRequest) -> AsyncGenerator[ModelStreamChunk]:
        """Write the next answer in pieces; see :class:`octollm.llm.types.ChatModel`."""
        self.requests.append(request)
        answer = self._next(request)
        if isinstance(answer, OctoError):
            raise answer
        prompt = await self.count_tokens(request.messages) + bound_tool_tokens(request)
        if isinstance(answer, ToolUse):
            call = FunctionCall(answer.name, encode(dict(answer.arguments)).decode())
            calls = (ToolCall(f"call-{len(self.requests)}", call),)
            yield CompletionEnd("tool_calls", ChatUsage.of(prompt, len(call.arguments.split())), tool_calls=calls)
            return
        text = answer if isinstance(answer, str) else encode(answer).decode()
        words = text.split()
        cut = request.completion_limit is not None and len(words) > request.completion_limit
        if cut:
            words = words[: request.completion_limit]
            text = " ".join(words)
        for start in range(0, len(text), _CHUNK_CHARS):
            yield TextDelta(text[start : start + _CHUNK_CHARS])
        yield CompletionEnd("length" if cut else "stop", ChatUsage.of(prompt, len(words)))

    async def aclose(self) -> None:
        """Free nothing."""

    def _next(self, request: ChatRequest) -> FakeAnswer:
        if callable(self._answers):
            return self._answers(request)
        for answer in self._answers:
            return answer
        return RemoteError(
            f"The test's model has no answer left; it was asked: {request.messages[-1].text[:200]!r}",
            code="model_failed",
            status=503,
            retryable=False,
        )


_LOOPBACK = "127.0.0.1"
_DEFAULT_CHUNK = 8


@dataclass(frozen=True, slots=True)
class ScriptedRequest:
    """A request to the model; ``raw`` is the whole body."""

    messages: tuple[tuple[str, str], ...]
    raw: dict[str, Any]

    @property
    def system(self) -> str:
        """Return the text of the system messages."""
        return "\n".join(text for role, text in self.messages if role == "system")

    @property
    def last(self) -> str:
        """Return the text of the last message."""
        return self.messages[-1][1] if self.messages else ""

    @property
    def schema(self) -> dict[str, Any] | None:
        """Return the JSON schema for the answer, if there is one."""
        form: dict[str, Any] = self.raw.get("response_format") or {}
        wanted: dict[str, Any] = form.get("json_schema") or {}
        return wanted.get("schema")


@dataclass(frozen=True, slots=True)
class ScriptedReply:
    """An answer. ``hangs`` writes ``text`` and then nothing more until the client leaves.

    ``release`` holds all but the first piece of the text back until the event is set.
    ``error_status`` is the HTTP status of a reply without text; with text, the stream breaks off after the text.
    ``omits_usage`` leaves out the usage. ``tool_calls`` are the requested function calls: names and arguments as JSON.
    """

    text: str = ""
    hangs: bool = False
    release: asyncio.Event | None = None
    error_status: int = 0
    finish_reason: str = "stop"
    chunk_size: int = _DEFAULT_CHUNK
    omits_usage: bool = False
    retry_after: int | None = None
    tool_calls: tuple[tuple[str, str], ...] = ()


ModelScript = Iterable[str | ScriptedReply] | Callable[[ScriptedRequest], str | ScriptedReply]
"""Answers in order, or a function from what is asked to its answer."""


@dataclass(slots=True)
class ScriptedModel:
    """The model. ``requests`` has every question; ``disconnects`` counts the clients that left before the end.

    ``embedded`` has the texts of every embeddings request. Texts that share words have similar embeddings.
    ``embedding_error`` is the status with which these requests fail, 0 for none.
    """

    script: ModelScript
    url: str = ""
    requests: list[ScriptedRequest] = field(default_factory=list[ScriptedRequest])
    disconnects: int = 0
    active: int = 0
    embedded: list[tuple[str, ...]] = field(default_factory=list[tuple[str, ...]])
    embedding_error: int = 0
    _answers: Iterator[str | ScriptedReply] | None = None

    def app(self) -> Starlette:
        """Return the application: chat completions, embeddings and the list of models, open to all."""
        return Starlette(
            routes=[
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/embeddings", self._embeddings, methods=["POST"]),
                Route("/v1/models", self._models, methods=["GET"]),
            ]
        )

    def _next(self, asked: ScriptedRequest) -> ScriptedReply:
        if callable(self.script):
            answer = self.script(asked)
        else:
            if self._answers is None:
                self._answers = iter(self.script)
            answer = next(self._answers, ScriptedReply(error_status=418))
        return ScriptedReply(answer) if isinstance(answer, str) else answer

    async def _models(self, _request: Request) -> Response:
        return _json_response({"object": "list", "data": [{"id": "scripted", "object": "model"}]})

    async def _embeddings(self, request: Request) -> Response:
        raw: dict[str, Any] = msgspec.json.decode(await request.body())
        texts: list[str] = raw["input"]
        self.embedded.append(tuple(texts))
        if self.embedding_error:
            return _json_response({"error": {"message": "scripted failure"}}, self.embedding_error)
        dimensions: int = raw.get("dimensions", _EMBEDDING_DIMENSIONS)
        data = [{"index": index, "embedding": _embed_words(text, dimensions)} for index, text in enumerate(texts)]
        tokens = sum(len(text.split()) for text in texts)
        return _json_response({"object": "list", "data": data[::-1], "usage": {"prompt_tokens": tokens}})

    async def _chat(self, request: Request) -> Response:
        raw: dict[str, Any] = msgspec.json.decode(await request.body())
        asked = ScriptedRequest(tuple((message["role"], _text_of(message)) for message in raw["messages"]), raw)
        self.requests.append(asked)
        reply = self._next(asked)
        if reply.error_status and not reply.text:
            headers = {} if reply.retry_after is None else {"Retry-After": str(reply.retry_after)}
            return _json_response(
                {"error": {"message": f"scripted failure {reply.error_status}"}}, reply.error_status, headers
            )
        if not raw.get("stream"):
            return _json_response(_completion(asked, reply))
        return _ClosingStream(self._events(asked, reply), media_type="text/event-stream")

    async def _events(self, asked: ScriptedRequest, reply: ScriptedReply) -> AsyncGenerator[bytes]:
        self.active += 1
        whole = False
        try:
            for start in range(0, len(reply.text), reply.chunk_size):
                yield _chunk_event(
                    {"choices": [{"index": 0, "delta": {"content": reply.text[start : start + reply.chunk_size]}}]}
                )
                await (reply.release.wait() if reply.release is not None else asyncio.sleep(0))
            for delta in _tool_deltas(reply):
                yield _chunk_event({"choices": [{"index": 0, "delta": {"tool_calls": [delta]}}]})
            if reply.hangs:
                await asyncio.Event().wait()
            if reply.error_status:
                whole = True
                return
            yield _chunk_event({"choices": [{"index": 0, "delta": {}, "finish_reason": reply.finish_reason}]})
            if not reply.omits_usage:
                yield _chunk_event({"choices": [], "usage": _usage(asked, reply)})
            yield b"data: [DONE]\n\n"
            whole = True
        finally:
            self.active -= 1
            self.disconnects += not whole


class _ClosingStream(StreamingResponse):
    """Closes its iterator when the client leaves between two chunks; by itself that waits for the garbage collector."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await cast("AsyncGenerator[bytes]", self.body_iterator).aclose()


_EMBEDDING_DIMENSIONS = 64


def _embed_words(text: str, dimensions: int) -> list[float]:
    vector = [0.0] * dimensions
    for word in text.lower().split():
        vector[zlib.crc32(word.strip(".,?!").encode()) % dimensions] += 1.0
    length = sum(value * value for value in vector) ** 0.5 or 1.0
    return [value / length for value in vector]


def _tool_deltas(reply: ScriptedReply) -> Iterator[dict[str, Any]]:
    """Yield the pieces of the calls: first the name, then the arguments in two halves, as providers do."""
    for index, (name, arguments) in enumerate(reply.tool_calls):
        half = len(arguments) // 2
        yield {"index": index, "id": f"call-{index}", "type": "function", "function": {"name": name, "arguments": ""}}
        for piece in (arguments[:half], arguments[half:]):
            yield {"index": index, "function": {"arguments": piece}}


def _text_of(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _usage(asked: ScriptedRequest, reply: ScriptedReply) -> dict[str, int]:
    """Count words as tokens: a test can do that too."""
    prompt = sum(len(text.split()) for _role, text in asked.messages)
    completion = len(reply.text.split())
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _completion(asked: ScriptedRequest, reply: ScriptedReply) -> dict[str, Any]:
    message = {"role": "assistant", "content": reply.text}
    choice = {"index": 0, "message": message, "finish_reason": reply.finish_reason}
    return {
        "id": "scripted",
        "object": "chat.completion",
        "model": "scripted",
        "choices": [choice],
        "usage": _usage(asked, reply),
    }


def _chunk_event(data: dict[str, Any]) -> bytes:
    chunk = {"id": "scripted", "object": "chat.completion.chunk", "created": 0, "model": "scripted", **data}
    return encode_sse(chunk)


def _json_response(data: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(data), status, media_type="application/json", headers=headers)


@contextlib.asynccontextmanager
async def scripted_model(script: ModelScript) -> AsyncGenerator[ScriptedModel]:
    """Serve a scripted model on a free port for as long as the context is open."""
    model = ScriptedModel(script)
    bound = listen(_LOOPBACK, 0, "scripted model")
    model.url = f"http://{_LOOPBACK}:{bound.getsockname()[1]}/v1"
    async with serve_app(model.app(), bound):
        yield model
