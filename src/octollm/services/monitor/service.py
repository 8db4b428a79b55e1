"""The monitor over HTTP: health of the services, traces of tasks, OTLP ingestion, and export to a collector."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace

from octollm import __version__
from octollm.config import Settings
from octollm.contracts.api import TaskIdQuery
from octollm.contracts.observability import ServiceStates, TraceView
from octollm.contracts.public_api import LIST_SERVICES
from octollm.contracts.service_operations import READ_TRACE, RECEIVE_SPANS
from octollm.contracts.services import SERVICES
from octollm.errors import OctoError
from octollm.events import EventBus
from octollm.rpc.auth import RegisteredServiceAuthenticator
from octollm.rpc.call import IncomingCall, Operation, implement
from octollm.rpc.exporter import SEND_SECONDS, BatchExporter, SendBatch
from octollm.rpc.external import create_external_http_client
from octollm.rpc.health import ReadinessCheck
from octollm.rpc.http_client import HttpClient
from octollm.rpc.service import Service, ServiceBase, build_service
from octollm.services.monitor.health import HealthHistory, HealthMonitor
from octollm.services.monitor.span_store import SpanStore, prune_loop
from octollm.storage import RedisClient, RedisKeys
from octollm.storage.migrations import open_service_database
from octollm.telemetry import ExportBuffer, Span
from octollm.telemetry.otlp import ExportRequest, ExportResponse, decode_spans, encode_spans
from octollm.telemetry.spans import TASK_ATTRIBUTE

_RETRYABLE_STATUSES = frozenset({408, 429, 502, 503, 504})
"""Statuses after which OTLP over HTTP sends the same batch again."""


@dataclass(frozen=True, slots=True)
class SpanExport:
    """A running export: spans put into ``buffer`` are forwarded to the collector."""

    buffer: ExportBuffer[Span]
    check: ReadinessCheck


@contextlib.asynccontextmanager
async def run_span_export(base: ServiceBase, settings: Settings) -> AsyncGenerator[SpanExport | None]:
    """Export spans in the background while the context is open; yields ``None`` without a collector."""
    if settings.otlp_endpoint is None:
        yield None
        return
    buffer = ExportBuffer[Span]()
    async with create_external_http_client(read_timeout=SEND_SECONDS) as http:
        send = build_collector_sender(http, settings.otlp_endpoint, settings.otlp_headers)
        exporter = BatchExporter(buffer, send, name="collector", log=base.log, metrics=base.metrics)
        async with exporter.run():
            yield SpanExport(buffer, exporter.check_readiness)


def build_collector_sender(http: HttpClient, url: str, headers: tuple[tuple[str, str], ...]) -> SendBatch[Span]:
    """Return a function that sends spans to the collector at ``url`` (OTLP over HTTP, in JSON)."""

    async def send(spans: list[Span]) -> None:
        request_headers = {"Content-Type": "application/json", **dict(headers)}
        body = encode_spans(spans, __version__)
        response = await http.send("POST", f"{url}/v1/traces", request_headers, body, seconds=SEND_SECONDS)
        if response.status >= 300:
            raise OctoError(
                f"It returns {response.status}; see OTEL_EXPORTER_OTLP_ENDPOINT and OTEL_EXPORTER_OTLP_HEADERS.",
                code="unavailable" if response.status in _RETRYABLE_STATUSES else "peer_protocol",
            )

    return send


@contextlib.asynccontextmanager
async def monitor_service(
    base: ServiceBase, settings: Settings, *, redis: RedisClient, keys: RedisKeys | None = None
) -> AsyncGenerator[Service]:
    """Yield the monitor, with its probes, event subscription and pruning running."""
    history = HealthHistory(SERVICES)
    bus = EventBus(redis, keys or RedisKeys(), base.clock, base.ids)
    async with contextlib.AsyncExitStack() as stack:
        db = await stack.enter_async_context(open_service_database(settings, "monitor", clock=base.clock))
        store = SpanStore(db)
        pruning = await stack.enter_async_context(prune_loop(store, base.log))
        monitor = await stack.enter_async_context(HealthMonitor(base, bus, SERVICES, history))
        checks: dict[str, ReadinessCheck] = {
            "events": monitor.check_events,
            "polling": monitor.check_polling,
            "spans": pruning.check_health,
        }
        export = await stack.enter_async_context(run_span_export(base, settings))
        if export is not None:
            checks["collector"] = export.check
        operations = [
            *_build_health_operations(history),
            *TraceHandlers(store, None if export is None else export.buffer).operations(),
        ]
        authenticator = RegisteredServiceAuthenticator(base.name, base.directory, base.clock)
        yield build_service(base, operations, authenticators={"service": authenticator}, readiness_checks=checks)


def _build_health_operations(history: HealthHistory) -> list[Operation]:
    async def services(_call: IncomingCall, _body: object) -> ServiceStates:
        return history.get_states()

    return [implement(LIST_SERVICES, services, strict=False)]


class TraceHandlers:
    """The operations on spans. With ``export_buffer`` spans are also exported to a collector."""

    def __init__(self, store: SpanStore, export_buffer: ExportBuffer[Span] | None) -> None:
        self._store = store
        self._export_buffer = export_buffer

    async def receive(self, call: IncomingCall, request: ExportRequest) -> ExportResponse:
        """Store spans. Their service is the authenticated sender, whatever they name."""
        spans = decode_spans(request, call.peer)
        await self._store.add(spans)
        if self._export_buffer is not None:
            for span in spans:
                self._export_buffer.put(span)
        return ExportResponse()

    async def read(self, call: IncomingCall, _body: object) -> TraceView:
        """Return a task's spans. A token that is bound to a task reads that task only."""
        query: TaskIdQuery = call.query
        task_id = query.task
        bound = call.authority.task
        if bound is not None and bound.task != task_id:
            raise OctoError("There is no such task.", code="task_not_found")
        # The token names the task that is read. The reader's request is no work of it, and has a trace of its own.
        call.span.attributes[TASK_ATTRIBUTE] = ""
        return await self._store.read_task(call.tenant, task_id)

    def operations(self) -> list[Operation]:
        """Return the operations."""
        spans = replace(RECEIVE_SPANS, body=ExportRequest, response=ExportResponse)
        return [
            implement(READ_TRACE, self.read, strict=False),
            implement(spans, self.receive, strict=False),
        ]
