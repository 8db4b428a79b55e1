"""The server kit: from an operation to an ASGI endpoint with everything a call needs."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from octollm.capability import CapabilityError
from octollm.clock import Clock, Ids
from octollm.context import Scene, parse_traceparent, set_scene
from octollm.contracts.problems import problem_of
from octollm.contracts.stream import NDJSON
from octollm.errors import OctoError
from octollm.resilience import Deadline
from octollm.resilience.deadline import parse_timeout_ms
from octollm.rpc.arriving import id_or_new, read_body, text_of, too_large
from octollm.rpc.call import Call, Operation, Reply
from octollm.rpc.decode import decode, decode_query
from octollm.rpc.departure import Departure
from octollm.rpc.exchange import take_exchange
from octollm.rpc.gate import Gate
from octollm.rpc.idempotency import IdempotencyStore, KeyOf, body_digest, check_key
from octollm.rpc.limit import Limit
from octollm.rpc.once import Keyed, Once
from octollm.rpc.opened import Opened, who_calls
from octollm.rpc.outlet import Outlet, Whole
from octollm.rpc.problems import problem_response
from octollm.rpc.shapes import encode
from octollm.rpc.stream import LineStream
from octollm.rpc.validators import validated
from octollm.telemetry import Log, Metrics, ServedLog, Span, Tracer
from octollm.telemetry.spans import QUIET, SLOW_SECONDS

_NDJSON = NDJSON.encode()


class Opener(Protocol):
    """Decides whether a request may use an operation, and in whose name."""

    async def open(self, request: Request, operation: Operation) -> Opened:
        """Return in whose name the request is; raise an ``OctoError`` to refuse it."""
        ...


@dataclass(frozen=True, slots=True)
class Kit:
    """What every endpoint of one service shares."""

    service: str
    clock: Clock
    ids: Ids
    log: Log
    metrics: Metrics
    tracer: Tracer
    openers: Mapping[str, Opener]
    """By ``Operation.auth``."""
    idempotency: IdempotencyStore | None = None
    max_concurrent: int = 64
    max_queued: int = 256
    draining: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the service shuts down: new calls are refused with ``draining``."""


class _Arrived(msgspec.Struct, frozen=True):
    """A request before it is let in. ``headers`` has the last of each name, in lower case."""

    request: Request
    headers: Mapping[bytes, bytes]
    request_id: str
    correlation_id: str
    span: Span


