"""The models service over HTTP: OpenAI's chat completions for whoever holds a capability."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable

from octollm.config import Settings
from octollm.errors import OctoError
from octollm.llm.cache import ModelCache
from octollm.llm.embedded import EmbeddedSettings
from octollm.llm.openai_compatible import OPENAI_URL
from octollm.llm.select import ModelChoice, resolve_model
from octollm.llm.types import ChatMessage, ChatRequest
from octollm.rpc.call import About, Call, Operation, Reply, Silent
from octollm.rpc.outside import Outside
from octollm.rpc.service import Base, Service, build_service
from octollm.services.models.answering import Answering
from octollm.services.models.budget import Budget
from octollm.services.models.holder import ModelHolder
from octollm.services.models.streaming import ChatStream
from octollm.services.models.wire import Answer, Chunks, ModelInfo, ModelList

CHAT_SECONDS = 600.0
"""Seconds for a call that names no deadline: a prompt on a small machine takes its time."""
REMOTE_PARALLEL = 16
"""Calls to a provider at a time."""


@contextlib.asynccontextmanager
async def models_service(
    base: Base, settings: Settings, *, choose: Callable[[], ModelChoice] | None = None
) -> AsyncGenerator[Service]:
    """Yield the service; its model loads in the background and is freed on leaving.

    Without a model the service still starts, and says in ``/ready`` and in each answer how to get one. ``choose``
    names another model than the settings do. Raises ``setting_invalid`` for a model that cannot be.
    """
    chooser = choose or (lambda: _chosen(settings))
    holder = ModelHolder(chooser, clock=base.clock, log=base.log)
    budget = Budget(base.caller, base.identity.signer(), clock=base.clock, log=base.log)
    try:
        holder.begin()
        yield build_models(base, settings, holder, budget)
    finally:
        await holder.aclose()
        await budget.aclose()


def _chosen(settings: Settings) -> ModelChoice:
    return resolve_model(
        settings.model,
        settings.model_url,
        settings.model_api_key,
        ModelCache(settings.model_cache),
        embedded=EmbeddedSettings(context_tokens=settings.model_context),
    )


def _outside(base: Base, settings: Settings) -> Outside:
    name = f"{settings.model} at {settings.model_url or OPENAI_URL}"
    return Outside(base.name, name, clock=base.clock, metrics=base.metrics, log=base.log)


def build_models(base: Base, settings: Settings, holder: ModelHolder, budget: Budget) -> Service:
    """Return the service over its model and the budget that it answers to."""
    embedded = settings.model.partition(":")[0] == "embedded"
    answering = Answering(
        holder,
        budget,
        parallel=EmbeddedSettings().slots if embedded else REMOTE_PARALLEL,
        clock=base.clock,
        ids=base.ids,
        metrics=base.metrics,
        tracer=base.tracer,
        outside=None if embedded else _outside(base, settings),
    )
    handlers = _Handlers(base, holder, answering)
    return build_service(base, handlers.operations(), checkups={"model": holder.checkup})


class _Handlers:
    """The operations of the service."""

    def __init__(self, base: Base, holder: ModelHolder, answering: Answering) -> None:
        self._base = base
        self._holder = holder
        self._answering = answering

    def operations(self) -> list[Operation]:
        """Return the operations. Repeats of a chat are found in the journal, not among idempotency keys."""
        return [
            Operation(
                "chat",
                "POST",
                "/v1/chat/completions",
                self.chat,
                scope="models:chat",
                kind="idempotent",
                body=ChatRequest,
                answer=Answer,
                timeout=CHAT_SECONDS,
                summary="Answer a chat (OpenAI's chat completions).",
                about=About(
                    stream="text/event-stream",
                    codes=(
                        "authority_missing",
                        "budget_exhausted",
                        "context_too_long",
                        "fence_lost",
                        "model_failed",
                        "no_model",
                        "not_found",
                        "state_conflict",
                        "task_not_found",
                    ),
                    example=ChatRequest("default", (ChatMessage("user", "Why is the sky blue?"),)),
                ),
            ),
            Operation(
                "models",
                "GET",
                "/v1/models",
                self.models,
                scope="models:chat",
                answer=ModelList,
                cacheable=True,
                summary="List what a request may name as its model.",
            ),
            Operation(
                "embeddings",
                "POST",
                "/v1/embeddings",
                self.embeddings,
                scope="models:embeddings",
                summary="Embeddings, where they are configured.",
                about=About(codes=("not_configured",)),
            ),
        ]

    async def chat(self, call: Call, request: ChatRequest) -> object:
        """Answer a chat, in one piece or as it is written."""
        if not isinstance(call.emit, Silent):
            return await self._answering.answer(call, request, call.emit.token)
        if not request.stream:
            return await self._answering.answer(call, request, _unheard)
        names = self._holder.names()
        chunks = Chunks("chatcmpl-" + self._base.ids.hex(), int(self._base.clock.now()), names[-1] if names else "")
        return ChatStream(
            lambda on_text: self._answering.answer(call, request, on_text),
            chunks,
            with_usage=request.stream_options is not None and request.stream_options.include_usage,
            request_id=call.request_id,
            log=self._base.log,
        )

    async def models(self, _call: Call, _body: object) -> Reply:
        """List the models."""
        return Reply(ModelList(tuple(ModelInfo(name) for name in self._holder.names())))

    async def embeddings(self, _call: Call, _body: object) -> Reply:
        """Say that there are none."""
        raise OctoError("Embeddings are not configured here.", code="not_configured")


async def _unheard(_text: str) -> None:
    """Nobody watches an answer in one piece."""
