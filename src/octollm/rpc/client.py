"""The client that one service calls another with: headers, deadline, retries, circuit breaking and balancing over instances, a whole response or a stream."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec
from prometheus_client import Counter

from octollm.clock import Clock, IdGenerator
from octollm.context import current_context
from octollm.contracts.problems import to_problem
from octollm.contracts.services import OperationKind
from octollm.contracts.stream import NDJSON
from octollm.errors import CallAttempts, OctoError, RemoteError
from octollm.resilience import (
    Balancer,
    CallFailure,
    CallOutcome,
    Deadline,
    EjectionPolicy,
    Instance,
    OutageRetry,
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
"""Refusals that come before a handler runs. Other problems may be passed on from further down."""
OUTAGE_CODES = SHED_CODES | {"connect_failed", "connect_timeout", "connection_lost", "pool_timeout", "unavailable"}
"""Failures of a service that is not there just now, or of one that it needs: it may be there soon."""


def classify_failure(error: OctoError) -> CallFailure:
    """Return what a failure says of whether to try again."""
    if isinstance(error, TransportError):
        return CallFailure(retryable=True, may_have_started=error.request_sent, is_outage=error.code in OUTAGE_CODES)
    if isinstance(error, RemoteError):
        return CallFailure(
            error.retryable, error.code not in SHED_CODES, error.retry_after, is_outage=error.code in OUTAGE_CODES
        )
    # Ours: no instance could be called.
    return CallFailure(
        retryable=False, may_have_started=False, retry_after=error.retry_after, is_outage=error.code in OUTAGE_CODES
    )


def classify_outcome(error: OctoError) -> CallOutcome:
    """Return what a failure says of the instance that was called."""
    if isinstance(error, TransportError):
        return "unknown" if error.code == "pool_timeout" else "failed"
    if isinstance(error, RemoteError):
        return "erred" if error.code in ("internal", "peer_protocol") and error.status >= 500 else "answered"
    if error.code == "deadline_exceeded":
        return "late"
    return "erred" if error.code == "peer_protocol" else "unknown"


T = TypeVar("T")

MAX_SERVICES = 1024
NO_OUTAGE_RETRY = OutageRetry()


class CallTarget(msgspec.Struct, frozen=True):
    """What is called: ``path`` with its parameters filled in, and a query string if any."""

    service: str
    operation: str
    method: str
    path: str
    kind: OperationKind


class OutgoingCall(msgspec.Struct, frozen=True):
    """One call to be made. ``bearer`` opens it; ``key`` is its ``Idempotency-Key``.

    ``patience`` is for a caller that would rather wait than fail when a service is away for a while.
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
    """What is known of a service that is called."""

    balancer: Balancer
    budget: RetryBudget = field(default_factory=RetryBudget)


@dataclass(slots=True)
class _CallProgress:
    """What a call has been through."""

    began: float
    failing_since: float | None = None
    tries: int = 0
    instance: str = ""
    failed: set[str] = field(default_factory=set[str])


