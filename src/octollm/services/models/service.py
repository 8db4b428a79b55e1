"""The models service over HTTP: OpenAI's chat completions, whole or as server-sent events, and embeddings.

Callers authenticate with a capability token.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import replace
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from octollm.config import Settings
from octollm.contracts.problems import to_openai_problem
from octollm.contracts.service_operations import CHAT, EMBED_FOR_INDEX, EMBEDDINGS, LIST_MODELS
from octollm.contracts.stream import HEARTBEAT_SECONDS
from octollm.errors import OctoError
from octollm.limiter import ConcurrencyPolicy
from octollm.llm.cache import ModelCache
from octollm.llm.embedded import EmbeddedSettings
from octollm.llm.embeddings import EmbeddingModel
from octollm.llm.openai_compatible import OPENAI_URL
from octollm.llm.selection import ModelChoice, resolve_embedding_model, resolve_model
from octollm.llm.types import ChatMessage, ChatRequest
from octollm.rpc.auth import RegisteredServiceAuthenticator
from octollm.rpc.call import IncomingCall, NullEmitter, Operation, OperationResponse, implement
from octollm.rpc.external import ExternalClient
from octollm.rpc.limits import wait_for_disconnect
from octollm.rpc.service import Service, ServiceBase, build_service
from octollm.services.models.budget import BudgetClient
from octollm.services.models.completion import ChatCompletionRunner, OnText
from octollm.services.models.embeddings import EmbeddingList, EmbeddingRequest, EmbeddingRunner
from octollm.services.models.model_loader import ModelLoader
from octollm.services.models.schema import (
    KEEPALIVE_COMMENT,
    ChunkEncoder,
    ModelInfo,
    ModelList,
    PricedChatCompletion,
    encode_error_event,
)
from octollm.telemetry import Logger

CompletionFunction = Callable[[OnText], Awaitable[PricedChatCompletion]]
_QUEUE_SIZE = 256
_KEEPALIVE_SECONDS = HEARTBEAT_SECONDS * 0.8
"""Seconds without a word after which a comment is sent; before the first word it also begins the answer."""


class ChatStreamResponse(Response):
    """The response of one streamed call.

    A failure before the first word is raised, so that it is answered with its own status; one after it is the last
    event. While nothing is written for a while, comments keep the connection.
    """

    def __init__(
        self, complete: CompletionFunction, chunks: ChunkEncoder, *, with_usage: bool, request_id: str, log: Logger
    ) -> None:
        super().__init__(
            media_type="text/event-stream", headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        )
        del self.headers["content-length"]
        self._complete = complete
        self._chunks = chunks
        self._with_usage = with_usage
        self._request_id = request_id
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer. Raises what the call raised before its first word, and ``ClientDisconnect``."""
        # Bounded: a client that reads slowly holds the model back instead of filling the memory.
        items: asyncio.Queue[str | PricedChatCompletion | Exception] = asyncio.Queue(_QUEUE_SIZE)
        tasks: list[asyncio.Task[Any]] = [
            asyncio.create_task(self._pump(items)),
            gone := asyncio.create_task(wait_for_disconnect(receive)),
            getting := asyncio.create_task(items.get()),
        ]
        begun = False
        try:
            while True:
                await asyncio.wait({getting, gone}, timeout=_KEEPALIVE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                if gone.done():
                    raise ClientDisconnect
                item = getting.result() if getting.done() else None
                if isinstance(item, Exception) and not begun:
                    raise item
                if not begun:
                    begun = True
                    await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                    await _send_body(send, self._chunks.encode_start())
                if isinstance(item, PricedChatCompletion | Exception):
                    await _send_body(send, self._encode_last(item), more=False)
                    return
                await _send_body(send, KEEPALIVE_COMMENT if item is None else self._chunks.encode_text(item))
                if item is not None:
                    getting = asyncio.create_task(items.get())
                    tasks[-1] = getting
        finally:
            await _cancel_all(tasks)

    async def _pump(self, items: asyncio.Queue[str | PricedChatCompletion | Exception]) -> None:
        try:
            await items.put(await self._complete(items.put))
        except Exception as error:  # handed over to the response, which raises or sends it
            await items.put(error)

    def _encode_last(self, item: PricedChatCompletion | Exception) -> bytes:
        if isinstance(item, PricedChatCompletion):
            return self._chunks.encode_end(item, with_usage=self._with_usage)
        if not isinstance(item, OctoError):
            self._log.error("chat.crashed", error=item)
            item = OctoError("The service failed; its log has the reason under this request id.")
        return encode_error_event(to_openai_problem(item, self._request_id))


async def _send_body(send: Send, body: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})


