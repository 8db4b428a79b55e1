"""Calling another service: headers, deadline, retries, balance over its instances, one answer or a stream."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec
from prometheus_client import Counter

from octollm.clock import Clock, Ids
from octollm.context import current_scene
from octollm.contracts.problems import problem_of
from octollm.contracts.services import OperationKind
from octollm.contracts.stream import NDJSON
from octollm.errors import OctoError, RemoteError, Tried
from octollm.resilience import (
    Balancer,
    Deadline,
    EjectionPolicy,
    Instance,
    Outcome,
    Patience,
    RetryBudget,
    RetryPolicy,
)
from octollm.rpc.discovery import Discovery
from octollm.rpc.http import Answer, Http, Streamed, TransportError
from octollm.rpc.kept import Kept, key_of
from octollm.rpc.lines import OnLine, Told, raise_refusal, read_lines
from octollm.rpc.outcomes import SHED, failure_of, outcome_of
from octollm.rpc.problems import error_from_response
from octollm.rpc.shapes import model_of
from octollm.telemetry import Log, Metrics, Span, Tracer
from octollm.telemetry.spans import QUIET

T = TypeVar("T")

MAX_SERVICES = 1024
NONE = Patience()


class Target(msgspec.Struct, frozen=True):
    """What is called: ``path`` with its parameters filled in, and a query string if any."""

    service: str
    operation: str
    method: str
    path: str
    kind: OperationKind


class Outgoing(msgspec.Struct, frozen=True):
    """One call to be made. ``bearer`` opens it; ``key`` is its ``Idempotency-Key``.

    ``patience`` is for a caller that would rather wait than fail when a service is away for a while.
    """

    target: Target
    bearer: str
    deadline: Deadline
    body: bytes | None = None
    key: str | None = None
    content_type: str = "application/json"
    headers: Mapping[str, str] = msgspec.field(default_factory=dict[str, str])
    patience: Patience = NONE


@dataclass(slots=True)
class _Peer:
    """What is known of a service that is called."""

    balancer: Balancer
    budget: RetryBudget = field(default_factory=RetryBudget)


@dataclass(slots=True)
class _Trail:
    """What a call has been through."""

    began: float
    failing_since: float | None = None
    tries: int = 0
    instance: str = ""
    failed: set[str] = field(default_factory=set[str])


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
        log: Log | None = None,
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
        self._kept = Kept()
        self._peers: dict[str, _Peer] = {}
        self._counters: dict[tuple[str, str, str], Counter] = {}

    async def answer(self, call: Outgoing, kind: type[T], *, on_line: OnLine | None = None) -> T:
        """Make a call and return its typed answer.

        With ``on_line`` the answer is asked for as a stream and every line before the last is handed over.
        Raises what the peer said as :class:`RemoteError`, and transport failures after the retries.
        """
        if on_line is None:
            whole = await self.send(call)
            body = whole.body
        else:
            told = Told(on_line)
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
        target = call.target
        key = key_of(f"{target.service}{target.path}", call.bearer) if target.method == "GET" else None

        async def once(url: str, headers: dict[str, str]) -> Answer:
            kept = None if key is None else self._kept.asking(key, headers)
            answer = await self._http.send(target.method, url, headers, call.body, seconds=call.deadline.left())
            if answer.status >= 400:
                raise error_from_response(target.service, answer.status, answer.body, answer.headers.get("retry-after"))
            return answer if key is None else self._kept.told(key, kept, answer)

        return await self._tried(call, once)

    async def stream(self, call: Outgoing, consume: Callable[[Streamed], Awaitable[T]]) -> T:
        """Make a call and hand its answer to ``consume`` as it comes; a status of 400 or more is raised."""

        async def once(url: str, headers: dict[str, str]) -> T:
            async with self._http.stream(
                call.target.method, url, headers, call.body, seconds=call.deadline.left()
            ) as streamed:
                await raise_refusal(call.target.service, streamed)
                return await consume(streamed)

        return await self._tried(call, once)

    async def _lines(self, call: Outgoing, url: str, headers: dict[str, str], told: Told) -> bytes:
        headers["Accept"] = NDJSON
        told.begin()
        async with self._http.stream(
            call.target.method, url, headers, call.body, seconds=call.deadline.left()
        ) as streamed:
            await raise_refusal(call.target.service, streamed)
            return await read_lines(call.target.service, streamed, told)

    async def _tried(self, call: Outgoing, once: Callable[[str, dict[str, str]], Awaitable[T]]) -> T:
        """Make a call in a span of its own, which its callee's is a child of."""
        target = call.target
        span = self._tracer.start(_span_name(target), "client")
        keep = False
        try:
            return await self._repeated(call, once, span)
        except BaseException as error:
            span.failed(error)
            keep = target.operation not in QUIET and isinstance(error, OctoError) and problem_of(error).status >= 500
            raise
        finally:
            self._tracer.end(span, keep=keep)

    async def _repeated(self, call: Outgoing, once: Callable[[str, dict[str, str]], Awaitable[T]], span: Span) -> T:
        """Try a call as often as the policies allow."""
        target = call.target
        peer = self._peer(target.service)
        peer.budget.earn()
        headers = self._headers(call, span)
        trail = _Trail(self._clock.monotonic())
        reason: OctoError | None = None
        while True:
            trail.tries += 1
            try:
                call.deadline.check()
                result = await self._try(call, once, headers, peer, trail)
            except OctoError as error:
                self._count(target, error.code)
                if reason is None or isinstance(error, TransportError | RemoteError):
                    reason = error
                delay = self._delay(call, error, peer, trail)
                if delay is None:
                    # What an instance did says more than that none may be called for a while.
                    seconds = self._clock.monotonic() - trail.began
                    reason.tried = Tried(target.service, target.operation, trail.instance, trail.tries, seconds)
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

    def _delay(self, call: Outgoing, error: OctoError, peer: _Peer, trail: _Trail) -> float | None:
        """Return how long to wait before the next try, ``None`` to stop."""
        failure = failure_of(error)
        repeats_safely = call.target.kind == "read_only" or call.key is not None
        left = call.deadline.left()
        delay = self._retry.wait(
            failure,
            tried=trail.tries,
            repeats_safely=repeats_safely,
            left=left,
            random=random.random(),  # noqa: S311  jitter is no secret
        )
        now = self._clock.monotonic()
        if trail.failing_since is None:
            trail.failing_since = now
        if delay is None or not peer.budget.spend():
            waited = now - trail.failing_since
            delay = call.patience.wait(failure, waited=waited, repeats_safely=repeats_safely, left=left)
        return delay

    async def _try(
        self,
        call: Outgoing,
        once: Callable[[str, dict[str, str]], Awaitable[T]],
        headers: dict[str, str],
        peer: _Peer,
        trail: _Trail,
    ) -> T:
        """Try a call once, at an instance that has not failed it where there is one."""
        operation = call.target.operation
        instance = self._pick(call.target, peer, trail)
        headers["X-Timeout-Ms"] = call.deadline.header()
        began = self._clock.monotonic()
        outcome: Outcome = "unknown"
        try:
            result = await once(instance.url + call.target.path, dict(headers))
            outcome = "answered"
            return result
        except OctoError as error:
            outcome = outcome_of(error)
            trail.failed.add(instance.url)
            if error.code in SHED and error.retry_after:
                instance.busy_until = self._clock.monotonic() + error.retry_after
            raise
        finally:
            now = self._clock.monotonic()
            ejected = peer.balancer.ended(instance, operation, outcome, now - began, now)
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

    def _pick(self, target: Target, peer: _Peer, trail: _Trail) -> Instance:
        """Return an instance that may be called."""
        now = self._clock.monotonic()
        peer.balancer.follow(self._discovery.instances(target.service), now)
        instance = peer.balancer.pick(target.operation, now, trail.failed)
        if instance is None:
            wait = peer.balancer.wait(now)
            raise OctoError(
                f"{target.service} has not answered for a while; the next try is in {wait:.0f} s.",
                code="unavailable",
                retry_after=wait,
            )
        trail.instance = instance.url
        return instance

    def _peer(self, service: str) -> _Peer:
        peer = self._peers.get(service)
        if peer is None:
            if len(self._peers) >= MAX_SERVICES:
                # Services come and go: what is known of those that are gone is not kept for ever.
                self._peers.clear()
            peer = self._peers[service] = _Peer(Balancer(random.randrange, self._ejection))
        return peer

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
        key = (target.service, target.operation, outcome)
        counter = self._counters.get(key)
        if counter is None:
            counter = self._counters[key] = self._metrics.calls.labels(self._service, *key)
        counter.inc()


def _span_name(target: Target) -> str:
    named = target.operation.startswith(f"{target.service}.")
    return target.operation if named else f"{target.service}.{target.operation}"
