"""The embedded model: a catalogue model on this machine's processor, run by llama.cpp without network or API key."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import secrets
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from pathlib import Path

from octollm.errors import OctoError
from octollm.limiter import ConcurrencyLimiter, ConcurrencyPolicy
from octollm.llm.catalogue import ModelEntry
from octollm.llm.llama_process import Generation, LlamaEvent, LlamaProcess, LlamaSettings
from octollm.llm.prompted_tools import allows_tools, flatten_tool_messages, stream_with_tools
from octollm.llm.types import (
    ChatMessage,
    ChatRequest,
    ChatUsage,
    CompletionEnd,
    FinishReason,
    ModelStreamChunk,
    TextDelta,
    bound_prompt_tokens,
)

DEFAULT_SEED = 42
_SEEDS = 0xFFFF_FFFF
"""llama.cpp's seeds are below this number; the number itself means a random seed."""
_MAX_PROMPT_BYTES = 4 * 1024 * 1024
_CONTEXT_BLOCK = 256
_BATCH_MODEL_BYTES = 1_000_000_000
_MIN_BATCH_TOKENS, _MAX_BATCH_TOKENS = 32, 512


@dataclass(frozen=True, slots=True)
class EmbeddedSettings:
    """Parameters of the embedded model.

    ``threads`` ``None`` means all cores but one, which is left to the services. ``slots`` generations run in parallel,
    each with the whole context; ``max_waiting`` more wait for at most ``wait_seconds``, and any further one is
    rejected as ``overloaded``.
    """

    threads: int | None = None
    context_tokens: int = 8192
    slots: int = 1
    max_waiting: int = 32
    wait_seconds: float = 600.0
    prompt_cache_mib: int = 256

    @property
    def concurrency(self) -> ConcurrencyPolicy:
        """Return the bounds on generations at once and on those that wait."""
        return ConcurrencyPolicy(self.slots, self.max_waiting, self.wait_seconds)


