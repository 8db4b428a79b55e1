"""Calling another service: headers, deadline, retries, breaker, one answer or a stream."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec

from octollm.clock import Clock, Ids
from octollm.context import current_scene
from octollm.contracts.services import OperationKind
from octollm.contracts.stream import NDJSON, Line
from octollm.errors import OctoError, RemoteError
from octollm.resilience import Breaker, BreakerPolicy, Deadline, Failure, Patience, RetryBudget, RetryPolicy
from octollm.rpc.discovery import Discovery
from octollm.rpc.http import Answer, Http, Streamed, TransportError
from octollm.rpc.problems import error_from_response, error_of
from octollm.rpc.shapes import model_of
from octollm.telemetry import Metrics, Span, Tracer

T = TypeVar("T")
OnLine = Callable[[Line], Awaitable[None]]

SHED = frozenset({"overloaded", "draining", "rate_limited"})
"""Refusals that come before a handler runs. Other problems may be passed on from further down."""
AWAY = SHED | {"connect_failed", "connect_timeout", "connection_lost", "pool_timeout", "unavailable"}
"""Failures of a service that is not there just now, or of one that it needs: it may be there soon."""
MAX_BREAKERS = 1024
NONE = Patience()
_MAX_LINE = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Target:
    """What is called: ``path`` with its parameters filled in, and a query string if any."""

    service: str
    operation: str
    method: str
    path: str
    kind: OperationKind


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One call to be made. ``bearer`` opens it; ``key`` is its ``Idempotency-Key``.

    ``patience`` is for a caller that would rather wait than fail when a service is away for a while.
    """

    target: Target
    bearer: str
    deadline: Deadline
    body: bytes | None = None
    key: str | None = None
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    patience: Patience = NONE


class Caller:
    """Calls other services in the name of one service."""

    def __init__(
        self,
        service: str,
        http: Http,
        discovery: Discovery,
        *,
        clock: Clock,
        ids: Ids,
        metrics: Metrics,
        tracer: Tracer | None = None,
        retry: RetryPolicy | None = None,
        breaker: BreakerPolicy | None = None,
    ) -> None:
        self._service = service
        self._http = http
        self._discovery = discovery
        self._clock = clock
        self._ids = ids
        self._metrics = metrics
        self._tracer = tracer or Tracer(service, clock)
        self._retry = retry or RetryPolicy()
        self._breaker_policy = breaker or BreakerPolicy()
        self._breakers: dict[str, Breaker] = {}
        self._budgets: dict[str, RetryBudget] = {}

    async def answer(self, call: Outgoing, kind: type[T], *, on_line: OnLine | None = None) -> T:
        """Make a call and return its typed answer.

        With ``on_line`` the answer is asked for as a stream and every line before the last is handed over.
        Raises what the peer said as :class:`RemoteError`, and transport failures after the retries.
        """
        if on_line is None:
            whole = await self.send(call)
            body = whole.body
        else:
            told = _Told(on_line)
            body = await self._tried(call, lambda url, headers: self._lines(call, url, headers, told))
        try:
            return msgspec.json.decode(body, type=kind, dec_hook=model_of)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise OctoError(
                f"{call.target.service} answered {call.target.operation} in another form than agreed: {error}",
                code="peer_protocol",
            ) from error

    async def send(self, call: Outgoing) -> Answer:
        """Make a call and return its whole answer; a status of 400 or more is raised."""

        async def once(url: str, headers: dict[str, str]) -> Answer:
            answer = await self._http.send(call.target.method, url, headers, call.body, seconds=call.deadline.left())
            if answer.status >= 400:
                raise error_from_response(
                    call.target.service, answer.status, answer.body, answer.headers.get("retry-after")
                )
            return answer

        return await self._tried(call, once)

    async def stream(self, call: Outgoing, consume: Callable[[Streamed], Awaitable[T]]) -> T:
        """Make a call and hand its answer to ``consume`` as it comes; a status of 400 or more is raised."""

        async def once(url: str, headers: dict[str, str]) -> T:
            async with self._http.stream(
                call.target.method, url, headers, call.body, seconds=call.deadline.left()
            ) as streamed:
                await _raise_refusal(call.target.service, streamed)
                return await consume(streamed)

        return await self._tried(call, once)

    async def _lines(self, call: Outgoing, url: str, headers: dict[str, str], told: _Told) -> bytes:
        headers["Accept"] = NDJSON
        told.begin()
        async with self._http.stream(
            call.target.method, url, headers, call.body, seconds=call.deadline.left()
        ) as streamed:
            await _raise_refusal(call.target.service, streamed)
            if not streamed.headers.get("content-type", "").startswith(NDJSON):
                return await _whole(call.target.service, streamed)
            rest = b""
            async for chunk in streamed.chunks:
                *whole, rest = (rest + chunk).split(b"\n")
                if len(rest) > _MAX_LINE:
                    raise OctoError(f"{call.target.service} sent a line that is too long.", code="peer_protocol")
                for text in whole:
                    line = _line(call.target.service, text)
                    if line.type == "result":
                        return bytes(line.result)
                    if line.type == "problem" and line.problem is not None:
                        raise error_of(line.problem, call.target.service)
                    await told.tell(line)
        raise TransportError(
            f"{call.target.service} ended its answer without a result.", code="connection_lost", began=True
        )

    async def _tried(self, call: Outgoing, once: Callable[[str, dict[str, str]], Awaitable[T]]) -> T:
        """Make a call in a span of its own, which its callee's is a child of."""
        span = self._tracer.start(_span_name(call.target), "client")
        try:
            return await self._repeated(call, once, span)
        except BaseException as error:
            span.failed(error)
            raise
        finally:
            self._tracer.end(span)

    async def _repeated(self, call: Outgoing, once: Callable[[str, dict[str, str]], Awaitable[T]], span: Span) -> T:
        """Try a call as often as the policies allow."""
        target = call.target
        budget = self._budgets.setdefault(target.service, RetryBudget())
        budget.earn()
        headers = self._headers(call, span)
        tried = 0
        failed: set[str] = set()
        began = self._clock.monotonic()
        reason: OctoError | None = None
        while True:
            call.deadline.check()
            tried += 1
            span.attributes["octollm.attempts"] = tried
            try:
                result = await self._try(call, once, headers, failed, span)
            except OctoError as error:
                self._count(target, error.code)
                failure = _failure(error)
                if reason is None or isinstance(error, TransportError | RemoteError):
                    reason = error
                repeats_safely = target.kind == "safe" or call.key is not None
                left = call.deadline.left()
                delay = self._retry.wait(
                    failure,
                    tried=tried,
                    repeats_safely=repeats_safely,
                    left=left,
                    random=random.random(),  # noqa: S311  jitter is no secret
                )
                if delay is None or not budget.spend():
                    waited = self._clock.monotonic() - began
                    delay = call.patience.wait(failure, waited=waited, repeats_safely=repeats_safely, left=left)
                if delay is None and reason is not error:
                    # What an instance did says more than that none may be called for a while.
                    raise reason from error
                if delay is None:
                    raise
                self._metrics.call_retries.labels(self._service, target.service).inc()
                await asyncio.sleep(delay)
            else:
                self._count(target, "ok")
                return result

    async def _try(
        self,
        call: Outgoing,
        once: Callable[[str, dict[str, str]], Awaitable[T]],
        headers: dict[str, str],
        failed: set[str],
        span: Span,
    ) -> T:
        """Try a call once, at an instance that has not ``failed`` it where there is one."""
        instance = self._pick(call.target.service, failed)
        breaker = self._breakers[instance]
        span.attributes["octollm.instance"] = instance
        headers["X-Timeout-Ms"] = call.deadline.header()
        try:
            result = await once(instance + call.target.path, dict(headers))
        except TransportError:
            failed.add(instance)
            breaker.failed(self._clock.monotonic())
            raise
        except RemoteError:
            failed.add(instance)
            breaker.succeeded()
            raise
        breaker.succeeded()
        return result

    def _pick(self, service: str, failed: Set[str]) -> str:
        """Return an instance that may be called; those in ``failed`` come last."""
        now = self._clock.monotonic()
        instances = self._discovery.instances(service)
        if len(self._breakers) > MAX_BREAKERS:
            # Instances come and go: what is known of those that are gone is not kept for ever.
            self._breakers.clear()
        for instance in sorted(random.sample(instances, len(instances)), key=failed.__contains__):
            if self._breakers.setdefault(instance, Breaker(self._breaker_policy)).allows(now):
                return instance
        wait = min(self._breakers[instance].wait(now) for instance in instances)
        raise OctoError(
            f"{service} has not answered for a while; the next try is in {wait:.0f} s.",
            code="unavailable",
            retry_after=wait,
        )

    def _headers(self, call: Outgoing, span: Span) -> dict[str, str]:
        scene = current_scene()
        headers = {
            "Authorization": f"Bearer {call.bearer}",
            "X-Request-ID": "req-" + self._ids.hex(),
            "X-Correlation-ID": scene.correlation_id or "corr-" + self._ids.hex(),
            "traceparent": span.trace.traceparent,
            **call.headers,
        }
        if call.body is not None:
            headers["Content-Type"] = call.content_type
        if call.key is not None:
            headers["Idempotency-Key"] = call.key
        return headers

    def _count(self, target: Target, outcome: str) -> None:
        self._metrics.calls.labels(self._service, target.service, target.operation, outcome).inc()


