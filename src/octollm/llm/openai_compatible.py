"""A model behind an OpenAI-compatible server. Nothing is retried here: retries are the caller's policy."""

from __future__ import annotations

import re
import sys
from array import array
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from urllib.parse import urlsplit

import msgspec
from pyqwest import Client, Response

from octollm.errors import OctoError, RemoteError, SettingError, map_exceptions
from octollm.framing import iter_sse
from octollm.http_transport import TRANSPORT_ERRORS, classify_failure, create_external_transport
from octollm.llm.embeddings import Embeddings, InputType
from octollm.llm.openai_protocol import (
    MAX_EVENT_BYTES,
    OpenAIChunk,
    OpenAIEmbeddings,
    OpenAIError,
    OpenAIErrorBody,
    OpenAIModelList,
    OpenAIUsage,
    ToolCallAccumulator,
    build_request,
    parse_finish_reason,
)
from octollm.llm.types import (
    ChatMessage,
    ChatRequest,
    ChatUsage,
    CompletionEnd,
    FinishReason,
    ModelStreamChunk,
    TextDelta,
    bound_prompt_tokens,
    bound_tool_tokens,
)

OPENAI_URL = "https://api.openai.com/v1"
_ERROR_BYTES = 64 * 1024
_LIST_BYTES = 4 * 1024 * 1024
_EMBEDDINGS_BYTES = 64 * 1024 * 1024
_DETAIL_CHARACTERS = 300
_MAX_RETRY_AFTER = 3600.0
_PRINTABLE = re.compile(r"[\x21-\x7e]+")
_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")
_DONE = b"[DONE]"


@dataclass(frozen=True, slots=True)
class ProviderTimeouts:
    """Timeouts in seconds: to connect, and between two reads of a response, of which the first takes longest."""

    connect: float = 5.0
    idle: float = 120.0


