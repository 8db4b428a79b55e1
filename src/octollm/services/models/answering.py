"""One chat call from end to end: the model, a place, the budget, the answer, the account."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import msgspec
from msgspec import UNSET

from octollm.clock import Clock, Ids
from octollm.contracts.api import ReserveAnswer, ReserveRequest
from octollm.contracts.task import Usage
from octollm.errors import OctoError
from octollm.llm.prices import cost_usd
from octollm.llm.types import (
    AnswerMessage,
    ChatChoice,
    ChatModel,
    ChatRequest,
    ChatUsage,
    Final,
    TextDelta,
    tools_bound,
)
from octollm.resilience import Deadline
from octollm.rpc.call import Call
from octollm.rpc.idempotency import NestedKeys
from octollm.rpc.outside import Outside
from octollm.services.models.budget import Budget
from octollm.services.models.holder import ModelHolder
from octollm.services.models.wire import Answer, Spent
from octollm.telemetry import Metrics, Span, Tracer

OnText = Callable[[str], Awaitable[None]]

JOURNAL_SECONDS = 5.0
"""How long an answer waits until it is journaled; it is then given anyway."""
_IN_FLIGHT = 16
"""Tokens that a local model may have written and not yet handed over when it is stopped."""


_Settled = tuple[Answer, asyncio.Task[None] | None]
"""An answer, and the task that settles it; a replayed one needs none."""


@dataclass(slots=True)
class _Progress:
    """What a running generation has written."""

    parts: list[str] = field(default_factory=list[str])
    final: Final | None = None
    used: Usage = field(default_factory=Usage)

    @property
    def text(self) -> str:
        return "".join(self.parts)


class Answering:
    """Answers chat calls with the one model; at most ``parallel`` at a time, the others wait in turn.

    ``outside`` has the policies of calls to a provider; a model in this process needs none.
    """

    def __init__(
        self,
        holder: ModelHolder,
        budget: Budget,
        *,
        parallel: int,
        clock: Clock,
        ids: Ids,
        metrics: Metrics,
        tracer: Tracer,
        outside: Outside | None = None,
    ) -> None:
        self._holder = holder
        self._budget = budget
        self._places = asyncio.Semaphore(parallel)
        self._clock = clock
        self._ids = ids
        self._metrics = metrics
        self._tracer = tracer
        self._outside = outside

    async def answer(self, call: Call, request: ChatRequest, on_text: OnText) -> Answer:
        """Answer a call within its deadline; ``on_text`` is awaited with each piece.

        A repeat of a call that was answered whole is answered alike and costs nothing. However the call ends, also
        by cancelling, what it used is settled. Raises ``no_model``, ``not_found``, ``budget_exhausted``,
        ``context_too_long``, ``model_failed``, ``overloaded``, ``deadline_exceeded`` and what the orchestrator says.
        """
        try:
            async with asyncio.timeout(call.deadline.left()):
                model = await self._holder.get(request.model)
                async with self._places:
                    answer, settling = await self._budgeted(call, request, model, on_text)
                if settling is not None:
                    # An answer that a caller has acted on must be in the journal, or a repeat would get another.
                    await asyncio.wait({settling}, timeout=JOURNAL_SECONDS)
                return answer
        except TimeoutError as error:
            if call.deadline.left() > 0:
                raise
            raise OctoError("The time for this call is used up.", code="deadline_exceeded") from error

    async def _budgeted(self, call: Call, request: ChatRequest, model: ChatModel, on_text: OnText) -> _Settled:
        prompt = await model.count_tokens(request.messages) + tools_bound(request)
        wanted = _within_context(request.completion_limit, model.context_tokens - prompt)
        reserved = await self._budget.reserve(
            ReserveRequest(
                call.bearer, nested_key(call), prompt, wanted, model.name, cost_usd(model.name, ChatUsage.of(1, 0))
            ),
            call.deadline,
        )
        journaled = bytes(reserved.journal)
        if journaled != b"null":
            call.span.attributes["octollm.replayed"] = True
            return await _replay(journaled, on_text), None
        return await self._generate(request, model, reserved, prompt, on_text, call.deadline)

    async def _generate(
        self,
        request: ChatRequest,
        model: ChatModel,
        reserved: ReserveAnswer,
        prompt: int,
        on_text: OnText,
        deadline: Deadline,
    ) -> _Settled:
        granted = reserved.max_completion_tokens
        progress = _Progress()
        try:
            with self._tracer.span(f"model {model.name}", "client") as span:
                await self._write(_limited(request, granted), model, progress, on_text, span, prompt, deadline)
        except BaseException:
            self._budget.settle(reserved.reservation, progress.used)
            raise
        assert progress.final is not None
        answer = self._answer(model.name, progress.text, progress.final)
        return answer, self._budget.settle(
            reserved.reservation, progress.used, msgspec.Raw(msgspec.json.encode(answer))
        )

    async def _write(
        self,
        request: ChatRequest,
        model: ChatModel,
        progress: _Progress,
        on_text: OnText,
        span: Span,
        prompt: int,
        deadline: Deadline,
    ) -> None:
        """Have the model write; however that ends, ``progress`` has what it used, and so have metrics and span."""
        began = self._clock.monotonic()

        async def heard(text: str) -> None:
            if not progress.parts[1:]:
                span.attributes["octollm.first_token_ms"] = round((self._clock.monotonic() - began) * 1000, 1)
            await on_text(text)

        try:
            if self._outside is None:
                await _run(model, request, progress, heard)
            else:
                # A word that was handed over cannot be taken back: only what failed before it is tried again.
                await self._outside.call(
                    "chat", lambda: _run(model, request, progress, heard), deadline, repeats=lambda: not progress.parts
                )
            assert progress.final is not None
            tokens = progress.final.usage
            progress.used = Usage(tokens.prompt_tokens, tokens.completion_tokens, cost_usd(model.name, tokens) or 0.0)
        except BaseException as error:
            progress.used = self._upper_bound(error, progress, prompt, request.completion_limit or 0)
            raise
        finally:
            self._count(model.name, progress.used, span)

    def _upper_bound(self, error: BaseException, progress: _Progress, prompt: int, granted: int) -> Usage:
        """Return the most that a call which was cut off can have used.

        A refusal before the first word cost nothing. A local model stops when it is told to, so that no more
        tokens than bytes were written; a provider may have gone on to the limit.
        """
        text = progress.text
        if isinstance(error, OctoError) and not text:
            return Usage()
        written = min(granted, len(text.encode()) + _IN_FLIGHT) if self._holder.local else granted
        return Usage(prompt, written)

    def _answer(self, model: str, text: str, final: Final) -> Answer:
        tokens = final.usage
        price = cost_usd(model, tokens) or 0.0
        spent = Spent(tokens.prompt_tokens, tokens.completion_tokens, tokens.total_tokens, price)
        choice = ChatChoice(AnswerMessage(text, tool_calls=final.tool_calls or UNSET), final.finish_reason)
        return Answer("chatcmpl-" + self._ids.hex(), int(self._clock.now()), model, (choice,), spent)

    def _count(self, model: str, usage: Usage, span: Span) -> None:
        # Names of OpenTelemetry's semantic conventions, where there are any.
        span.attributes |= {
            "gen_ai.request.model": model,
            "gen_ai.usage.input_tokens": usage.prompt_tokens,
            "gen_ai.usage.output_tokens": usage.completion_tokens,
            "octollm.cost_usd": usage.cost_usd,
        }
        self._metrics.tokens.labels(model, "prompt").inc(usage.prompt_tokens)
        self._metrics.tokens.labels(model, "completion").inc(usage.completion_tokens)


async def _run(model: ChatModel, request: ChatRequest, progress: _Progress, on_text: OnText) -> None:
    async with contextlib.aclosing(model.stream(request)) as pieces:
        async for piece in pieces:
            if isinstance(piece, TextDelta):
                progress.parts.append(piece.text)
                await on_text(piece.text)
            else:
                progress.final = piece
    if progress.final is None:
        raise OctoError(f"{model.name} ended its answer without saying why.", code="model_failed")


async def _replay(journaled: bytes, on_text: OnText) -> Answer:
    try:
        answer = msgspec.json.decode(journaled, type=Answer)
    except msgspec.DecodeError as error:
        raise OctoError("The journaled answer of this call is not understood.", code="peer_protocol") from error
    await on_text(answer.text)
    return answer


def nested_key(call: Call) -> str:
    """Return the key of a call: the one it was sent with, or what a stock client's call stands for.

    A token that was made while another call was served names that call; a repeat of it then repeats this one. A
    token made by hand stands for no call, so each of its calls is its own.
    """
    if call.key is not None:
        return call.key
    parent = call.authority.call or call.request_id
    return NestedKeys(parent).next(call.service, call.operation, call.body)


def _within_context(limit: int | None, room: int) -> int | None:
    """Return the limit of the answer: what was asked for, and no more than the model has room for.

    Where the prompt alone seems too long the model decides: its count may be an upper bound.
    """
    if room < 1:
        return limit
    return room if limit is None else min(limit, room)


def _limited(request: ChatRequest, granted: int) -> ChatRequest:
    """Return the request cut to what was granted, in the member that its caller used."""
    if request.max_tokens is not None and request.max_completion_tokens is None:
        return msgspec.structs.replace(request, max_tokens=granted)
    return msgspec.structs.replace(request, max_tokens=None, max_completion_tokens=granted)
