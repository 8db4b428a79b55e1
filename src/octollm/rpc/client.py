"""The client for calls between services: one call, over as many attempts and instances as its policies allow.

It adds the headers of an internal call, keeps the deadline, retries within a budget, skips instances whose circuit
breaker is open, balances over the rest, and returns a whole response or a stream.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
from prometheus_client import Counter

from octollm.clock import Clock, IdGenerator
from octollm.concurrency import retry
from octollm.context import current_context
from octollm.contracts.declarations import DeclaredOperation
from octollm.contracts.problems import to_problem
from octollm.contracts.services import OperationKind
from octollm.contracts.stream import NDJSON
from octollm.errors import CallAttempts, OctoError, RemoteError
from octollm.resilience import (
    Balancer,
    CallFailure,
    CallOutcome,
    Deadline,
    Ejection,
    EjectionPolicy,
    Instance,
    OutageRetry,
    Recovery,
    RetryBudget,
    RetryPolicy,
)
from octollm.rpc.codec import decode_model
from octollm.rpc.discovery import Discovery
from octollm.rpc.http_client import ETagCache, HttpClient, HttpResponse, StreamedResponse, TransportError, cache_key
from octollm.rpc.ndjson import OnEvent, StreamSink, raise_for_status, read_events
from octollm.rpc.problems import parse_problem
from octollm.telemetry import Logger, Metrics, Span, Tracer
from octollm.telemetry.spans import UNSAMPLED_OPERATIONS

SHED_CODES = frozenset({"overloaded", "draining", "rate_limited"})
"""Load shedding: refusals before a handler runs. Other problems may have been passed on from further down."""
NEW_ATTEMPT_CODES = frozenset({"step_retry"})
"""Refusals that only a new attempt of the step can overcome, with a key and reasons of its own."""
OUTAGE_CODES = SHED_CODES | {"connect_failed", "connect_timeout", "connection_lost", "pool_timeout", "unavailable"}
"""Failures of a service that is away, or of one that it depends on. Waiting may help."""


def classify_failure(error: OctoError) -> CallFailure:
    """Return what a failed attempt means for the retry policy."""
    if isinstance(error, TransportError):
        return CallFailure(retryable=True, may_have_started=error.request_sent, is_outage=error.code in OUTAGE_CODES)
    if isinstance(error, RemoteError):
        return CallFailure(
            error.retryable and error.code not in NEW_ATTEMPT_CODES,
            error.code not in SHED_CODES,
            error.retry_after,
            is_outage=error.code in OUTAGE_CODES,
        )
    # Raised here, before any instance was called.
    return CallFailure(
        retryable=False, may_have_started=False, retry_after=error.retry_after, is_outage=error.code in OUTAGE_CODES
    )


def classify_outcome(error: OctoError) -> CallOutcome:
    """Return what a failed attempt means for the instance that was called."""
    if isinstance(error, TransportError):
        # The connection pool is ours: waiting for it says nothing about the instance.
        return "unknown" if error.code == "pool_timeout" else "failed"
    if isinstance(error, RemoteError):
        # Any other problem comes from an instance that works, or from a service further down.
        return "erred" if error.code in ("internal", "peer_protocol") and error.status >= 500 else "answered"
    if error.code == "deadline_exceeded":
        return "late"
    return "erred" if error.code == "peer_protocol" else "unknown"


T = TypeVar("T")

OnBreaker = Callable[[str, Ejection | Recovery], None]
"""Called with the callee when the circuit breaker of one of its instances opens or closes."""
MAX_SERVICES = 1024
NO_OUTAGE_RETRY = OutageRetry()


class CallTarget(msgspec.Struct, frozen=True):
    """The operation to call: ``path`` has its parameters filled in, and the query string if there is one."""

    service: str
    operation: str
    method: str
    path: str
    kind: OperationKind

    @classmethod
    def of(cls, declared: DeclaredOperation[Any, Any], query: str = "", **parameters: str) -> CallTarget:
        """Return a declared operation as a target, with the parameters of its path and an encoded ``query``."""
        path = declared.format_service_path(**parameters)
        # Without a key, the client repeats read-only calls only; where no key is claimed, a repeat is as harmless.
        repeats_safely = declared.kind == "idempotent" and not declared.claims_key
        return cls(
            declared.service,
            declared.id.replace(":", "."),
            declared.method,
            f"{path}?{query}" if query else path,
            "read_only" if repeats_safely else declared.kind,
        )


class OutgoingCall(msgspec.Struct, frozen=True):
    """One call to make, authorized by ``bearer``; ``key`` is its ``Idempotency-Key``.

    ``outage_retry`` lets a caller wait for a service that is away instead of failing.
    """

    target: CallTarget
    bearer: str
    deadline: Deadline
    body: bytes | None = None
    key: str | None = None
    content_type: str = "application/json"
    headers: Mapping[str, str] = msgspec.field(default_factory=dict[str, str])
    outage_retry: OutageRetry = NO_OUTAGE_RETRY


@dataclass(slots=True)
class _ServiceState:
    """The balancer and the retry budget of one callee."""

    balancer: Balancer
    budget: RetryBudget = field(default_factory=RetryBudget)


@dataclass(slots=True)
class _CallProgress:
    """The attempts of one call so far."""

    began: float
    failing_since: float | None = None
    tries: int = 0
    instance: str = ""
    failed: set[str] = field(default_factory=set[str])


class ServiceClient:
    """Calls other services on behalf of one service."""

    def __init__(
        self,
        service: str,
        http: HttpClient,
        discovery: Discovery,
        *,
        clock: Clock,
        ids: IdGenerator,
        metrics: Metrics,
        tracer: Tracer | None = None,
        log: Logger | None = None,
        retry: RetryPolicy | None = None,
        ejection: EjectionPolicy | None = None,
        on_breaker: OnBreaker | None = None,
    ) -> None:
        self._service = service
        self._on_breaker = on_breaker
        self._http = http
        self._discovery = discovery
        self._clock = clock
        self._ids = ids
        self._metrics = metrics
        self._tracer = tracer or Tracer(service, clock)
        self._retry = retry or RetryPolicy()
        self._log = log
        self._ejection = ejection or EjectionPolicy()
        self._etag_cache = ETagCache()
        self._services: dict[str, _ServiceState] = {}
        self._counters: dict[tuple[str, str, str], Counter] = {}

    async def call(self, call: OutgoingCall, response_type: type[T], *, on_event: OnEvent | None = None) -> T:
        """Make a call and return its typed response.

        With ``on_event`` the response is requested as NDJSON, and each event before the result goes to it.
        Raises the callee's problem as :class:`RemoteError`, a transport failure once the retries are used up, and
        ``peer_protocol`` for a response that is not a ``response_type``.
        """
        if on_event is None:
            body = (await self.send(call)).body
        else:
            sink = StreamSink(on_event)
            body = await self._call_in_span(call, lambda url, headers: self._read_events(call, url, headers, sink))
        try:
            return msgspec.json.decode(body, type=response_type, dec_hook=decode_model)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise OctoError(
                f"{call.target.service} sent a malformed response to {call.target.operation}: {error}",
                code="peer_protocol",
            ) from error

    async def send(self, call: OutgoingCall) -> HttpResponse:
        """Make a call and return its whole response; a status of 400 or more is raised."""
        target = call.target
        key = cache_key(f"{target.service}{target.path}", call.bearer) if target.method == "GET" else None

        async def once(url: str, headers: dict[str, str]) -> HttpResponse:
            cached = None if key is None else self._etag_cache.add_validator(key, headers)
            response = await self._http.send(target.method, url, headers, call.body, seconds=call.deadline.remaining())
            if response.status >= 400:
                raise parse_problem(target.service, response.status, response.body, response.headers.get("retry-after"))
            return response if key is None else self._etag_cache.store(key, cached, response)

        return await self._call_in_span(call, once)

    async def stream(self, call: OutgoingCall, consume: Callable[[StreamedResponse], Awaitable[T]]) -> T:
        """Make a call and pass its response to ``consume`` as it arrives; a status of 400 or more is raised."""

        async def once(url: str, headers: dict[str, str]) -> T:
            async with self._http.stream(
                call.target.method, url, headers, call.body, seconds=call.deadline.remaining()
            ) as streamed:
                await raise_for_status(call.target.service, streamed)
                return await consume(streamed)

        return await self._call_in_span(call, once)

    async def _read_events(self, call: OutgoingCall, url: str, headers: dict[str, str], sink: StreamSink) -> bytes:
        headers["Accept"] = NDJSON
        sink.begin_attempt()
        async with self._http.stream(
            call.target.method, url, headers, call.body, seconds=call.deadline.remaining()
        ) as streamed:
            await raise_for_status(call.target.service, streamed)
            return await read_events(call.target.service, streamed, sink)

    async def _call_in_span(self, call: OutgoingCall, attempt: Callable[[str, dict[str, str]], Awaitable[T]]) -> T:
        """Make a call in a client span, the parent of the callee's server span."""
        target = call.target
        span = self._tracer.start(_span_name(target), "client")
        keep = False
        try:
            return await self._call_with_retries(call, attempt, span)
        except BaseException as error:
            span.record_error(error)
            # A failed call keeps its span although its trace is not sampled. A poll would keep too many.
            keep = (
                target.operation not in UNSAMPLED_OPERATIONS
                and isinstance(error, OctoError)
                and to_problem(error).status >= 500
            )
            raise
        finally:
            self._tracer.end(span, keep=keep)

    async def _call_with_retries(
        self, call: OutgoingCall, attempt: Callable[[str, dict[str, str]], Awaitable[T]], span: Span
    ) -> T:
        target = call.target
        state = self._service_state(target.service)
        state.budget.earn()
        # Made once: X-Request-ID names the call, not an attempt, so a callee can recognize a retry.
        headers = self._headers(call, span)
        progress = _CallProgress(self._clock.monotonic())
        reason: OctoError | None = None

        async def attempt_once() -> T:
            progress.tries += 1
            call.deadline.raise_if_passed()
            return await self._attempt(call, attempt, headers, state, progress)

        def next_delay(error: OctoError, _number: int) -> float | None:
            nonlocal reason
            self._count(target, error.code)
            # The last failure of an instance explains more than "no instance may be called now".
            if reason is None or isinstance(error, TransportError | RemoteError):
                reason = error
            delay = self._retry_delay(call, error, state, progress)
            if delay is not None:
                self._metrics.call_retries.labels(self._service, target.service).inc()
            return delay

        try:
            result = await retry(attempt_once, next_delay)
        except OctoError as error:
            final = reason or error
            seconds = self._clock.monotonic() - progress.began
            final.call_attempts = CallAttempts(
                target.service, target.operation, progress.instance, progress.tries, seconds
            )
            if final is error:
                raise
            raise final from error
        finally:
            if reason is not None or span.trace.sampled:
                span.attributes |= {"octollm.attempts": progress.tries, "octollm.instance": progress.instance}
        self._count(target, "ok")
        return result

    def _retry_delay(
        self, call: OutgoingCall, error: OctoError, state: _ServiceState, progress: _CallProgress
    ) -> float | None:
        """Return the seconds to wait before the next attempt, or ``None`` to stop."""
        failure = classify_failure(error)
        repeats_safely = call.target.kind == "read_only" or call.key is not None
        remaining = call.deadline.remaining()
        delay = self._retry.next_delay(
            failure,
            attempt=progress.tries,
            is_idempotent=repeats_safely,
            remaining=remaining,
            random=random.random(),  # noqa: S311  jitter needs no secret randomness
        )
        now = self._clock.monotonic()
        if progress.failing_since is None:
            progress.failing_since = now
        if delay is None or not state.budget.spend():
            # Outside the budget: one attempt a second of one call multiplies no outage.
            delay = call.outage_retry.next_delay(
                failure, elapsed=now - progress.failing_since, is_idempotent=repeats_safely, remaining=remaining
            )
        return delay

    async def _attempt(
        self,
        call: OutgoingCall,
        attempt: Callable[[str, dict[str, str]], Awaitable[T]],
        headers: dict[str, str],
        state: _ServiceState,
        progress: _CallProgress,
    ) -> T:
        """Try a call once, preferring an instance that has not failed it yet."""
        operation = call.target.operation
        instance = self._pick_instance(call.target, state, progress)
        headers["X-Timeout-Ms"] = call.deadline.to_header()
        began = self._clock.monotonic()
        outcome: CallOutcome = "unknown"
        try:
            # A copy: an attempt adds If-None-Match or Accept, which the next one must not take for the call's own.
            result = await attempt(instance.url + call.target.path, dict(headers))
            outcome = "answered"
            return result
        except OctoError as error:
            outcome = classify_outcome(error)
            progress.failed.add(instance.url)
            if error.code in SHED_CODES and error.retry_after:
                # Until then the balancer prefers the other instances.
                instance.busy_until = self._clock.monotonic() + error.retry_after
            raise
        finally:
            now = self._clock.monotonic()
            change = state.balancer.record_outcome(instance, operation, outcome, now - began, now)
            if change is not None:
                self._report_breaker(call.target.service, change)

    def _report_breaker(self, service: str, change: Ejection | Recovery) -> None:
        if isinstance(change, Ejection):
            self._metrics.ejections.labels(self._service, service, change.reason).inc()
            if self._log is not None:
                self._log.warning(
                    "instance.ejected",
                    target=service,
                    instance=change.url,
                    reason=change.reason,
                    seconds=change.seconds,
                )
        if self._on_breaker is not None:
            self._on_breaker(service, change)

    def _pick_instance(self, target: CallTarget, state: _ServiceState, progress: _CallProgress) -> Instance:
        now = self._clock.monotonic()
        state.balancer.update_instances(self._discovery.instances(target.service), now)
        instance = state.balancer.pick(target.operation, now, progress.failed)
        if instance is None:
            wait = state.balancer.seconds_until_available(now)
            raise OctoError(
                f"{target.service} has not answered for a while; the next try is in {wait:.0f} s.",
                code="unavailable",
                retry_after=wait,
            )
        progress.instance = instance.url
        return instance

    def _service_state(self, service: str) -> _ServiceState:
        state = self._services.get(service)
        if state is None:
            if len(self._services) >= MAX_SERVICES:
                # Arms come and go. Losing a balancer's memory is cheap; keeping every one would leak.
                self._services.clear()
            state = self._services[service] = _ServiceState(Balancer(random.randrange, self._ejection))
        return state

    def _headers(self, call: OutgoingCall, span: Span) -> dict[str, str]:
        context = current_context()
        headers = {
            "Authorization": f"Bearer {call.bearer}",
            "X-Request-ID": "req-" + self._ids.hex(),
            "X-Correlation-ID": context.correlation_id or "corr-" + self._ids.hex(),
            "traceparent": span.trace.traceparent,
            **call.headers,
        }
        if span.trace.state:
            headers["tracestate"] = span.trace.state
        if context.baggage:
            headers["baggage"] = context.baggage
        if call.body is not None:
            headers["Content-Type"] = call.content_type
        if call.key is not None:
            headers["Idempotency-Key"] = call.key
        return headers

    def _count(self, target: CallTarget, outcome: str) -> None:
        key = (target.service, target.operation, outcome)
        counter = self._counters.get(key)
        if counter is None:
            counter = self._counters[key] = self._metrics.calls.labels(self._service, *key)
        counter.inc()


def _span_name(target: CallTarget) -> str:
    is_qualified = target.operation.startswith(f"{target.service}.")
    return target.operation if is_qualified else f"{target.service}.{target.operation}"