class OpenAICompatibleModel:
    """One model of one provider, for chat or for embeddings. ``base_url`` is the URL before ``/chat/completions``."""

    def __init__(
        self,
        model: str,
        *,
        base_url: str = OPENAI_URL,
        api_key: str | None = None,
        context_tokens: int = 128_000,
        timeouts: ProviderTimeouts | None = None,
    ) -> None:
        self._model = model
        self._base_url = _checked_url(base_url)
        self._key = _checked_key(api_key)
        self._context_tokens = context_tokens
        chosen = ProviderTimeouts() if timeouts is None else timeouts
        self._idle = chosen.idle
        self._transport = create_external_transport(connect_timeout=chosen.connect, read_timeout=chosen.idle)
        self._client = Client(self._transport)

    @property
    def name(self) -> str:
        """Return ``openai:`` and the provider's name of the model."""
        return f"openai:{self._model}"

    @property
    def context_tokens(self) -> int:
        """Return how many tokens prompt and answer may have together, as far as the settings know."""
        return self._context_tokens

    async def count_tokens(self, messages: Sequence[ChatMessage]) -> int:
        """Return an upper bound of the prompt's tokens, its UTF-8 bytes: the provider's tokenizer is not available."""
        return bound_prompt_tokens(messages)

    async def stream(self, request: ChatRequest) -> AsyncGenerator[ModelStreamChunk]:
        """Stream a completion; see :class:`octollm.llm.types.ChatModel`. Closing it closes the connection."""
        headers = self._headers("text/event-stream")
        content = msgspec.json.encode(build_request(self._model, request))
        with map_exceptions(self._transport_error, *TRANSPORT_ERRORS):
            async with self._client.stream("POST", f"{self._base_url}/chat/completions", headers, content) as response:
                if response.status != 200:
                    raise await self._error_response(response)
                async with aclosing(self._pieces(response, request)) as pieces:
                    async for piece in pieces:
                        yield piece

    async def count_embedding_tokens(self, texts: Sequence[str], input_type: InputType) -> int:
        """Return an upper bound of the tokens of ``texts``: their UTF-8 bytes, and two markers each."""
        del input_type
        return sum(len(text.encode("utf-8", "surrogatepass")) + 2 for text in texts)

    async def embed(
        self, texts: Sequence[str], input_type: InputType = "query", dimensions: int | None = None
    ) -> Embeddings:
        """Return the embeddings of ``texts``; see :class:`octollm.llm.embeddings.EmbeddingModel`.

        ``input_type`` stays here: OpenAI's protocol has no such member.
        """
        body: dict[str, object] = {"model": self._model, "input": list(texts), "encoding_format": "float"}
        if dimensions is not None:
            body["dimensions"] = dimensions
        with map_exceptions(self._transport_error, *TRANSPORT_ERRORS):
            async with self._client.stream(
                "POST", f"{self._base_url}/embeddings", self._headers("application/json"), msgspec.json.encode(body)
            ) as response:
                if response.status != 200:
                    raise await self._error_response(response)
                data = await _read_limited(response, _EMBEDDINGS_BYTES)
        with map_exceptions(self._failed("the response is not a list of embeddings"), msgspec.DecodeError):
            answer = msgspec.json.decode(data, type=OpenAIEmbeddings)
        vectors = {entry.index: array("f", entry.embedding) for entry in answer.data}
        if sorted(vectors) != list(range(len(texts))) or len({len(vector) for vector in vectors.values()}) != 1:
            raise self._failed("the response has not one embedding for each text, all of one length")
        bound = await self.count_embedding_tokens(texts, input_type)
        return Embeddings(
            tuple(_to_little_endian(vectors[index]) for index in range(len(texts))),
            bound if answer.usage is None else answer.usage.prompt_tokens,
        )

    async def list_models(self) -> frozenset[str] | None:
        """Return the names in the server's list of models, a free call; ``None`` when it has no such list.

        Raises ``model_failed`` when the server is unreachable or rejects the key.
        """
        headers = {"authorization": f"Bearer {self._key}"} if self._key is not None else {}
        with map_exceptions(self._transport_error, *TRANSPORT_ERRORS):
            async with self._client.stream("GET", f"{self._base_url}/models", headers) as response:
                if response.status in (401, 403):
                    raise await self._error_response(response)
                if response.status != 200:
                    return None
                body = await _read_limited(response, _LIST_BYTES)
        try:
            return frozenset(entry.id for entry in msgspec.json.decode(body, type=OpenAIModelList).data)
        except msgspec.DecodeError:
            return None

    def _headers(self, accept: str) -> dict[str, str]:
        headers = {"content-type": "application/json", "accept": accept}
        if self._key is not None:
            headers["authorization"] = f"Bearer {self._key}"
        return headers

    async def aclose(self) -> None:
        """Close the connections."""
        await self._transport.aclose()

    async def _pieces(self, response: Response, request: ChatRequest) -> AsyncGenerator[ModelStreamChunk]:
        finish: FinishReason | None = None
        usage: OpenAIUsage | None = None
        tool_calls = ToolCallAccumulator()
        written = 0
        with map_exceptions(
            self._failed("the response is not a stream of chat completion chunks"),
            msgspec.DecodeError,
            ValueError,
        ):
            async with aclosing(iter_sse(response.content, MAX_EVENT_BYTES)) as events:
                async for data in events:
                    if data is None:
                        continue
                    if data == _DONE:
                        break
                    chunk = msgspec.json.decode(data, type=OpenAIChunk)
                    if chunk.error is not None:
                        raise self._failed(f"it broke off: {self._redact(chunk.error.message)}")
                    usage = chunk.usage or usage
                    for choice in chunk.choices:
                        finish = parse_finish_reason(choice.finish_reason) or finish
                        if choice.delta.content:
                            written += len(choice.delta.content.encode("utf-8", "surrogatepass"))
                            yield TextDelta(choice.delta.content)
                        for delta in choice.delta.tool_calls or ():
                            written += tool_calls.add(delta)
        if finish is None:
            raise self._failed("the connection broke before the response was complete")
        if usage is None:
            bound = ChatUsage.of(bound_prompt_tokens(request.messages) + bound_tool_tokens(request), written)
            # The provider sent no usage: charge an upper bound rather than nothing.
            yield CompletionEnd(finish, bound, exact=False, tool_calls=tool_calls.calls())
        else:
            counted = ChatUsage.of(usage.prompt_tokens, usage.completion_tokens)
            yield CompletionEnd(finish, counted, tool_calls=tool_calls.calls())

    async def _error_response(self, response: Response) -> OctoError:
        """Return the error for a response whose status is not 200."""
        status = response.status
        if status in (401, 403):
            return self._failed(
                f"HTTP {status}, the key was rejected" if self._key else f"HTTP {status}, a key is required", final=True
            )
        error = await _read_error(response)
        message = f": {self._redact(error.message)}" if error.message else ""
        if status == 400 and error.code == "context_length_exceeded":
            return OctoError(f"The prompt does not fit {self.name}{message}", code="context_too_long")
        if status == 429:
            return self._failed(f"HTTP 429, too many requests{message}", retry_after=_retry_after(response))
        if 300 <= status < 400:
            return self._failed(f"HTTP {status}, a redirect, which is not followed with a key", final=True)
        if 400 <= status < 500 and status != 408:
            return self._failed(f"HTTP {status}{message}", final=True)
        return self._failed(f"HTTP {status}{message}", retry_after=_retry_after(response))

    def _transport_error(self, exc: Exception) -> OctoError:
        match classify_failure(exc):
            case "connect_timeout":
                return self._failed("the connection timed out")
            case "connect_failed":
                return self._failed("no connection: is the address right, and is the server running?")
            case "timeout":
                return self._failed(f"no response for {self._idle:.0f} s")
            case "connection_lost":
                return self._failed("the connection broke before the response was complete")

    def _failed(self, why: str, *, final: bool = False, retry_after: float | None = None) -> OctoError:
        """Return ``model_failed``; ``final`` marks a failure that a retry would repeat."""
        detail = f"{self.name} at {self._base_url}: {why}."
        if final:
            return RemoteError(detail, code="model_failed", status=503, retryable=False)
        return OctoError(detail, code="model_failed", retry_after=retry_after)

    def _redact(self, text: str) -> str:
        """Return the provider's message, truncated, and without the key, which some providers repeat in it."""
        if self._key:
            text = text.replace(self._key, "[key]")
        return " ".join(text.split())[:_DETAIL_CHARACTERS].rstrip(".")


