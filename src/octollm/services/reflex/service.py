"""The composition root of reflex, the public door."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable

from starlette.middleware.cors import CORSMiddleware

from octollm.config import Settings
from octollm.contracts.services import SERVICES
from octollm.errors import OctoError
from octollm.events import TaskWatchHub
from octollm.rpc.caller import ServiceClient
from octollm.rpc.health import DependencyStatus, ReadinessCheck
from octollm.rpc.service import Service, ServiceBase, build_service
from octollm.services.reflex.addresses import AllowedHosts
from octollm.services.reflex.auth import CredentialAuthenticator, GatewayAuthenticator
from octollm.services.reflex.doorstep import RequestGuardMiddleware
from octollm.services.reflex.exchange import TokenExchangeClient
from octollm.services.reflex.forward import RequestForwarder
from octollm.services.reflex.goal_screen import InputGuardrail
from octollm.services.reflex.guessing import FailedLoginThrottle
from octollm.services.reflex.neighbours import DependencyReadiness
from octollm.services.reflex.page import build_page_route
from octollm.services.reflex.rate import RateLimiter
from octollm.services.reflex.screening import Screener
from octollm.services.reflex.session import SessionHandlers
from octollm.services.reflex.sockets import TaskWebSockets
from octollm.services.reflex.sse import build_sse_operation
from octollm.services.reflex.upstream import GatewayRetryPolicy, Upstream
from octollm.services.reflex.watching import SEND_TIMEOUT_SECONDS, LiveConnections
from octollm.storage import RedisClient, RedisKeys, TextStream

CORS_HEADERS = ("Authorization", "Content-Type", "Idempotency-Key", "If-None-Match", "Last-Event-ID", "X-File-Name")
CORS_EXPOSED = ("ETag", "Location", "Retry-After", "X-Request-ID", "X-Correlation-ID", "Content-Disposition")
POLL_FALLBACK_SECONDS = 5.0
"""A watcher looks by itself as often, should a hint be lost."""


@contextlib.asynccontextmanager
async def reflex_service(
    base: ServiceBase,
    settings: Settings,
    *,
    redis: RedisClient,
    local_key: str | None,
    loopback_only: bool,
    send_timeout: float = SEND_TIMEOUT_SECONDS,
) -> AsyncGenerator[Service]:
    """Open the public door.

    ``local_key`` is the API key of the local user, used for local peers where ``loopback_only`` says that nobody
    else can connect and the settings do not switch that trust off. ``patience`` is in seconds.
    """
    draining = asyncio.Event()
    keys = RedisKeys()
    ours = AllowedHosts(settings.allowed_hosts, settings.cors_origins)
    trusted = local_key if loopback_only and settings.trust_loopback else None
    caller = ServiceClient(
        base.name,
        base.http,
        base.discovery,
        clock=base.clock,
        ids=base.ids,
        metrics=base.metrics,
        tracer=base.tracer,
        retry=GatewayRetryPolicy(),
    )
    exchange = TokenExchangeClient(caller, base.identity.signer(), base.clock)
    rate = RateLimiter(settings.rate_limit, base.clock)
    guessing = FailedLoginThrottle(base.clock)
    door = CredentialAuthenticator(exchange, rate, ours, base.metrics, throttle=guessing, local_key=trusted)
    page = SessionHandlers(caller, base.identity.signer(), exchange, ours, rate, guessing, base.clock)
    upstream = Upstream(caller, exchange, base.clock)
    screen = InputGuardrail(await asyncio.to_thread(Screener), settings.input_guardrail, upstream, base.metrics)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(exchange.close)
        hub = await stack.enter_async_context(TaskWatchHub(redis, keys, poll_seconds=POLL_FALLBACK_SECONDS))
        watching = LiveConnections(
            door,
            upstream,
            TextStream(redis, keys),
            hub,
            base.clock,
            base.metrics,
            draining,
            send_timeout=send_timeout,
        )
        # Off loopback anybody may ask /ready, who is told of nothing but what the door itself cannot do without.
        names = tuple(name for name in SERVICES if name != base.name) if loopback_only else ("orchestrator",)
        checkups: dict[str, ReadinessCheck] = {
            **DependencyReadiness(base.http, base.discovery, base.clock, names).checkups(),
            "redis": _build_redis_checkup(redis.ping, hub),
        }
        service = build_service(
            base,
            [
                *RequestForwarder(upstream, screen, draining).operations(),
                *screen.operations(),
                *page.operations(),
                build_sse_operation(watching),
            ],
            authenticators={"door": GatewayAuthenticator(door)},
            readiness_checks=checkups,
            extra_routes=[build_page_route(), *TaskWebSockets(watching, base.ids, base.log).routes()],
            draining=draining,
            reports_export=loopback_only,
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
            RequestGuardMiddleware,
            allowed_hosts=ours,
            ids=base.ids,
            metrics=base.metrics,
            exempts_probes=not loopback_only,
        )
        yield service


def _build_redis_checkup(ping: Callable[[], Awaitable[None]], hub: TaskWatchHub) -> ReadinessCheck:
    async def checkup() -> DependencyStatus:
        try:
            await ping()
        except OctoError as error:
            return DependencyStatus(ok=False, detail=f"live updates are slower: {error.detail}", required=False)
        return DependencyStatus(ok=hub.degraded is None, detail=hub.degraded or "", required=False)

    return checkup
