"""An operation as an ASGI endpoint.

One call in order: ids, span, limits, authentication, body, idempotency, handler, response or NDJSON stream; then
problem, log and metrics.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
from msgspec import UNSET
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from octollm.capability import CapabilityError
from octollm.clock import Clock, IdGenerator
from octollm.context import (
    RequestContext,
    TraceContext,
    current_context,
    parse_baggage,
    parse_traceparent,
    parse_tracestate,
    set_context,
)
from octollm.contracts.problems import to_problem
from octollm.contracts.stream import NDJSON
from octollm.errors import OctoError
from octollm.limiter import ConcurrencyLimiter, ConcurrencyPolicy
from octollm.resilience import Deadline
from octollm.resilience.retry import parse_timeout_ms
from octollm.rpc.asgi_extension import take_extension
from octollm.rpc.auth import AuthContext, auth_span_attributes
from octollm.rpc.call import IncomingCall, Operation, OperationResponse
from octollm.rpc.codec import (
    body_too_large,
    decode,
    decode_query,
    decode_strictly,
    encode,
    header_text,
    id_or_new,
    parse_json,
    read_body,
)
from octollm.rpc.idempotency import (
    IdempotencyKey,
    IdempotencyStore,
    IdempotentHandler,
    KeyedCall,
    ResponseCipher,
    body_digest,
    check_key,
    may_have_taken_effect,
)
from octollm.rpc.limits import DeadlineScope, DisconnectScope
from octollm.rpc.ndjson import NdjsonEmitter
from octollm.rpc.problems import problem_response
from octollm.rpc.responses import BufferedResponse, ResponseWriter, apply_etag
from octollm.telemetry import AccessLog, Logger, Metrics, Span, Tracer
from octollm.telemetry.spans import SLOW_SECONDS, UNSAMPLED_OPERATIONS

_NDJSON = NDJSON.encode()
MAX_CONCURRENT = 64
MAX_QUEUE_SECONDS = 10.0
DEFAULT_CONCURRENCY = ConcurrencyPolicy(MAX_CONCURRENT, max_queued=256, max_wait=MAX_QUEUE_SECONDS)
"""The bounds on the calls that a service runs at once, and on those that wait."""


class Authenticator(Protocol):
    """The authenticator of an operation: decides whether a request may use it, and for which principal."""

    async def authenticate(self, request: Request, operation: Operation) -> AuthContext:
        """Return the authenticated context; raise an ``OctoError`` to refuse the request."""
        ...


@dataclass(frozen=True, slots=True)
class ServerContext:
    """What every endpoint of one service shares."""

    service: str
    clock: Clock
    ids: IdGenerator
    log: Logger
    metrics: Metrics
    tracer: Tracer
    authenticators: Mapping[str, Authenticator]
    """By ``Operation.auth``."""
    idempotency: IdempotencyStore | None = None
    response_cipher: ResponseCipher | None = None
    """For stored responses that hold a secret."""
    concurrency: ConcurrencyPolicy = DEFAULT_CONCURRENCY
    draining: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the service shuts down: new calls are refused with ``draining``."""


class _ReceivedRequest(msgspec.Struct, frozen=True):
    """A request before authentication. ``headers`` has the last value of each name, in lower case."""

    request: Request
    headers: Mapping[bytes, bytes]
    request_id: str
    correlation_id: str
    span: Span