class Endpoint:
    """One operation as an ASGI application."""

    def __init__(self, kit: Kit, operation: Operation, gate: Gate, once: Once | None) -> None:
        self._kit = kit
        self._once = once
        self._operation = operation
        self._streams = operation.streams
        self._gate = gate
        self._log = ServedLog(kit.service)
        self._tally = kit.metrics.served.operation(operation.name)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one call."""
        kit, operation = self._kit, self._operation
        started = time.perf_counter()
        headers: dict[bytes, bytes] = dict(scope["headers"])
        request_id = id_or_new(headers.get(b"x-request-id"), kit.ids, "req-")
        correlation_id = id_or_new(headers.get(b"x-correlation-id"), kit.ids, "corr-")
        caller = parse_traceparent(text_of(headers.get(b"traceparent")))
        span = kit.tracer.receive(operation.name, caller, sampled=operation.traced)
        set_scene(Scene(kit.service, request_id, correlation_id, span.trace))
        outlet = Outlet(send, take_exchange(scope), request_id, correlation_id, headers.get(b"accept-encoding"))
        kit.metrics.served.in_flight += 1
        arrived = _Arrived(Request(scope, receive), headers, request_id, correlation_id, span)
        try:
            try:
                if operation.limited:
                    async with self._gate:
                        await self._serve(arrived, scope, receive, outlet)
                else:
                    await self._serve(arrived, scope, receive, outlet)
            except OctoError as error:
                span.failed(error)
                if isinstance(error, CapabilityError):
                    # The caller is told the code alone; which rule it broke is for the operator.
                    kit.metrics.refused.labels(kit.service, error.reason).inc()
                    kit.log.warning("token.refused", operation=operation.name, reason=error.reason)
                if outlet.status:
                    raise
                await outlet.whole(problem_response(error, request_id), scope)
                if error.code in ("internal", "overloaded"):
                    kit.log.warning("call.refused", operation=operation.name, error=error)
        except asyncio.CancelledError as error:
            span.failed(error)
            raise
        except ClientDisconnect:
            span.code, span.message = "cancelled", "The caller went away."
        except Exception as error:  # the outermost boundary of a call: it is logged and answered
            span.failed(error)
            kit.log.error("call.crashed", operation=operation.name, error=error, where=_where(error))
            if not outlet.status:
                hidden = OctoError("The service failed; its log has the reason under this request id.")
                await outlet.whole(problem_response(hidden, request_id), scope)
        finally:
            self._told(span, outlet.opened, request_id, outlet.status or 499, time.perf_counter() - started)

    def _told(self, span: Span, opened: Opened | None, request_id: str, status: int, seconds: float) -> None:
        """Count a call, log it and end its span."""
        kit, name = self._kit, self._operation.name
        kit.metrics.served.in_flight -= 1
        self._tally.add(status, seconds)
        quiet = name in QUIET
        self._log.served(name, status, seconds, quiet=quiet)
        # How long a stream lasts is its reader's business.
        slow = seconds >= SLOW_SECONDS and self._operation.limited
        keep = (slow or status >= 500) and not quiet
        if keep or span.trace.sampled:
            if opened is not None:
                span.attributes |= who_calls(opened)
            span.attributes |= {
                "http.request.method": self._operation.method,
                "http.route": self._operation.path,
                "http.response.status_code": status,
                "octollm.request_id": request_id,
            }
        kit.tracer.end(span, keep=keep)

    async def _serve(self, arrived: _Arrived, scope: Scope, receive: Receive, outlet: Outlet) -> None:
        kit, operation, headers = self._kit, self._operation, arrived.headers
        if kit.draining.is_set():
            raise OctoError("The service is shutting down.", code="draining", retry_after=1)
        seconds = parse_timeout_ms(text_of(headers.get(b"x-timeout-ms")))
        deadline = Deadline.after(kit.clock, operation.timeout if seconds is None else min(seconds, 3600.0))
        opened = outlet.opened = await kit.openers[operation.auth].open(arrived.request, operation)
        exchange = outlet.exchange
        body = None if exchange is None else exchange.whole_body()
        if body is None:
            body = await read_body(scope, headers, receive, operation.max_body)
        elif len(body) > operation.max_body:
            raise too_large(operation.max_body)
        call = Call(
            service=kit.service,
            operation=operation.name,
            request=arrived.request,
            request_id=arrived.request_id,
            correlation_id=arrived.correlation_id,
            span=arrived.span,
            deadline=deadline,
            verified=opened.verified,
            peer=opened.peer,
            bearer=opened.bearer,
            key=check_key(text_of(headers.get(b"idempotency-key"))),
            body=body,
            query=None if operation.query is None else decode_query(scope["query_string"], operation.query),
        )
        task = None if opened.verified is None else opened.verified.task
        set_scene(
            Scene(
                kit.service,
                call.request_id,
                call.correlation_id,
                call.trace,
                "" if task is None else task.task,
                (task and task.step) or "",
                opened.tenant,
            )
        )
        value: Any = body
        if operation.body is not None and operation.body is not bytes and not operation.raw:
            value = decode(body, operation.body, strict=operation.strict)
        if self._streams and _NDJSON in headers.get(b"accept", b""):
            await self._stream(call, value, scope, receive, outlet)
            return
        async with Departure(exchange, receive):
            answer = await self._work(call, value)
            if operation.cacheable:
                answer = validated(answer, headers.get(b"if-none-match"))
            await outlet.whole(answer, scope)

    async def _stream(self, call: Call, value: Any, scope: Scope, receive: Receive, send: Send) -> None:
        lines = LineStream()
        call = msgspec.structs.replace(call, emit=lines)

        async def work() -> None:
            try:
                response = await self._work(call, value)
                await lines.result(bytes(response.body))
            except OctoError as error:
                call.span.failed(error)
                await lines.problem(problem_of(error, call.request_id))
            except asyncio.CancelledError:
                raise
            except Exception as error:  # the outermost boundary of a streamed call
                call.span.failed(error)
                self._kit.log.error("call.crashed", operation=call.operation, error=error, where=_where(error))
                hidden = OctoError("The service failed; its log has the reason under this request id.")
                await lines.problem(problem_of(hidden, call.request_id))

        working = asyncio.create_task(work())
        try:
            await StreamingResponse(lines.lines(), media_type=NDJSON, headers={"Cache-Control": "no-store"})(
                scope, receive, send
            )
        finally:
            await _end(working)

    async def _work(self, call: Call, value: Any) -> Whole | Response:
        """Run the handler within the deadline, behind the idempotency key where there is one."""
        operation, once, verified = self._operation, self._once, call.verified
        if operation.kind == "read_only" or call.key is None or once is None or verified is None:
            return await self._run(call, value)
        scope = call.request.scope
        keyed = Keyed(
            KeyOf(verified.tenant, verified.subject, call.service, call.operation, call.key),
            body_digest(operation.method, scope["path"], scope["query_string"].decode("latin-1"), call.body),
            operation.kind == "idempotent",
            call.bearer,
            call.request_id,
        )
        return await once.run(keyed, lambda: self._run(call, value), call.deadline)

    async def _run(self, call: Call, value: Any) -> Whole | Response:
        with Limit(call.deadline):
            answer = await self._operation.handler(call, value)
        if isinstance(answer, Response):
            return answer
        if isinstance(answer, Reply):
            return Whole.of(answer.status, encode(answer.value), answer.headers)
        return Whole.of(self._operation.status, encode(answer))


async def _end(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError, Exception):  # its failure was answered, or nobody waits
            await task


def _where(error: BaseException) -> str:
    """Return the innermost line of code of an error, for the log only."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