def _span_name(target: Target) -> str:
    named = target.operation.startswith(f"{target.service}.")
    return target.operation if named else f"{target.service}.{target.operation}"


class _Told:
    """Hands lines on; the first text of an answer that is begun again voids what an earlier one told."""

    def __init__(self, on_line: OnLine) -> None:
        self._on_line = on_line
        self._any = False
        self._void = False

    def begin(self) -> None:
        """Begin an answer."""
        self._void = self._any

    async def tell(self, line: Line) -> None:
        """Hand a line on."""
        if line.type == "token":
            if self._void:
                line = msgspec.structs.replace(line, reset=True)
            self._any, self._void = True, False
        await self._on_line(line)


def _failure(error: OctoError) -> Failure:
    if isinstance(error, TransportError):
        return Failure(retryable=True, began=error.began, away=error.code in AWAY)
    if isinstance(error, RemoteError):
        return Failure(error.retryable, error.code not in SHED, error.retry_after, away=error.code in AWAY)
    # Ours: no instance could be called.
    return Failure(retryable=False, began=False, retry_after=error.retry_after, away=error.code in AWAY)


def _line(service: str, text: bytes) -> Line:
    try:
        return msgspec.json.decode(text, type=Line)
    except msgspec.DecodeError as error:
        raise OctoError(f"{service} sent a line that is not understood.", code="peer_protocol") from error


async def _whole(service: str, streamed: Streamed) -> bytes:
    """Return the one answer of a callee that does not stream, which is its right."""
    body = b""
    async for chunk in streamed.chunks:
        body += chunk
        if len(body) > _MAX_LINE:
            raise OctoError(f"{service} sent an answer that is too long.", code="peer_protocol")
    return body


async def _raise_refusal(service: str, streamed: Streamed) -> None:
    if streamed.status < 400:
        return
    body = b""
    async for chunk in streamed.chunks:
        body += chunk
        if len(body) > 65536:
            break
    raise error_from_response(service, streamed.status, body, streamed.headers.get("retry-after"))
