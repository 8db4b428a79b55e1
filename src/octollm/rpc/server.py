"""The server kit: from an operation to an ASGI endpoint with everything a call needs."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from octollm.clock import Clock, Ids
from octollm.context import ID, Scene, parse_traceparent, set_scene
from octollm.contracts.problems import problem_of
from octollm.contracts.stream import NDJSON
from octollm.errors import OctoError
from octollm.resilience import Deadline
from octollm.resilience.deadline import parse_timeout_ms
from octollm.rpc.call import Call, Operation, Reply
from octollm.rpc.decode import decode
from octollm.rpc.idempotency import IdempotencyStore, KeyOf, body_digest, check_key
from octollm.rpc.once import Once
from octollm.rpc.opened import Opened, who_calls
from octollm.rpc.problems import problem_response
from octollm.rpc.shapes import encode
from octollm.rpc.stream import LineStream
from octollm.telemetry import Log, Metrics, Span, Tracer

_QUIET = frozenset({"health", "ready", "metrics", "traces.receive"})
"""Operations whose calls are logged for a developer only."""


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


class _Gate:
    """Bounded concurrency with a bounded queue."""

    def __init__(self, concurrent: int, queued: int) -> None:
        self._slots = asyncio.Semaphore(concurrent)
        self._queued = queued
        self._waiting = 0

    async def __aenter__(self) -> None:
        if self._slots.locked() and self._waiting >= self._queued:
            raise OctoError("The service is at its limit of concurrent calls.", code="overloaded", retry_after=1)
        self._waiting += 1
        try:
            async with asyncio.timeout(10):
                await self._slots.acquire()
        except TimeoutError:
            raise OctoError("No place came free in 10 s.", code="overloaded", retry_after=2) from None
        finally:
            self._waiting -= 1

    async def __aexit__(self, *_: object) -> None:
        self._slots.release()


class Endpoint:
    """One operation as an ASGI application."""

    def __init__(self, kit: Kit, operation: Operation, gate: _Gate) -> None:
        self._kit = kit
        self._operation = operation
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one call."""
        kit, operation = self._kit, self._operation
        started = time.perf_counter()
        request = Request(scope, receive)
        request_id = _id_or_new(request.headers.get("x-request-id"), kit.ids, "req-")
        caller = parse_traceparent(request.headers.get("traceparent"))
        span = kit.tracer.receive(operation.name, caller, sampled=operation.traced)
        correlation_id = _id_or_new(request.headers.get("x-correlation-id"), kit.ids, "corr-")
        set_scene(Scene(kit.service, request_id, correlation_id, span.trace))
        status = [0]

        async def observed(message: Any) -> None:
            if message["type"] == "http.response.start":
                status[0] = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", request_id.encode()),
                    (b"x-correlation-id", correlation_id.encode()),
                ]
            await send(message)

        kit.metrics.in_flight.labels(kit.service).inc()
        try:
            call = Call(
                service=kit.service,
                operation=operation.name,
                request=request,
                request_id=request_id,
                correlation_id=correlation_id,
                span=span,
                deadline=Deadline.after(kit.clock, operation.timeout),
            )
            try:
                if operation.limited:
                    async with self._gate:
                        await self._serve(call, scope, receive, observed)
                else:
                    await self._serve(call, scope, receive, observed)
            except OctoError as error:
                span.failed(error)
                if status[0]:
                    raise
                await problem_response(error, request_id)(scope, receive, observed)
                if error.code in ("internal", "overloaded"):
                    kit.log.warning("call.refused", operation=operation.name, error=error)
        except asyncio.CancelledError as error:
            span.failed(error)
            raise
        except ClientDisconnect:
            status[0] = status[0] or 499
            span.code, span.message = "cancelled", "The caller went away."
        except Exception as error:  # the outermost boundary of a call: it is logged and answered
            span.failed(error)
            kit.log.error("call.crashed", operation=operation.name, error=error, where=_where(error))
            if not status[0]:
                hidden = OctoError("The service failed; its log has the reason under this request id.")
                await problem_response(hidden, request_id)(scope, receive, observed)
        finally:
            self._told(span, request_id, status[0] or 499, time.perf_counter() - started)

    def _told(self, span: Span, request_id: str, status: int, seconds: float) -> None:
        """Count a call, log it and end its span."""
        kit, name = self._kit, self._operation.name
        kit.metrics.in_flight.labels(kit.service).dec()
        kit.metrics.requests.labels(kit.service, name, str(status)).inc()
        kit.metrics.request_seconds.labels(kit.service, name).observe(seconds)
        # Some come every few seconds and say nothing new.
        write = kit.log.debug if name in _QUIET else kit.log.info
        write("call.served", operation=name, status=status, duration_ms=round(seconds * 1000, 2))
        if span.trace.sampled:
            span.attributes |= {
                "http.request.method": self._operation.method,
                "http.route": self._operation.path,
                "http.response.status_code": status,
                "octollm.request_id": request_id,
            }
        kit.tracer.end(span)

    async def _serve(self, call: Call, scope: Scope, receive: Receive, send: Send) -> None:
        kit, operation, request = self._kit, self._operation, call.request
        if kit.draining.is_set():
            raise OctoError("The service is shutting down.", code="draining", retry_after=1)
        seconds = parse_timeout_ms(request.headers.get("x-timeout-ms"))
        if seconds is not None:
            call = replace(call, deadline=Deadline.after(kit.clock, min(seconds, 3600.0)))
        opened = await kit.openers[operation.auth].open(request, operation)
        body = await _read_body(request, operation.max_body)
        call = replace(
            call,
            verified=opened.verified,
            peer=opened.peer,
            bearer=opened.bearer,
            body=body,
            key=check_key(request.headers.get("idempotency-key")),
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
        if call.trace.sampled:
            call.span.attributes |= who_calls(opened)
        value: Any = body
        if operation.body is not None and operation.body is not bytes:
            value = decode(body, operation.body, strict=operation.strict)
        if NDJSON in request.headers.get("accept", ""):
            await self._stream(call, value, scope, receive, send)
        else:
            await self._answer(call, value, scope, receive, send)

    async def _answer(self, call: Call, value: Any, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one answer; a caller that goes away cancels the work."""
        work = asyncio.create_task(self._work(call, value))
        gone = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ClientDisconnect

            async def disconnect() -> Any:
                # The watch reads ``receive``; a streamed response waits for what it sees.
                await asyncio.shield(gone)
                return {"type": "http.disconnect"}

            await work.result()(scope, disconnect, send)
        finally:
            await _end(work, gone)

    async def _stream(self, call: Call, value: Any, scope: Scope, receive: Receive, send: Send) -> None:
        lines = LineStream()
        call = replace(call, emit=lines)

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

    async def _work(self, call: Call, value: Any) -> Response:
        """Run the handler within the deadline, behind the idempotency key where there is one."""
        operation, store = self._operation, self._kit.idempotency
        if operation.kind == "safe" or call.key is None or store is None:
            return await self._run(call, value)
        if call.verified is None:
            return await self._run(call, value)
        url = call.request.url
        key = KeyOf(call.verified.tenant, call.verified.subject, call.service, call.operation, call.key)
        digest = body_digest(operation.method, url.path, url.query, call.body)
        once = Once(store, key, digest, repeatable=operation.kind == "repeatable", bearer=call.bearer)
        return await once.run(lambda: self._run(call, value), call.deadline, call.request_id)

    async def _run(self, call: Call, value: Any) -> Response:
        try:
            async with asyncio.timeout(call.deadline.left()):
                answer = await self._operation.handler(call, value)
        except TimeoutError as error:
            if call.deadline.left() > 0:
                raise
            raise OctoError("The time for this call is used up.", code="deadline_exceeded") from error
        return _response(answer, self._operation.status)


def _response(answer: Any, status: int) -> Response:
    if isinstance(answer, Response):
        return answer
    headers: Mapping[str, str] = {}
    if isinstance(answer, Reply):
        answer, status, headers = answer.value, answer.status, answer.headers
    return Response(encode(answer), status_code=status, media_type="application/json", headers=dict(headers))


async def _read_body(request: Request, limit: int) -> bytes:
    length = request.headers.get("content-length")
    too_large = OctoError(f"The body may have at most {limit} bytes.", code="body_too_large")
    if length is not None and length.isdigit() and int(length) > limit:
        raise too_large
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(60):
            async for chunk in request.stream():
                size += len(chunk)
                if size > limit:
                    raise too_large
                chunks.append(chunk)
    except TimeoutError:
        raise OctoError("The body did not arrive in 60 s.", code="invalid_body") from None
    return b"".join(chunks)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError, Exception):  # its failure was answered, or nobody waits
            await task


def _id_or_new(text: str | None, ids: Ids, prefix: str) -> str:
    return text if text and ID.fullmatch(text) else prefix + ids.hex()


def _where(error: BaseException) -> str:
    """Return the innermost line of code of an error, for the log only."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"


def build_app(kit: Kit, operations: Sequence[Operation], extra: Sequence[BaseRoute] = ()) -> Starlette:
    """Return the ASGI application of a service: its operations, and ``extra`` routes (health, pages, sockets)."""
    gate = _Gate(kit.max_concurrent, kit.max_queued)
    routes: list[BaseRoute] = []
    by_path: dict[str, dict[str, Endpoint]] = {}
    for operation in operations:
        by_path.setdefault(operation.path, {})[operation.method] = Endpoint(kit, operation, gate)
    for path, methods in by_path.items():
        routes.append(Route(path, _Methods(methods), methods=list(methods)))

    async def refuse(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        code = "method_not_allowed" if status == 405 else "not_found"
        return problem_response(
            OctoError(f"{request.method} {request.url.path} is not served here.", code=code),
            _id_or_new(request.headers.get("x-request-id"), kit.ids, "req-"),
        )

    handlers: Any = {HTTPException: refuse}
    return Starlette(routes=[*extra, *routes], exception_handlers=handlers)


class _Methods:
    """Several methods on one path."""

    def __init__(self, methods: Mapping[str, Endpoint]) -> None:
        self._methods = methods

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        method = "GET" if scope["method"] == "HEAD" and "HEAD" not in self._methods else scope["method"]
        await self._methods[method](scope, receive, send)
