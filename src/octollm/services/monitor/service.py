"""The monitor over HTTP: the state of every built-in service, and the traces of tasks."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator

from octollm.config import Settings
from octollm.contracts.listing import TaskIdQuery
from octollm.contracts.services import SERVICES
from octollm.contracts.traces import TraceView
from octollm.errors import OctoError
from octollm.events import EventBus
from octollm.rpc.call import IncomingCall, Operation, OperationDocs
from octollm.rpc.health import ReadinessCheck
from octollm.rpc.openers import RegisteredServiceAuthenticator
from octollm.rpc.service import Service, ServiceBase, build_service
from octollm.services.monitor.collector import run_span_export
from octollm.services.monitor.history import HealthHistory, ServiceStates
from octollm.services.monitor.pruning import SpanPruner
from octollm.services.monitor.store import SpanStore
from octollm.services.monitor.watching import HealthMonitor
from octollm.storage import RedisClient, RedisKeys
from octollm.storage.migrations import open_service_database
from octollm.telemetry import ExportBuffer, Span
from octollm.telemetry.otlp import ExportRequest, ExportResponse, decode_spans


@contextlib.asynccontextmanager
async def monitor_service(
    base: ServiceBase, settings: Settings, *, redis: RedisClient, keys: RedisKeys | None = None
) -> AsyncGenerator[Service]:
    """Yield the monitor while it watches, takes spans and forgets old ones; it stops on leaving."""
    history = HealthHistory(SERVICES)
    bus = EventBus(redis, keys or RedisKeys(), base.clock, base.ids)
    async with contextlib.AsyncExitStack() as stack:
        db = await stack.enter_async_context(open_service_database(settings, "monitor", clock=base.clock))
        store = SpanStore(db)
        pruning = await stack.enter_async_context(SpanPruner(store, base.log))
        watching = await stack.enter_async_context(HealthMonitor(base, bus, SERVICES, history))
        checkups: dict[str, ReadinessCheck] = {
            "events": watching.events_checkup,
            "polling": watching.polling_checkup,
            "spans": pruning.checkup,
        }
        outside = await stack.enter_async_context(run_span_export(base, settings))
        if outside is not None:
            checkups["collector"] = outside.checkup
        operations = [
            *_build_health_operations(history),
            *TraceHandlers(store, None if outside is None else outside.buffer).operations(),
        ]
        opener = RegisteredServiceAuthenticator(base.name, base.directory, base.clock)
        yield build_service(base, operations, authenticators={"service": opener}, readiness_checks=checkups)


def _build_health_operations(history: HealthHistory) -> list[Operation]:
    async def services(_call: IncomingCall, _body: object) -> ServiceStates:
        return history.get_states()

    return [
        Operation(
            "services",
            "GET",
            "/services",
            services,
            scope="monitor:read",
            response=ServiceStates,
            summary="The latest state of every service.",
        ),
    ]


class TraceHandlers:
    """The operations on spans. ``outside`` takes those that are forwarded to a collector, where there is one."""

    def __init__(self, store: SpanStore, export_buffer: ExportBuffer[Span] | None) -> None:
        self._store = store
        self._export_buffer = export_buffer

    async def receive(self, call: IncomingCall, request: ExportRequest) -> ExportResponse:
        """Take spans in the name of whoever sends them, whatever service they name."""
        spans = decode_spans(request, call.peer)
        await self._store.add(spans)
        if self._export_buffer is not None:
            for span in spans:
                self._export_buffer.put(span)
        return ExportResponse()

    async def read(self, call: IncomingCall, _body: object) -> TraceView:
        """Return a task's spans. A token that stands for a task opens that one alone."""
        asked: TaskIdQuery = call.query
        task_id = asked.task
        work = call.authority.task
        if work is not None and work.task != task_id:
            raise OctoError("There is no such task.", code="task_not_found")
        return await self._store.read_task(call.tenant, task_id)

    def operations(self) -> list[Operation]:
        """Return the operations."""
        return [
            Operation(
                "traces.read",
                "GET",
                "/traces",
                self.read,
                scope="monitor:read",
                query=TaskIdQuery,
                response=TraceView,
                summary="The spans of a task.",
                docs=OperationDocs(error_codes=("task_not_found",)),
            ),
            Operation(
                "traces.receive",
                "POST",
                "/v1/traces",
                self.receive,
                auth="service",
                scope="*",
                body=ExportRequest,
                response=ExportResponse,
                summary="Take spans (OTLP over HTTP, in JSON).",
            ),
        ]
