"""One chat completion from end to end: model, concurrency slot, budget reservation, generation, settlement."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import msgspec
from msgspec import UNSET

from octollm.clock import Clock, IdGenerator
from octollm.contracts.internal import ReserveRequest, ReserveResponse
from octollm.contracts.task import Usage
from octollm.errors import OctoError, map_exceptions
from octollm.limiter import ConcurrencyLimiter, ConcurrencyPolicy
from octollm.llm.catalogue import cost_usd
from octollm.llm.types import (
    ChatChoice,
    ChatModel,
    ChatRequest,
    ChatUsage,
    CompletionEnd,
    CompletionMessage,
    TextDelta,
    bound_tool_tokens,
)
from octollm.resilience import Deadline
from octollm.rpc.call import IncomingCall
from octollm.rpc.external import ExternalClient
from octollm.rpc.idempotency import NestedKeys
from octollm.services.models.budget import BudgetClient
from octollm.services.models.model_loader import ModelLoader
from octollm.services.models.schema import PricedChatCompletion, PricedUsage
from octollm.telemetry import Metrics, Span, Tracer
from octollm.telemetry.spans import SpanValue

OnText = Callable[[str], Awaitable[None]]

JOURNAL_SECONDS = 5.0
"""How long an answer waits until it is journaled; it is then given anyway."""
_MAX_UNREAD_TOKENS = 16
"""Tokens that a local model may have written and not yet handed over when it is stopped."""


_SettledCompletion = tuple[PricedChatCompletion, asyncio.Task[None] | None]
"""An answer, and the task that settles it; a replayed one needs none."""


@dataclass(slots=True)
class _Generation:
    """What a running generation has written."""

    parts: list[str] = field(default_factory=list[str])
    final: CompletionEnd | None = None
    used: Usage = field(default_factory=Usage)

    @property
    def text(self) -> str:
        return "".join(self.parts)


class ChatCompletionRunner:
    """Answers chat calls with the one model; ``concurrency`` bounds how many run at once and how many wait.

    ``external`` has the policies of calls to a provider; a model in this process needs none.
    """

    def __init__(
        self,
        loader: ModelLoader,
        budget: BudgetClient,
        *,
        concurrency: ConcurrencyPolicy,
        clock: Clock,
        ids: IdGenerator,
        metrics: Metrics,
        tracer: Tracer,
        external: ExternalClient | None = None,
    ) -> None:
        self._loader = loader
        self._budget = budget
        self._limiter = ConcurrencyLimiter("The model", concurrency, on_queued=metrics.queue_observer("model"))
        self._clock = clock
        self._ids = ids
        self._metrics = metrics
        self._tracer = tracer
        self._external = external

    async def complete(self, call: IncomingCall, request: ChatRequest, on_text: OnText) -> PricedChatCompletion:
        """Answer a call within its deadline; ``on_text`` is awaited with each piece.

        A repeat of a call that was answered whole is answered alike and costs nothing. However the call ends, also
        by cancelling, what it used is settled. Raises ``no_model``, ``not_found``, ``budget_exhausted``,
        ``context_too_long``, ``model_failed``, ``overloaded``, ``deadline_exceeded`` and what the orchestrator says.
        """
        try:
            async with asyncio.timeout(call.deadline.remaining()):
                model = await self._loader.get(request.model)
                # The reservation follows inside: a call that waits for its turn holds no tokens.
                async with self._limiter:
                    answer, settling = await self._complete_within_budget(call, request, model, on_text)
                if settling is not None:
                    # An answer that a caller has acted on must be in the journal, or a repeat would get another. So the
                    # settlement is a request of its own. Carried by the task's next reservation it would save one,
                    # but a crash that takes the caller along (one process, when embedded) would pay for a call twice.
                    await asyncio.wait({settling}, timeout=JOURNAL_SECONDS)
                return answer
        except TimeoutError as error:
            # A timeout of something inside, not of this call's deadline.
            if call.deadline.remaining() > 0:
                raise
            raise OctoError("The time limit of this call has expired.", code="deadline_exceeded") from error

    async def _complete_within_budget(
        self, call: IncomingCall, request: ChatRequest, model: ChatModel, on_text: OnText
    ) -> _SettledCompletion:
        prompt = await model.count_tokens(request.messages) + bound_tool_tokens(request)
        wanted = _clamp_to_context(request.completion_limit, model.context_tokens - prompt)
        reserved = await self._budget.reserve(
            ReserveRequest(
                call.bearer,
                derive_idempotency_key(call),
                prompt,
                wanted,
                model.name,
                cost_usd(model.name, ChatUsage.of(1, 0)),
            ),
            call.deadline,
        )
        journaled = bytes(reserved.journal)
        if journaled != b"null":
            call.span.attributes["octollm.replayed"] = True
            return await _replay_completion(journaled, on_text), None
        return await self._generate(request, model, reserved, prompt, on_text, call.deadline)

    async def _generate(
        self,
        request: ChatRequest,
        model: ChatModel,
        reserved: ReserveResponse,
        prompt: int,
        on_text: OnText,
        deadline: Deadline,
    ) -> _SettledCompletion:
        granted = reserved.max_completion_tokens
        progress = _Generation()
        try:
            with self._tracer.span(f"model {model.name}", "client") as span:
                await self._stream_completion(
                    _limit_request(request, granted), model, progress, on_text, span, prompt, deadline
                )
        except BaseException:
            # Also on cancellation: what was written counts as used, whoever still listens.
            self._budget.settle(reserved.reservation, progress.used)
            raise
        assert progress.final is not None
        answer = self._build_completion(model.name, progress.text, progress.final)
        return answer, self._budget.settle(
            reserved.reservation, progress.used, msgspec.Raw(msgspec.json.encode(answer))
        )

    async def _stream_completion(
        self,
        request: ChatRequest,
        model: ChatModel,
        progress: _Generation,
        on_text: OnText,
        span: Span,
        prompt: int,
        deadline: Deadline,
    ) -> None:
        """Have the model write; however that ends, ``progress`` has what it used, and so have metrics and span."""
        began = self._clock.monotonic()

        async def heard(text: str) -> None:
            # The piece is in `parts` already: only the first one is alone there.
            if not progress.parts[1:]:
                span.attributes["octollm.first_token_ms"] = round((self._clock.monotonic() - began) * 1000, 1)
            await on_text(text)

        # Names of OpenTelemetry's semantic conventions, where there are any.
        span.attributes |= name_model_call("chat", model.name)
        if request.completion_limit is not None:
            span.attributes["gen_ai.request.max_tokens"] = request.completion_limit
        try:
            if self._external is None:
                await _consume_stream(model, request, progress, heard)
            else:
                # A word that was handed over cannot be taken back: only what failed before it is tried again.
                await self._external.call(
                    "chat",
                    lambda: _consume_stream(model, request, progress, heard),
                    deadline,
                    is_repeatable=lambda: not progress.parts,
                )
            assert progress.final is not None
            tokens = progress.final.usage
            progress.used = Usage(tokens.prompt_tokens, tokens.completion_tokens, cost_usd(model.name, tokens) or 0.0)
            span.attributes["gen_ai.response.finish_reasons"] = (progress.final.finish_reason,)
        except BaseException as error:
            progress.used = self._estimate_max_usage(error, progress, prompt, request.completion_limit or 0)
            raise
        finally:
            self._record_usage(model.name, progress.used, span)

    def _estimate_max_usage(self, error: BaseException, progress: _Generation, prompt: int, granted: int) -> Usage:
        """Return the most that a call which was cut off can have used.

        A refusal before the first word cost nothing. A local model stops when it is told to, so that no more
        tokens than bytes were written; a provider may have gone on to the limit.
        """
        text = progress.text
        if isinstance(error, OctoError) and not text:
            return Usage()
        written = min(granted, len(text.encode()) + _MAX_UNREAD_TOKENS) if self._loader.is_local else granted
        return Usage(prompt, written)

    def _build_completion(self, model: str, text: str, final: CompletionEnd) -> PricedChatCompletion:
        tokens = final.usage
        price = cost_usd(model, tokens) or 0.0
        spent = PricedUsage(tokens.prompt_tokens, tokens.completion_tokens, tokens.total_tokens, price)
        choice = ChatChoice(CompletionMessage(text, tool_calls=final.tool_calls or UNSET), final.finish_reason)
        return PricedChatCompletion("chatcmpl-" + self._ids.hex(), int(self._clock.now()), model, (choice,), spent)

    def _record_usage(self, model: str, usage: Usage, span: Span) -> None:
        span.attributes |= {
            "gen_ai.usage.input_tokens": usage.prompt_tokens,
            "gen_ai.usage.output_tokens": usage.completion_tokens,
            "octollm.cost_usd": usage.cost_usd,
        }
        self._metrics.tokens.labels(model, "prompt").inc(usage.prompt_tokens)
        self._metrics.tokens.labels(model, "completion").inc(usage.completion_tokens)


def name_model_call(operation: str, model: str) -> dict[str, SpanValue]:
    """Return what a span says of its call: ``chat`` or ``embeddings``, and a model as ``provider:name``."""
    provider, colon, _name = model.partition(":")
    named: dict[str, SpanValue] = {"gen_ai.operation.name": operation, "gen_ai.request.model": model}
    # A model of this process has no provider.
    return named | {"gen_ai.provider.name": provider} if colon else named


async def _consume_stream(model: ChatModel, request: ChatRequest, progress: _Generation, on_text: OnText) -> None:
    async with contextlib.aclosing(model.stream(request)) as pieces:
        async for piece in pieces:
            if isinstance(piece, TextDelta):
                progress.parts.append(piece.text)
                await on_text(piece.text)
            else:
                progress.final = piece
    if progress.final is None:
        raise OctoError(f"{model.name} ended its answer without a finish reason.", code="model_failed")


async def _replay_completion(journaled: bytes, on_text: OnText) -> PricedChatCompletion:
    with map_exceptions(
        OctoError("The journaled answer of this call cannot be decoded.", code="peer_protocol"),
        msgspec.DecodeError,
    ):
        answer = msgspec.json.decode(journaled, type=PricedChatCompletion)
    await on_text(answer.text)
    return answer


def derive_idempotency_key(call: IncomingCall) -> str:
    """Return the key of a call: the one it was sent with, or what a stock client's call stands for.

    A token that was made while another call was served names that call; a repeat of it then repeats this one. A
    token made by hand stands for no call, so each of its calls is its own.
    """
    if call.key is not None:
        return call.key
    parent = call.authority.call or call.request_id
    return NestedKeys(parent).next(call.service, call.operation, call.body)


def _clamp_to_context(limit: int | None, room: int) -> int | None:
    """Return the limit of the answer: what was asked for, and no more than the model has room for.

    Where the prompt alone seems too long the model decides: its count may be an upper bound.
    """
    if room < 1:
        return limit
    return room if limit is None else min(limit, room)


def _limit_request(request: ChatRequest, granted: int) -> ChatRequest:
    """Return the request cut to what was granted, in the member that its caller used."""
    if request.max_tokens is not None and request.max_completion_tokens is None:
        return msgspec.structs.replace(request, max_tokens=granted)
    return msgspec.structs.replace(request, max_tokens=None, max_completion_tokens=granted)
