"""The composition root of reflex, the public door."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable

from starlette.middleware.cors import CORSMiddleware

from octollm.config import Settings
from octollm.contracts.services import SERVICES
from octollm.errors import OctoError
from octollm.events import TaskWatch
from octollm.rpc.caller import Caller
from octollm.rpc.health import CheckUp, Dependency
from octollm.rpc.service import Base, Service, build_service
from octollm.services.reflex.addresses import OurNames
from octollm.services.reflex.auth import Door, DoorOpener
from octollm.services.reflex.doorstep import Doorstep
from octollm.services.reflex.exchange import Exchange
from octollm.services.reflex.forward import Forward
from octollm.services.reflex.goal_screen import GoalScreen
from octollm.services.reflex.guessing import Guessing
from octollm.services.reflex.neighbours import Neighbours
from octollm.services.reflex.page import page_route
from octollm.services.reflex.rate import Rate
from octollm.services.reflex.screening import Screener
from octollm.services.reflex.session import PageSessions
from octollm.services.reflex.sockets import Sockets
from octollm.services.reflex.sse import sse_operation
from octollm.services.reflex.upstream import DoorRetry, Upstream
from octollm.services.reflex.watching import PATIENCE_SECONDS, Watching
from octollm.storage import Keys, RedisClient, TextStream

CORS_HEADERS = ("Authorization", "Content-Type", "Idempotency-Key", "If-None-Match", "Last-Event-ID", "X-File-Name")
CORS_EXPOSED = ("ETag", "Location", "Retry-After", "X-Request-ID", "X-Correlation-ID", "Content-Disposition")
HINT_SECONDS = 5.0
"""A watcher looks by itself as often, should a hint be lost."""


@contextlib.asynccontextmanager
async def reflex_service(
    base: Base,
    settings: Settings,
    *,
    redis: RedisClient,
    local_key: str | None,
    loopback_only: bool,
    patience: float = PATIENCE_SECONDS,
) -> AsyncGenerator[Service]:
    """Open the public door.

    ``local_key`` is the API key of the local user, used for local peers where ``loopback_only`` says that nobody
    else can connect and the settings do not switch that trust off. ``patience`` is in seconds.
    """
    draining = asyncio.Event()
    keys = Keys()
    ours = OurNames(settings.allowed_hosts, settings.cors_origins)
    trusted = local_key if loopback_only and settings.local_trust else None
    caller = Caller(
        base.name,
        base.http,
        base.discovery,
        clock=base.clock,
        ids=base.ids,
        metrics=base.metrics,
        tracer=base.tracer,
        retry=DoorRetry(),
    )
    exchange = Exchange(caller, base.identity.signer(), base.clock)
    rate = Rate(settings.rate_limit, base.clock)
    guessing = Guessing(base.clock)
    door = Door(exchange, rate, ours, base.metrics, guessing=guessing, local_key=trusted)
    page = PageSessions(caller, base.identity.signer(), exchange, ours, rate, guessing, base.clock)
    upstream = Upstream(caller, exchange, base.clock)
    screen = GoalScreen(await asyncio.to_thread(Screener), settings.screening, upstream, base.metrics)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(exchange.close)
        hub = await stack.enter_async_context(TaskWatch(redis, keys, timer=HINT_SECONDS))
        watching = Watching(
            door,
            upstream,
            TextStream(redis, keys),
            hub,
            base.clock,
            base.metrics,
            draining,
            patience=patience,
        )
        # Off loopback anybody may ask /ready, who is told of nothing but what the door itself cannot do without.
        names = tuple(name for name in SERVICES if name != base.name) if loopback_only else ("orchestrator",)
        checkups: dict[str, CheckUp] = {
            **Neighbours(base.http, base.discovery, base.clock, names).checkups(),
            "redis": _redis_checkup(redis.ping, hub),
        }
        service = build_service(
            base,
            [
                *Forward(upstream, screen, draining).operations(),
                *screen.operations(),
                *page.operations(),
                sse_operation(watching),
            ],
            openers={"door": DoorOpener(door)},
            checkups=checkups,
            extra=[page_route(), *Sockets(watching, base.ids, base.log).routes()],
            draining=draining,
            tells_export=loopback_only,
        )
        if settings.cors_origins:
            # Without credentials: a page elsewhere shows a key of its own, and never the browser's session.
            service.app.add_middleware(
                CORSMiddleware,
                allow_origins=settings.cors_origins,
                allow_methods=("GET", "POST", "DELETE"),
                allow_headers=CORS_HEADERS,
                expose_headers=CORS_EXPOSED,
                max_age=600,
            )
        service.app.add_middleware(
            Doorstep, ours=ours, ids=base.ids, metrics=base.metrics, probes_by_address=not loopback_only
        )
        yield service


def _redis_checkup(ping: Callable[[], Awaitable[None]], hub: TaskWatch) -> CheckUp:
    async def checkup() -> Dependency:
        try:
            await ping()
        except OctoError as error:
            return Dependency(ok=False, detail=f"live updates are slower: {error.detail}", required=False)
        return Dependency(ok=hub.degraded is None, detail=hub.degraded or "", required=False)

    return checkup