class ServiceClient:
    """Calls other services in the name of one service."""

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
    ) -> None:
        self._service = service
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
        """Make a call and return its typed answer.

        With ``on_line`` the answer is asked for as a stream and every line before the last is handed over.
        Raises what the peer said as :class:`RemoteError`, and transport failures after the retries.
        """
        if on_event is None:
            whole = await self.send(call)
            body = whole.body
        else:
            told = StreamSink(on_event)
            body = await self._call_in_span(call, lambda url, headers: self._read_events(call, url, headers, told))
        try:
            return msgspec.json.decode(body, type=response_type, dec_hook=decode_model)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise OctoError(
                f"{call.target.service} answered {call.target.operation} in another form than agreed: {error}",
                code="peer_protocol",
            ) from error

    async def send(self, call: OutgoingCall) -> HttpResponse:
        """Make a call and return its whole answer; a status of 400 or more is raised."""
        target = call.target
        key = cache_key(f"{target.service}{target.path}", call.bearer) if target.method == "GET" else None

        async def once(url: str, headers: dict[str, str]) -> HttpResponse:
            kept = None if key is None else self._etag_cache.add_validator(key, headers)
            answer = await self._http.send(target.method, url, headers, call.body, seconds=call.deadline.remaining())
            if answer.status >= 400:
                raise parse_problem(target.service, answer.status, answer.body, answer.headers.get("retry-after"))
            return answer if key is None else self._etag_cache.store(key, kept, answer)

        return await self._call_in_span(call, once)

    async def stream(self, call: OutgoingCall, consume: Callable[[StreamedResponse], Awaitable[T]]) -> T:
        """Make a call and hand its answer to ``consume`` as it comes; a status of 400 or more is raised."""

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
        """Make a call in a span of its own, which its callee's is a child of."""
        target = call.target
        span = self._tracer.start(_span_name(target), "client")
        keep = False
        try:
            return await self._call_with_retries(call, attempt, span)
        except BaseException as error:
            span.record_error(error)
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
        """Try a call as often as the policies allow."""
        target = call.target
        peer = self._service_state(target.service)
        peer.budget.earn()
        headers = self._headers(call, span)
        trail = _CallProgress(self._clock.monotonic())
        reason: OctoError | None = None
        while True:
            trail.tries += 1
            try:
                call.deadline.raise_if_passed()
                result = await self._attempt(call, attempt, headers, peer, trail)
            except OctoError as error:
                self._count(target, error.code)
                if reason is None or isinstance(error, TransportError | RemoteError):
                    reason = error
                delay = self._retry_delay(call, error, peer, trail)
                if delay is None:
                    # What an instance did says more than that none may be called for a while.
                    seconds = self._clock.monotonic() - trail.began
                    reason.call_attempts = CallAttempts(
                        target.service, target.operation, trail.instance, trail.tries, seconds
                    )
                    if reason is error:
                        raise
                    raise reason from error
                self._metrics.call_retries.labels(self._service, target.service).inc()
                await asyncio.sleep(delay)
            else:
                self._count(target, "ok")
                return result
            finally:
                if reason is not None or span.trace.sampled:
                    span.attributes |= {"octollm.attempts": trail.tries, "octollm.instance": trail.instance}

    def _retry_delay(
        self, call: OutgoingCall, error: OctoError, state: _ServiceState, progress: _CallProgress
    ) -> float | None:
        """Return how long to wait before the next try, ``None`` to stop."""
        failure = classify_failure(error)
        repeats_safely = call.target.kind == "read_only" or call.key is not None
        left = call.deadline.remaining()
        delay = self._retry.next_delay(
            failure,
            attempt=progress.tries,
            is_idempotent=repeats_safely,
            remaining=left,
            random=random.random(),  # noqa: S311  jitter is no secret
        )
        now = self._clock.monotonic()
        if progress.failing_since is None:
            progress.failing_since = now
        if delay is None or not state.budget.spend():
            waited = now - progress.failing_since
            delay = call.outage_retry.next_delay(failure, elapsed=waited, is_idempotent=repeats_safely, remaining=left)
        return delay

    async def _attempt(
        self,
        call: OutgoingCall,
        attempt: Callable[[str, dict[str, str]], Awaitable[T]],
        headers: dict[str, str],
        state: _ServiceState,
        progress: _CallProgress,
    ) -> T:
        """Try a call once, at an instance that has not failed it where there is one."""
        operation = call.target.operation
        instance = self._pick_instance(call.target, state, progress)
        headers["X-Timeout-Ms"] = call.deadline.to_header()
        began = self._clock.monotonic()
        outcome: CallOutcome = "unknown"
        try:
            result = await attempt(instance.url + call.target.path, dict(headers))
            outcome = "answered"
            return result
        except OctoError as error:
            outcome = classify_outcome(error)
            progress.failed.add(instance.url)
            if error.code in SHED_CODES and error.retry_after:
                instance.busy_until = self._clock.monotonic() + error.retry_after
            raise
        finally:
            now = self._clock.monotonic()
            ejected = state.balancer.record_outcome(instance, operation, outcome, now - began, now)
            if ejected is not None:
                self._metrics.ejections.labels(self._service, call.target.service, ejected.reason).inc()
                if self._log is not None:
                    self._log.warning(
                        "instance.ejected",
                        target=call.target.service,
                        instance=ejected.url,
                        reason=ejected.reason,
                        seconds=ejected.seconds,
                    )

    def _pick_instance(self, target: CallTarget, state: _ServiceState, progress: _CallProgress) -> Instance:
        """Return an instance that may be called."""
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
        peer = self._services.get(service)
        if peer is None:
            if len(self._services) >= MAX_SERVICES:
                # Services come and go: what is known of those that are gone is not kept for ever.
                self._services.clear()
            peer = self._services[service] = _ServiceState(Balancer(random.randrange, self._ejection))
        return peer

    def _headers(self, call: OutgoingCall, span: Span) -> dict[str, str]:
        context = current_context()
        headers = {
            "Authorization": f"Bearer {call.bearer}",
            "X-Request-ID": "req-" + self._ids.hex(),
            "X-Correlation-ID": context.correlation_id or "corr-" + self._ids.hex(),
            "traceparent": span.trace.traceparent,
            **call.headers,
        }
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
    named = target.operation.startswith(f"{target.service}.")
    return target.operation if named else f"{target.service}.{target.operation}"