class OperationEndpoint:
    """One operation as an ASGI application."""

    def __init__(
        self,
        context: ServerContext,
        operation: Operation,
        limiter: ConcurrencyLimiter,
        idempotent: IdempotentHandler | None,
    ) -> None:
        self._context = context
        self._idempotent = idempotent
        self._operation = operation
        self._streams = operation.streams
        self._limiter = limiter
        self._log = AccessLog(context.service)
        self._request_metrics = context.metrics.requests.operation(operation.name)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one call."""
        context, operation = self._context, self._operation
        started = time.perf_counter()
        headers: dict[bytes, bytes] = dict(scope["headers"])
        request_id = id_or_new(headers.get(b"x-request-id"), context.ids, "req-")
        correlation_id = id_or_new(headers.get(b"x-correlation-id"), context.ids, "corr-")
        parent = _read_traceparent(scope, headers)
        baggage = parse_baggage(_header_values(scope, b"baggage")) if b"baggage" in headers else ""
        span = context.tracer.receive(operation.name, parent, sampled=operation.traced)
        set_context(RequestContext(context.service, request_id, correlation_id, span.trace, baggage=baggage))
        writer = ResponseWriter(
            send, take_extension(scope), request_id, correlation_id, headers.get(b"accept-encoding")
        )
        context.metrics.requests.in_flight += 1
        received = _ReceivedRequest(Request(scope, receive), headers, request_id, correlation_id, span)
        try:
            try:
                # Before the queue: the wait for a slot is a part of the caller's time.
                deadline = self._read_deadline(headers)
                # Without a coroutine for each call: a slot is nearly always free.
                if operation.limited and not self._limiter.try_acquire():
                    await self._limiter.acquire(deadline.remaining())
                try:
                    await self._serve(received, deadline, scope, receive, writer)
                finally:
                    if operation.limited:
                        self._limiter.release()
            except OctoError as error:
                span.record_error(error)
                if isinstance(error, CapabilityError):
                    # The caller sees the code alone; the rule that it broke is for the operator.
                    context.metrics.rejected_tokens.labels(context.service, error.reason).inc()
                    context.log.warning("token.refused", operation=operation.name, reason=error.reason)
                # The head is sent, so no problem can follow it: the server closes a response that is not whole.
                if writer.status:
                    raise
                await self._send_problem(writer, error, request_id, scope)
                if error.code in ("internal", "overloaded"):
                    context.log.warning("call.refused", operation=operation.name, error=error)
        except asyncio.CancelledError as error:
            span.record_error(error)
            raise
        except ClientDisconnect:
            span.code, span.message = "cancelled", "The client disconnected."
        except Exception as error:  # the outermost boundary of a call: it is logged and answered
            span.record_error(error)
            self._log_crash(operation.name, error)
            if not writer.status:
                masked = OctoError("The service failed; its log has the reason under this request id.")
                await self._send_problem(writer, masked, request_id, scope)
        finally:
            self._record(span, writer.auth, request_id, writer.status or 499, time.perf_counter() - started)

    async def _send_problem(self, writer: ResponseWriter, error: OctoError, request_id: str, scope: Scope) -> None:
        response = problem_response(error, request_id, openai=self._operation.openai_errors)
        await writer.send_response(response, scope)

    def _record(self, span: Span, auth: AuthContext | None, request_id: str, status: int, seconds: float) -> None:
        """Count a call, log it and end its span."""
        context, name = self._context, self._operation.name
        context.metrics.requests.in_flight -= 1
        self._request_metrics.observe(status, seconds)
        quiet = name in UNSAMPLED_OPERATIONS
        self._log.log_call(name, status, seconds, quiet=quiet)
        # The length of a stream is up to its reader.
        slow = seconds >= SLOW_SECONDS and self._operation.limited
        keep = (slow or status >= 500) and not quiet
        if keep or span.trace.sampled:
            if auth is not None:
                # What the handler set stays: it knows better which task its work belongs to.
                span.attributes = auth_span_attributes(auth) | span.attributes
            span.attributes |= {
                "http.request.method": self._operation.method,
                "http.route": self._operation.path,
                "http.response.status_code": status,
                "octollm.request_id": request_id,
            }
        context.tracer.end(span, keep=keep)

    def _read_deadline(self, headers: Mapping[bytes, bytes]) -> Deadline:
        seconds = parse_timeout_ms(header_text(headers.get(b"x-timeout-ms")))
        return Deadline.after(self._context.clock, self._operation.timeout if seconds is None else seconds)

    async def _serve(
        self, received: _ReceivedRequest, deadline: Deadline, scope: Scope, receive: Receive, writer: ResponseWriter
    ) -> None:
        context, operation, headers = self._context, self._operation, received.headers
        if context.draining.is_set():
            raise OctoError("The service is shutting down.", code="draining", retry_after=1)
        # Before the body is read: a stranger cannot make the service buffer and decode one.
        auth = writer.auth = await context.authenticators[operation.auth].authenticate(received.request, operation)
        extension = writer.extension
        body = None if extension is None else extension.whole_body()
        if body is None:
            body = await read_body(scope, headers, receive, operation.max_body)
        elif len(body) > operation.max_body:
            raise body_too_large(operation.max_body)
        # Parsed once: for its type, for unknown members and for the digest of an idempotency key.
        document = parse_json(body) if operation.strict and operation.decodes_body else UNSET
        call = IncomingCall(
            service=context.service,
            operation=operation.name,
            request=received.request,
            request_id=received.request_id,
            correlation_id=received.correlation_id,
            span=received.span,
            deadline=deadline,
            verified=auth.verified,
            peer=auth.peer,
            bearer=auth.bearer,
            key=check_key(header_text(headers.get(b"idempotency-key"))),
            body=body,
            document=document,
            query=None if operation.query is None else decode_query(scope["query_string"], operation.query),
        )
        task = None if auth.verified is None else auth.verified.task
        set_context(
            RequestContext(
                context.service,
                call.request_id,
                call.correlation_id,
                call.trace,
                "" if task is None else task.task,
                (task and task.step) or "",
                auth.tenant,
                current_context().baggage,
            )
        )
        value: Any = body
        if operation.decodes_body:
            value = decode(body, operation.body) if document is UNSET else decode_strictly(document, operation.body)
        if self._streams and _NDJSON in headers.get(b"accept", b""):
            await self._stream(call, value, scope, receive, writer)
            return
        async with DisconnectScope(extension, receive):
            response = await self._run_idempotent(call, value)
            if operation.cacheable:
                response = apply_etag(response, headers.get(b"if-none-match"))
            await writer.send_response(response, scope)

    async def _stream(self, call: IncomingCall, value: Any, scope: Scope, receive: Receive, send: Send) -> None:
        emitter = NdjsonEmitter()
        call = msgspec.structs.replace(call, emit=emitter)

        async def work() -> None:
            try:
                response = await self._run_idempotent(call, value)
                await emitter.result(bytes(response.body))
            except OctoError as error:
                call.span.record_error(error)
                await emitter.problem(to_problem(error, call.request_id))
            except asyncio.CancelledError:
                raise
            except Exception as error:  # the outermost boundary of a streamed call
                call.span.record_error(error)
                self._log_crash(call.operation, error)
                masked = OctoError("The service failed; its log has the reason under this request id.")
                await emitter.problem(to_problem(masked, call.request_id))

        working = asyncio.create_task(work())
        try:
            await StreamingResponse(emitter.iter_lines(), media_type=NDJSON, headers={"Cache-Control": "no-store"})(
                scope, receive, send
            )
        finally:
            # A reader that leaves ends the work as well.
            await _cancel_tasks(working)

    async def _run_idempotent(self, call: IncomingCall, value: Any) -> BufferedResponse | Response:
        """Run the handler within the deadline, behind the idempotency key where there is one."""
        operation, idempotent, key = self._operation, self._idempotent, IdempotencyKey.of(call)
        if not operation.takes_key or key is None or idempotent is None:
            return await self._run_handler(call, value)
        scope = call.request.scope
        keyed = KeyedCall(
            key,
            body_digest(
                operation.method,
                scope["path"],
                scope["query_string"].decode("latin-1"),
                call.body,
                is_json=operation.decodes_body,
                document=call.document,
            ),
            operation.kind == "idempotent",
            call.bearer,
            call.request_id,
            self._context.response_cipher if operation.secret_response else None,
        )
        run = self._run_handler if operation.kind == "idempotent" else self._run_once
        return await idempotent.run(keyed, lambda: run(call, value), call.deadline)

    async def _run_once(self, call: IncomingCall, value: Any) -> BufferedResponse | Response:
        """Run the handler of an ``at_most_once`` operation; a failure after which it may have taken effect says so.

        Otherwise the next attempt of a task's step would call it under a new key, and the effect would happen twice.
        """
        try:
            return await self._run_handler(call, value)
        except OctoError as error:
            if not may_have_taken_effect(error):
                raise
            detail = f"The operation failed and may have taken effect: {error.detail}"
            raise OctoError(detail, code="outcome_unknown", field_errors=error.field_errors) from error
        except Exception as error:  # the outermost boundary, as for any other handler
            self._log_crash(call.operation, error)
            detail = "The operation failed and may have taken effect; its log has the reason under this request id."
            raise OctoError(detail, code="outcome_unknown") from error

    def _log_crash(self, operation: str, error: Exception) -> None:
        self._context.log.error("call.crashed", operation=operation, error=error, where=_innermost_line(error))

    async def _run_handler(self, call: IncomingCall, value: Any) -> BufferedResponse | Response:
        # Around the handler alone: storing its response is not cut off by the deadline.
        with DeadlineScope(call.deadline):
            result = await self._operation.handler(call, value)
        if isinstance(result, Response):
            return result
        if isinstance(result, OperationResponse):
            return BufferedResponse.from_json(result.status, encode(result.value), result.headers)
        return BufferedResponse.from_json(self._operation.status, encode(result))


async def _cancel_tasks(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError, Exception):  # its failure was answered, or nobody waits
            await task


def _read_traceparent(scope: Scope, headers: Mapping[bytes, bytes]) -> TraceContext | None:
    state = parse_tracestate(_header_values(scope, b"tracestate")) if b"tracestate" in headers else ""
    parent = parse_traceparent(header_text(headers.get(b"traceparent")), state)
    if parent is not None and len(headers) < len(scope["headers"]):
        # W3C Trace Context section 3.2.1 has one header: of two, neither is to be believed.
        repeated = sum(name == b"traceparent" for name, _ in scope["headers"]) > 1
        return None if repeated else parent
    return parent


def _header_values(scope: Scope, wanted: bytes) -> list[str]:
    return [value.decode("latin-1") for name, value in scope["headers"] if name == wanted]


def _innermost_line(error: BaseException) -> str:
    """Return the innermost line of code of an error, for the log only."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