def _to_little_endian(vector: array[float]) -> bytes:
    if sys.byteorder == "big":
        vector.byteswap()
    return vector.tobytes()


async def _read_error(response: Response) -> OpenAIError:
    """Return the error object of a response, empty when the body is not one."""
    try:
        return msgspec.json.decode(await _read_limited(response, _ERROR_BYTES), type=OpenAIErrorBody).error
    except msgspec.DecodeError:
        return OpenAIError()


async def _read_limited(response: Response, limit: int) -> bytes:
    """Return the start of the body: reading stops at the first chunk past ``limit`` bytes."""
    raw = bytearray()
    async for chunk in response.content:
        raw += chunk
        if len(raw) > limit:
            break
    return bytes(raw)


def _retry_after(response: Response) -> float | None:
    """Return ``Retry-After`` in seconds (RFC 9110 section 10.2.3); a date is ignored."""
    value = response.headers.get("retry-after", "")
    return min(float(value), _MAX_RETRY_AFTER) if _SECONDS.fullmatch(value) else None


def _checked_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SettingError("The model's URL should look like https://host/v1.")
    if parts.username is not None or parts.password is not None:
        raise SettingError("The model's URL must not hold a key; give the key in its own setting.")
    return url.rstrip("/")


def _checked_key(key: str | None) -> str | None:
    stripped = (key or "").strip()
    if stripped and not _PRINTABLE.fullmatch(stripped):
        raise SettingError("The model's key has characters that a key cannot have (a space or a line break?).")
    return stripped or None