class EmbeddedModel:
    """A model in its own child process, loaded by the first call or by :meth:`start`.

    It is deterministic unless the request says otherwise: temperature 0 and a fixed seed. The next call restarts a
    child that has died.
    """

    def __init__(self, entry: ModelEntry, path: Path, settings: EmbeddedSettings | None = None) -> None:
        self._entry = entry
        self._path = path
        self._settings = EmbeddedSettings() if settings is None else settings
        self._context = round_context(self._settings.context_tokens, entry.max_context_tokens)
        self._loading: asyncio.Task[LlamaProcess] | None = None
        self._limiter = ConcurrencyLimiter("The embedded model", self._settings.concurrency, retry_after=5.0)
        self._closed = False

    @property
    def name(self) -> str:
        """Return the catalogue's name of the model."""
        return self._entry.name

    @property
    def context_tokens(self) -> int:
        """Return the context: the most tokens of prompt and completion together."""
        return self._context

    @property
    def pid(self) -> int | None:
        """Return the process id of the child, if it runs."""
        process = self._process()
        return process.pid if process is not None and process.alive else None

    async def start(self) -> None:
        """Load the model now. Raises ``no_model`` without llama.cpp's package, ``model_failed`` if it does not load."""
        await self._get_process()

    async def count_tokens(self, messages: Sequence[ChatMessage]) -> int:
        """Count the prompt of ``messages`` exactly, with the model's own template and tokenizer.

        Raises ``no_model`` for messages with images, which the embedded models cannot read.
        """
        _refuse_images(messages)
        plain = self._plain(messages)
        process = await self._get_process()
        return await process.count(plain)

    async def stream(self, request: ChatRequest) -> AsyncGenerator[ModelStreamChunk]:
        """Stream a completion; see :class:`octollm.llm.types.ChatModel`. Tools are described in the prompt."""
        stream = self._stream(request)
        if allows_tools(request):
            stream = stream_with_tools(self._stream, request, f"call-{secrets.token_hex(8)}")
        async with contextlib.aclosing(stream) as pieces:
            async for piece in pieces:
                yield piece

    async def _stream(self, request: ChatRequest) -> AsyncGenerator[ModelStreamChunk]:
        _refuse_images(request.messages)
        body = self._body(request)
        await self._limiter.acquire()
        try:
            process = await self._get_process()
            generation = process.chat(body, self._limiter.release)
        except BaseException:
            self._limiter.release()
            raise
        try:
            async for piece in self._pieces(generation):
                yield piece
        finally:
            generation.cancel()

    async def aclose(self) -> None:
        """End the child process; running generations end with ``model_failed``."""
        self._closed = True
        loading, process = self._loading, self._process()
        self._loading = None
        if process is not None:
            await process.aclose()
        elif loading is not None:
            loading.cancel()
            await asyncio.wait({loading})  # the task ends its child process before it ends
            if not loading.cancelled() and loading.exception() is None:  # loading finished before the cancel arrived
                await loading.result().aclose()

    def _process(self) -> LlamaProcess | None:
        """Return the loaded child, which may have died since, or ``None``."""
        loading = self._loading
        if loading is None or not loading.done() or loading.cancelled() or loading.exception() is not None:
            return None
        return loading.result()

    async def _get_process(self) -> LlamaProcess:
        """Return the running child, and start it when there is none.

        Callers share one start: it is shielded, so that a cancelled caller does not cancel it for the others.
        """
        if self._closed:
            raise OctoError("The embedded model is closed.", code="model_failed")
        process = self._process()
        if self._loading is None or (self._loading.done() and (process is None or not process.alive)):
            self._loading = asyncio.create_task(self._load(process))
        loading = self._loading
        try:
            return await asyncio.shield(loading)
        except asyncio.CancelledError:
            if loading.cancelled():  # aclose() cancelled it; the caller itself was not cancelled
                raise OctoError("The embedded model is closed.", code="model_failed") from None
            raise

    async def _load(self, previous: LlamaProcess | None) -> LlamaProcess:
        if previous is not None:
            await previous.aclose()
        if importlib.util.find_spec("xllamacpp") is None:
            raise OctoError(
                "The embedded model needs llama.cpp: run `pip install 'octollm[local]'`, or set "
                "OCTOLLM_MODEL=openai:NAME with OCTOLLM_MODEL_URL.",
                code="no_model",
            )
        return await LlamaProcess.start(self._path, self._llama_settings())

    async def _pieces(self, generation: Generation) -> AsyncGenerator[ModelStreamChunk]:
        stall = self._llama_settings().stall_seconds
        while True:
            event = await generation.next(stall)
            if event.event == "text":
                yield TextDelta(event.text)
            elif event.event == "end":
                finish: FinishReason = "length" if event.finish == "length" else "stop"
                yield CompletionEnd(finish, ChatUsage.of(event.prompt, event.completion))
                return
            elif event.event != "progress":
                raise self._error(event)

    def _error(self, event: LlamaEvent) -> OctoError:
        if event.kind == "exceed_context_size_error":
            return self._too_long(f"{event.prompt:,} tokens", event.prompt - self.context_tokens + 1)
        if event.status == 400:
            return OctoError(f"{self.name} cannot do this: {event.message[:300]}", code="invalid_body")
        return OctoError(f"The embedded model failed: {event.message[:300]}", code="model_failed")

    def _too_long(self, size: str, surplus: int) -> OctoError:
        return OctoError(
            f"The prompt has {size}, and the context of {self.name} is {self.context_tokens:,} tokens with the answer. "
            f"Shorten it by at least {surplus:,} tokens.",
            code="context_too_long",
        )

    def _plain(self, messages: Sequence[ChatMessage]) -> list[dict[str, str]]:
        """Return ``messages`` in the chat template's format, without control tokens in their texts."""
        size = bound_prompt_tokens(messages)
        if size > _MAX_PROMPT_BYTES:
            raise self._too_long(f"{size:,} bytes", 1)
        return [
            {
                "role": "system" if message.role == "developer" else message.role,
                "content": self._escape_control_tokens(message.text),
            }
            for message in flatten_tool_messages(messages)
        ]

    def _escape_control_tokens(self, text: str) -> str:
        """Break control tokens in ``text``, so that a document cannot open a turn of the conversation.

        A zero-width space inside a token keeps it readable and makes it ordinary text.
        """
        if "<" in text:
            for token in self._entry.special_tokens:
                text = text.replace(token, f"{token[:1]}\u200b{token[1:]}")
        # JSON may contain a lone surrogate, which UTF-8 cannot encode.
        return text.encode("utf-8", "replace").decode()

    def _body(self, request: ChatRequest) -> dict[str, object]:
        body: dict[str, object] = {
            "messages": self._plain(request.messages),
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_progress": True,
            "cache_prompt": True,
            "temperature": 0.0 if request.temperature is None else request.temperature,
            "seed": (DEFAULT_SEED if request.seed is None else request.seed) % _SEEDS,
            "max_tokens": min(request.completion_limit or self.context_tokens, self.context_tokens),
        }
        if request.top_p is not None:
            body["top_p"] = request.top_p
        if request.stops:
            body["stop"] = request.stops
        wire_format = request.response_format
        if wire_format is not None and wire_format.type == "json_object":
            body["response_format"] = {"type": "json_object"}
        elif wire_format is not None and wire_format.json_schema is not None:
            body["response_format"] = {"type": "json_schema", "json_schema": {"schema": wire_format.json_schema.schema}}
        return body

    def _llama_settings(self) -> LlamaSettings:
        threads = self._settings.threads or default_threads()
        return LlamaSettings(
            threads=threads,
            batch_tokens=batch_tokens(self._entry.size, threads),
            context_tokens=self._context,
            slots=self._settings.slots,
            prompt_cache_mib=self._settings.prompt_cache_mib,
        )


def _refuse_images(messages: Sequence[ChatMessage]) -> None:
    if any(message.images for message in messages):
        raise OctoError(
            "The embedded models cannot read images. Set OCTOLLM_MODEL to a model that can, e.g. openai:gpt-4o-mini.",
            code="no_model",
        )


def default_threads() -> int:
    """Return the number of cores that this process may use, less one for the services, at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, cores - 1)


def round_context(requested: int, limit: int) -> int:
    """Return the context that llama.cpp allocates for ``requested`` tokens: it rounds up to blocks, up to ``limit``."""
    return min(-(-requested // _CONTEXT_BLOCK) * _CONTEXT_BLOCK, limit)


def batch_tokens(model_bytes: int, threads: int) -> int:
    """Return the batch size for prompts, in tokens.

    A cancel waits for the current batch, which should take well under a second: about 64 tokens a thread for a model
    of half a gigabyte, 32 for one of a gigabyte. Smaller batches are slower: by a tenth at 32, not measurably at 64.
    """
    size = 32 * threads * max(1, round(_BATCH_MODEL_BYTES / model_bytes))
    return max(_MIN_BATCH_TOKENS, min(_MAX_BATCH_TOKENS, size))