async def _cancel_all(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    for task in tasks:
        # Their failures were handed over, or nobody waits for them any more.
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task


CHAT_SECONDS = 600.0
"""Seconds for a call that names no deadline: a prompt on a small machine takes its time."""
REMOTE_PARALLEL = 16
"""Calls to a provider at a time."""
PROVIDER_CONCURRENCY = ConcurrencyPolicy(REMOTE_PARALLEL, max_queued=256, max_wait=CHAT_SECONDS)
"""The call's own deadline usually ends the wait before."""


@contextlib.asynccontextmanager
async def models_service(
    base: ServiceBase, settings: Settings, *, choose: Callable[[], ModelChoice] | None = None
) -> AsyncGenerator[Service]:
    """Yield the service; its model loads in the background and is freed on leaving.

    Without a model the service still starts, and says in ``/ready`` and in each answer how to get one. ``choose``
    names another model than the settings do. Raises ``setting_invalid`` for a model that cannot be.
    """
    chooser = choose or (lambda: _choose_model(settings))
    holder = ModelLoader(chooser, clock=base.clock, log=base.log)
    budget = BudgetClient(base.client, base.identity.signer(), clock=base.clock, log=base.log)
    embedding_model = resolve_embedding_model(
        settings.embedding_model, settings.embedding_url, settings.embedding_api_key
    )
    try:
        holder.start_loading()
        yield build_models(base, settings, holder, budget, embedding_model)
    finally:
        await holder.aclose()
        if embedding_model is not None:
            await embedding_model.aclose()
        await budget.aclose()


def _choose_model(settings: Settings) -> ModelChoice:
    return resolve_model(
        settings.model,
        settings.model_url,
        settings.model_api_key,
        ModelCache(settings.model_cache),
        embedded=EmbeddedSettings(context_tokens=settings.model_context),
    )


def _build_external_client(base: ServiceBase, settings: Settings) -> ExternalClient:
    name = f"{settings.model} at {settings.model_url or OPENAI_URL}"
    return ExternalClient(
        base.name,
        name,
        clock=base.clock,
        metrics=base.metrics,
        log=base.log,
        on_breaker=base.events.record_breaker,
    )


def build_models(
    base: ServiceBase,
    settings: Settings,
    loader: ModelLoader,
    budget: BudgetClient,
    embedding_model: EmbeddingModel | None,
) -> Service:
    """Return the service over its models and the budget that it answers to."""
    embedded = settings.model.partition(":")[0] == "embedded"
    answering = ChatCompletionRunner(
        loader,
        budget,
        concurrency=EmbeddedSettings().concurrency if embedded else PROVIDER_CONCURRENCY,
        clock=base.clock,
        ids=base.ids,
        metrics=base.metrics,
        tracer=base.tracer,
        external=None if embedded else _build_external_client(base, settings),
    )
    external = None
    if settings.embedding_model.startswith("openai:"):
        name = f"{settings.embedding_model} at {settings.embedding_url or OPENAI_URL}"
        external = ExternalClient(base.name, name, clock=base.clock, metrics=base.metrics, log=base.log)
    embedding = EmbeddingRunner(embedding_model, budget, metrics=base.metrics, tracer=base.tracer, external=external)
    handlers = _ModelsHandlers(base, loader, answering, embedding)
    return build_service(
        base,
        handlers.operations(),
        authenticators={"service": RegisteredServiceAuthenticator(base.name, base.directory, base.clock)},
        readiness_checks={"model": loader.checkup, "embeddings": embedding.check},
    )


class _ModelsHandlers:
    """The operations of the service."""

    def __init__(
        self, base: ServiceBase, loader: ModelLoader, runner: ChatCompletionRunner, embedding_runner: EmbeddingRunner
    ) -> None:
        self._base = base
        self._loader = loader
        self._runner = runner
        self._embedding_runner = embedding_runner

    def operations(self) -> list[Operation]:
        """Return the operations. Repeats of a chat are found in the journal, not among idempotency keys."""
        openai_operations = [
            implement(
                replace(CHAT, body=ChatRequest, response=PricedChatCompletion),
                self.chat,
                strict=False,
                timeout=CHAT_SECONDS,
                example=ChatRequest("default", (ChatMessage("user", "Why is the sky blue?"),)),
            ),
            implement(replace(LIST_MODELS, response=ModelList), self.models, strict=False),
            implement(
                replace(EMBEDDINGS, body=EmbeddingRequest, response=EmbeddingList),
                self.embeddings,
                strict=False,
                timeout=CHAT_SECONDS,
                example=EmbeddingRequest("default", "Why is the sky blue?"),
            ),
        ]
        return [
            *(replace(operation, openai_errors=True) for operation in openai_operations),
            implement(
                replace(EMBED_FOR_INDEX, body=EmbeddingRequest, response=EmbeddingList),
                self.embed_for_index,
                strict=False,
                timeout=CHAT_SECONDS,
            ),
        ]

    async def chat(self, call: IncomingCall, request: ChatRequest) -> object:
        """Answer a chat, in one piece or as it is written."""
        if not isinstance(call.emit, NullEmitter):
            return await self._runner.complete(call, request, call.emit.token)
        if not request.stream:
            return await self._runner.complete(call, request, _discard_text)
        names = self._loader.list_names()
        chunks = ChunkEncoder(
            "chatcmpl-" + self._base.ids.hex(), int(self._base.clock.now()), names[-1] if names else ""
        )
        return ChatStreamResponse(
            lambda on_text: self._runner.complete(call, request, on_text),
            chunks,
            with_usage=request.stream_options is not None and request.stream_options.include_usage,
            request_id=call.request_id,
            log=self._base.log,
        )

    async def models(self, _call: IncomingCall, _body: object) -> OperationResponse:
        """List the models."""
        embedding_model = self._embedding_runner.model_name
        names = [*self._loader.list_names(), *([] if embedding_model is None else [embedding_model])]
        return OperationResponse(ModelList(tuple(ModelInfo(name) for name in dict.fromkeys(names))))

    async def embeddings(self, call: IncomingCall, request: EmbeddingRequest) -> EmbeddingList:
        """Compute embeddings within the budget of the caller's task."""
        return await self._embedding_runner.embed(call, request)

    async def embed_for_index(self, call: IncomingCall, request: EmbeddingRequest) -> EmbeddingList:
        """Compute embeddings of passages for the memory service."""
        return await self._embedding_runner.embed_for_index(call, request)


async def _discard_text(_text: str) -> None:
    """Nobody watches an answer in one piece."""
