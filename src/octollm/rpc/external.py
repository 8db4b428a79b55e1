"""Calls to external services: model providers, collectors, identity providers.

The HTTP client for them is pyqwest, which speaks HTTP/1.1 and HTTP/2 (RFC 9113) and uses the environment's proxies and
the system's certificates. Calls have the retry policy, the retry budget and the circuit breaker of internal calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from typing import TypeVar

import pyqwest
from pyqwest import HTTPTransport

from octollm.clock import Clock
from octollm.concurrency import Retries
from octollm.contracts.problems import to_problem
from octollm.errors import CallAttempts, OctoError, map_exceptions
from octollm.http_transport import TRANSPORT_ERRORS, classify_failure, create_external_transport
from octollm.limiter import ConcurrencyLimiter
from octollm.resilience import (
    Balancer,
    CallFailure,
    CallOutcome,
    Deadline,
    Ejection,
    EjectionPolicy,
    Instance,
    Recovery,
    RetryBudget,
    RetryPolicy,
)
from octollm.rpc.http_client import (
    CONNECT_SECONDS,
    MAX_ORIGINS,
    HttpClient,
    StreamedResponse,
    TransportError,
    create_connection_limiter,
    deadline_exceeded,
    host_of,
)
from octollm.telemetry import Logger, Metrics

T = TypeVar("T")


def create_external_http_client(*, read_timeout: float) -> HttpClient:
    """Return a client for external requests; ``read_timeout`` is the longest silence of a response, in seconds.

    It follows no redirects, which would carry an API key to another host.
    """
    return PyqwestClient(create_external_transport(connect_timeout=CONNECT_SECONDS, read_timeout=read_timeout))


class PyqwestClient(HttpClient):
    """An HTTP client on a transport of pyqwest; at most 100 requests to a host are in flight at once."""

    def __init__(self, transport: HTTPTransport) -> None:
        self._transport = transport
        self._limiters: dict[str, ConcurrencyLimiter] = {}
        self._active_timeouts: set[asyncio.Timeout] = set()
        self._closed = False

    async def aclose(self) -> None:
        """Close every connection; calls in flight fail with ``connection_lost``."""
        self._closed = True
        for timer in self._active_timeouts:
            # Ends the calls in flight at once; ``_closed`` tells this timeout from a missed deadline.
            timer.reschedule(0)
        await self._transport.aclose()

    @contextlib.asynccontextmanager
    async def stream(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None, *, seconds: float
    ) -> AsyncGenerator[StreamedResponse]:
        """Send a request and yield its response as it arrives; leaving early cancels the request."""
        host = host_of(url)
        sent = False
        request = pyqwest.Request(method, url, pyqwest.Headers(list(headers.items())), body)

        def translate(error: Exception) -> OctoError:
            match classify_failure(error):
                case "connect_timeout":
                    detail = f"{host} did not accept a connection in {CONNECT_SECONDS:g} s."
                    return TransportError(detail, code="connect_timeout", request_sent=False)
                case "connect_failed":
                    return TransportError(f"{host} could not be reached.", code="connect_failed", request_sent=sent)
                # asyncio's timeout has no text; the transport's read timeout has one.
                case "timeout" if not self._closed and str(error):
                    return TransportError(f"{host} sent nothing for too long.", code="read_timeout", request_sent=True)
                case "timeout" if not self._closed:
                    return deadline_exceeded(host, seconds)
                case _:
                    detail = f"The connection to {host} broke before its response was complete."
                    return TransportError(detail, code="connection_lost", request_sent=True)

        with map_exceptions(translate, *TRANSPORT_ERRORS):
            # The deadline is the outer one, so that it covers the wait for a slot too.
            async with self._in_time(seconds), self._limiter(host):
                response = await self._transport.execute(request)
                sent = True
                async with response:
                    names = {name.lower(): value for name, value in response.headers.items()}
                    yield StreamedResponse(response.status, names, _chunks(response))

    @contextlib.asynccontextmanager
    async def _in_time(self, seconds: float) -> AsyncGenerator[None]:
        async with asyncio.timeout(seconds) as timer:
            self._active_timeouts.add(timer)
            try:
                yield
            finally:
                self._active_timeouts.discard(timer)

    def _limiter(self, host: str) -> ConcurrencyLimiter:
        limiter = self._limiters.get(host)
        if limiter is None:
            if len(self._limiters) >= MAX_ORIGINS:
                self._limiters = {name: known for name, known in self._limiters.items() if known.running}
            limiter = self._limiters[host] = create_connection_limiter(host)
        return limiter


async def _chunks(response: pyqwest.Response) -> AsyncIterator[bytes]:
    async for chunk in response.content:
        yield bytes(chunk)


class ExternalClient:
    """Calls the external service ``name`` with retries within the deadline and a budget, behind a circuit breaker.

    By default the circuit opens for 5 s after five failures in a row, and for twice as long each time that its
    half-open probe fails.
    """

    def __init__(
        self,
        service: str,
        name: str,
        *,
        clock: Clock,
        metrics: Metrics,
        log: Logger,
        retry: RetryPolicy | None = None,
        ejection: EjectionPolicy | None = None,
        on_breaker: Callable[[str, Ejection | Recovery], None] | None = None,
    ) -> None:
        self._service = service
        self._name = name
        self._clock = clock
        self._metrics = metrics
        self._log = log
        self._retry = retry or RetryPolicy()
        self._on_breaker = on_breaker
        self._budget = RetryBudget()
        self._balancer = Balancer(random.randrange, ejection)
        self._balancer.update_instances((name,), clock.monotonic())

    async def call(
        self,
        operation: str,
        attempt: Callable[[], Awaitable[T]],
        deadline: Deadline,
        *,
        is_repeatable: Callable[[], bool],
    ) -> T:
        """Return the result of ``attempt``, retried after transient failures while ``is_repeatable`` allows it.

        Raises the last error of ``attempt``, ``unavailable`` while the circuit is open, and ``deadline_exceeded``.
        """
        self._budget.earn()
        began = self._clock.monotonic()
        reason: OctoError | None = None

        def next_delay(error: OctoError, attempts: int) -> float | None:
            nonlocal reason
            reason = error
            self._metrics.calls.labels(self._service, self._name, operation, error.code).inc()
            delay = self._retry.next_delay(
                # The service may have begun in any case, so ``is_repeatable`` alone decides whether to try again.
                CallFailure(to_problem(error).retryable, may_have_started=True, retry_after=error.retry_after),
                attempt=attempts,
                is_idempotent=is_repeatable(),
                remaining=deadline.remaining(),
                random=random.random(),  # noqa: S311  jitter is no secret
            )
            if delay is None or not self._budget.spend():
                seconds = self._clock.monotonic() - began
                error.call_attempts = CallAttempts(self._name, operation, self._name, attempts, seconds)
                return None
            self._metrics.call_retries.labels(self._service, self._name).inc()
            return delay

        async for retried in Retries(next_delay):
            # Outside the attempt: a deadline that has passed, or an open circuit, is final.
            deadline.raise_if_passed()
            instance = self._pick(operation, reason)
            with retried:
                result = await self._attempt(instance, operation, attempt)
                self._metrics.calls.labels(self._service, self._name, operation, "ok").inc()
                return result
        raise AssertionError("an attempt that fails for the last time raises its error")

    def _pick(self, operation: str, reason: OctoError | None) -> Instance:
        now = self._clock.monotonic()
        instance = self._balancer.pick(operation, now)
        if instance is None:
            if reason is not None:
                raise reason  # the failure that opened the circuit explains more than "the circuit is open"
            wait = self._balancer.seconds_until_available(now)
            raise OctoError(
                f"{self._name} has failed too often in a row; the next try is in {wait:.0f} s.",
                code="unavailable",
                retry_after=wait,
            )
        return instance

    async def _attempt(self, instance: Instance, operation: str, attempt: Callable[[], Awaitable[T]]) -> T:
        began = self._clock.monotonic()
        outcome: CallOutcome = "unknown"
        try:
            result = await attempt()
            outcome = "answered"
            return result
        except OctoError as error:
            outcome = _classify_outcome(error)
            raise
        finally:
            now = self._clock.monotonic()
            change = self._balancer.record_outcome(instance, operation, outcome, now - began, now)
            if isinstance(change, Ejection):
                self._metrics.ejections.labels(self._service, self._name, change.reason).inc()
                self._log.warning("circuit.opened", target=self._name, seconds=change.seconds)
            if change is not None and self._on_breaker is not None:
                self._on_breaker(self._name, change)


def _classify_outcome(error: OctoError) -> CallOutcome:
    """Return what a failure means for the circuit breaker: a refusal or a Retry-After comes from a healthy service."""
    if not to_problem(error).retryable or error.retry_after is not None:
        return "answered"
    return "failed"
