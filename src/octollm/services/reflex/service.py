"""The composition root of reflex, the API gateway, and the readiness of the services that it depends on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable

import msgspec
from starlette.middleware.cors import CORSMiddleware

from octollm.clock import Clock
from octollm.config import Settings
from octollm.contracts.services import SERVICES
from octollm.errors import OctoError
from octollm.events import TaskWatchHub
from octollm.rpc.client import ServiceClient
from octollm.rpc.discovery import Discovery
from octollm.rpc.health import DependencyStatus, Readiness, ReadinessCheck
from octollm.rpc.http_client import HttpClient
from octollm.rpc.service import Service, ServiceBase, build_service
from octollm.services.reflex.auth import CredentialAuthenticator, GatewayAuthenticator
from octollm.services.reflex.forwarding import RequestForwarder
from octollm.services.reflex.guard import AllowedHosts, RequestGuardMiddleware
from octollm.services.reflex.live import SEND_TIMEOUT_SECONDS, LiveConnections, build_sse_operation
from octollm.services.reflex.screening import InputGuardrail, Screener
from octollm.services.reflex.throttle import FailedLoginThrottle, RateLimiter
from octollm.services.reflex.upstream import GatewayRetryPolicy, TokenExchangeClient, Upstream
from octollm.services.reflex.web_session import SessionHandlers, build_page_route
from octollm.services.reflex.websocket import TaskWebSockets
from octollm.storage import RedisClient, RedisKeys, TextStream

READINESS_SECONDS = 2.0
MAX_CHECKED_INSTANCES = 16
"""Instances of one service that are asked."""
READINESS_CACHE_SECONDS = 1.0
"""An answer is used again for so long: a page that asks often costs no more."""


class DependencyReadiness:
    """Asks the ``/ready`` of several services at once."""

    def __init__(self, http: HttpClient, discovery: Discovery, clock: Clock, names: tuple[str, ...]) -> None:
        self._http = http
        self._discovery = discovery
        self._clock = clock
        self._names = names
        self._cached: dict[str, DependencyStatus] = {}
        self._checked_at = -1e9
        self._lock = asyncio.Lock()

    def checkups(self) -> dict[str, ReadinessCheck]:
        """Return a check-up for each service."""
        return {name: self._checkup(name) for name in self._names}

    def _checkup(self, name: str) -> ReadinessCheck:
        async def checkup() -> DependencyStatus:
            async with self._lock:
                if self._clock.monotonic() - self._checked_at > READINESS_CACHE_SECONDS:
                    answers = await asyncio.gather(*(self._check_service(each) for each in self._names))
                    self._cached = dict(zip(self._names, answers, strict=True))
                    self._checked_at = self._clock.monotonic()
            return self._cached[name]

        return checkup

    async def _check_service(self, name: str) -> DependencyStatus:
        """Return the state of a service: the best of its instances, since one that is well is enough."""
        try:
            urls = self._discovery.instances(name)[:MAX_CHECKED_INSTANCES]
        except OctoError:
            return DependencyStatus(ok=False, detail="no address is known for it")
        states = await asyncio.gather(*(self._check_instance(url) for url in urls))
        return max(states, key=lambda state: state.ok)

    async def _check_instance(self, url: str) -> DependencyStatus:
        try:
            answer = await self._http.send("GET", f"{url}/ready", {}, None, seconds=READINESS_SECONDS)
            ready = msgspec.json.decode(answer.body, type=Readiness)
        except (OctoError, msgspec.DecodeError, UnicodeDecodeError):
            return DependencyStatus(ok=False, detail="it does not answer")
        lacking = [key for key, state in ready.dependencies.items() if not state.ok]
        return DependencyStatus(ok=answer.status == 200, detail=f"without {', '.join(lacking)}" if lacking else "")


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
