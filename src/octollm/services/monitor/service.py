"""The monitor over HTTP: the state of every built-in service, and the traces of tasks."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator

from octollm.config import Settings
from octollm.contracts.listing import OfTask
from octollm.contracts.services import SERVICES
from octollm.contracts.traces import TraceView
from octollm.errors import OctoError
from octollm.events import EventBus
from octollm.rpc.call import About, Call, Operation
from octollm.rpc.health import CheckUp
from octollm.rpc.openers import RegisteredOpener
from octollm.rpc.service import Base, Service, build_service
from octollm.services.monitor.collector import forwarding
from octollm.services.monitor.history import History, ServiceStates
from octollm.services.monitor.pruning import Pruning
from octollm.services.monitor.store import SpanStore
from octollm.services.monitor.watching import Watching
from octollm.storage import Keys, RedisClient
from octollm.storage.migrations import service_database
from octollm.telemetry import Buffer, Span
from octollm.telemetry.otlp import ExportAnswer, ExportRequest, read_spans


@contextlib.asynccontextmanager
async def monitor_service(
    base: Base, settings: Settings, *, redis: RedisClient, keys: Keys | None = None
) -> AsyncGenerator[Service]:
    """Yield the monitor while it watches, takes spans and forgets old ones; it stops on leaving."""
    history = History(SERVICES)
    bus = EventBus(redis, keys or Keys(), base.clock, base.ids)
    async with contextlib.AsyncExitStack() as stack:
        db = await stack.enter_async_context(service_database(settings, "monitor", clock=base.clock))
        store = SpanStore(db)
        pruning = await stack.enter_async_context(Pruning(store, base.log))
        watching = await stack.enter_async_context(Watching(base, bus, SERVICES, history))
        checkups: dict[str, CheckUp] = {
            "events": watching.events_checkup,
            "polling": watching.polling_checkup,
            "spans": pruning.checkup,
        }
        outside = await stack.enter_async_context(forwarding(base, settings))
        if outside is not None:
            checkups["collector"] = outside.checkup
        operations = [*_health(history), *Traces(store, None if outside is None else outside.buffer).operations()]
        opener = RegisteredOpener(base.name, base.directory, base.clock)
        yield build_service(base, operations, openers={"service": opener}, checkups=checkups)


def _health(history: History) -> list[Operation]:
    async def services(_call: Call, _body: object) -> ServiceStates:
        return history.states()

    return [
        Operation(
            "services",
            "GET",
            "/services",
            services,
            scope="monitor:read",
            answer=ServiceStates,
            summary="The latest state of every service.",
        ),
    ]


class Traces:
    """The operations on spans. ``outside`` takes those that are forwarded to a collector, where there is one."""

    def __init__(self, store: SpanStore, outside: Buffer[Span] | None) -> None:
        self._store = store
        self._outside = outside

    async def receive(self, call: Call, request: ExportRequest) -> ExportAnswer:
        """Take spans in the name of whoever sends them, whatever service they name."""
        spans = read_spans(request, call.peer)
        await self._store.add(spans)
        if self._outside is not None:
            for span in spans:
                self._outside.put(span)
        return ExportAnswer()

    async def read(self, call: Call, _body: object) -> TraceView:
        """Return a task's spans. A token that stands for a task opens that one alone."""
        asked: OfTask = call.query
        task_id = asked.task
        work = call.authority.task
        if work is not None and work.task != task_id:
            raise OctoError("There is no such task.", code="task_not_found")
        return await self._store.of_task(call.tenant, task_id)

    def operations(self) -> list[Operation]:
        """Return the operations."""
        return [
            Operation(
                "traces.read",
                "GET",
                "/traces",
                self.read,
                scope="monitor:read",
                query=OfTask,
                answer=TraceView,
                summary="The spans of a task.",
                about=About(codes=("task_not_found",)),
            ),
            Operation(
                "traces.receive",
                "POST",
                "/v1/traces",
                self.receive,
                auth="service",
                scope="*",
                body=ExportRequest,
                answer=ExportAnswer,
                summary="Take spans (OTLP over HTTP, in JSON).",
            ),
        ]
