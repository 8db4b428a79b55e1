"""The monitor over HTTP: the state of every built-in service."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator

from octollm.config import Settings
from octollm.contracts.services import SERVICES
from octollm.errors import OctoError
from octollm.events import EventBus
from octollm.rpc.call import Call, Operation
from octollm.rpc.service import Base, Service, build_service
from octollm.services.monitor.history import History, ServiceStates
from octollm.services.monitor.watching import Watching
from octollm.storage import Keys, RedisClient


@contextlib.asynccontextmanager
async def monitor_service(
    base: Base, settings: Settings, *, redis: RedisClient, keys: Keys | None = None
) -> AsyncGenerator[Service]:
    """Yield the monitor while it watches; it stops watching on leaving."""
    del settings
    history = History(SERVICES)
    bus = EventBus(redis, keys or Keys(), base.clock, base.ids)
    async with Watching(base, bus, SERVICES, history) as watching:
        checkups = {"events": watching.events_checkup, "polling": watching.polling_checkup}
        yield build_service(base, _operations(history), checkups=checkups)


def _operations(history: History) -> list[Operation]:
    async def services(_call: Call, _body: object) -> ServiceStates:
        return history.states()

    async def traces(_call: Call, _body: object) -> object:
        raise OctoError("Traces are not kept here: no collector is configured.", code="not_configured")

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
        Operation(
            "traces", "GET", "/traces", traces, scope="monitor:read", summary="Spans, where a collector is configured."
        ),
        Operation(
            "receive_traces",
            "POST",
            "/v1/traces",
            traces,
            auth="public",
            summary="OTLP over HTTP, where it is configured.",
        ),
    ]
