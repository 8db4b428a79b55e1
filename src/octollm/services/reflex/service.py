"""The composition root of reflex, the API gateway, and the readiness of the services that it depends on."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import msgspec
from starlette.middleware.cors import CORSMiddleware

from octollm import __version__
from octollm.clock import Clock
from octollm.config import Settings
from octollm.contracts.event_formats import build_asyncapi
from octollm.contracts.public_api import DESCRIBE_EVENTS
from octollm.contracts.services import SERVICES
from octollm.errors import OctoError
from octollm.events import TaskWatchHub
from octollm.live import DashboardFeeds, TaskFeeds
from octollm.rpc.call import IncomingCall, Operation, implement
from octollm.rpc.client import ServiceClient
from octollm.rpc.discovery import Discovery
from octollm.rpc.health import DependencyStatus, Readiness, ReadinessCheck
from octollm.rpc.http_client import HttpClient
from octollm.rpc.service import Service, ServiceBase, build_service
from octollm.screening import Screener
from octollm.services.reflex.auth import CredentialAuthenticator, GatewayAuthenticator
from octollm.services.reflex.client_messages import ClientMessageHandler
from octollm.services.reflex.dashboard import DashboardStreams
from octollm.services.reflex.forwarding import RequestForwarder
from octollm.services.reflex.guard import AllowedHosts, RequestGuardMiddleware
from octollm.services.reflex.hooks import HookReceiver
from octollm.services.reflex.live import SEND_TIMEOUT_SECONDS, LiveConnections, WatcherAuthority, build_sse_operation
from octollm.services.reflex.page_assets import load_page
from octollm.services.reflex.screening import InputGuardrail
from octollm.services.reflex.throttle import ConnectionCounter, ConnectionLimits, FailedLoginThrottle, RateLimiter
from octollm.services.reflex.upstream import GatewayRetryPolicy, TokenExchangeClient, Upstream
from octollm.services.reflex.web_session import SessionHandlers
from octollm.services.reflex.websocket import TaskWebSockets
from octollm.storage import RedisClient, RedisKeys, TextStream

READINESS_SECONDS = 2.0
MAX_CHECKED_INSTANCES = 16
"""Instances of one service that are checked."""
READINESS_CACHE_SECONDS = 1.0
"""A result is reused for this long, so that frequent polls of ``/ready`` cost no more."""
CORS_HEADERS = (
    "Authorization",
    "Content-Type",
    "Idempotency-Key",
    "If-Match",
    "If-None-Match",
    "Last-Event-ID",
    "X-File-Name",
)
CORS_EXPOSED = ("ETag", "Location", "Retry-After", "X-Request-ID", "X-Correlation-ID", "Content-Disposition")
POLL_FALLBACK_SECONDS = 5.0
"""A live session polls this often, in case a hint was lost."""


class DependencyReadiness:
    """Checks the ``/ready`` of several services concurrently."""

    def __init__(self, http: HttpClient, discovery: Discovery, clock: Clock, names: tuple[str, ...]) -> None:
        self._http = http
        self._discovery = discovery
        self._clock = clock
        self._names = names
        self._cached: dict[str, DependencyStatus] = {}
        self._checked_at = -1e9
        self._lock = asyncio.Lock()

    def checks(self) -> dict[str, ReadinessCheck]:
        """Return a readiness check for each service."""
        return {name: self._check(name) for name in self._names}

    def _check(self, name: str) -> ReadinessCheck:
        async def check() -> DependencyStatus:
            # The lock lets the checks of one /ready, and of several at a time, share one round of calls.
            async with self._lock:
                if self._clock.monotonic() - self._checked_at > READINESS_CACHE_SECONDS:
                    results = await asyncio.gather(*(self._check_service(each) for each in self._names))
                    self._cached = dict(zip(self._names, results, strict=True))
                    self._checked_at = self._clock.monotonic()
            return self._cached[name]

        return check

    async def _check_service(self, name: str) -> DependencyStatus:
        """Return the best status of a service's instances: one ready instance is enough."""
        try:
            urls = self._discovery.instances(name)[:MAX_CHECKED_INSTANCES]
        except OctoError:
            return DependencyStatus(ok=False, detail="its address is unknown")
        states = await asyncio.gather(*(self._check_instance(url) for url in urls))
        return max(states, key=lambda state: state.ok)

    async def _check_instance(self, url: str) -> DependencyStatus:
        try:
            response = await self._http.send("GET", f"{url}/ready", {}, None, seconds=READINESS_SECONDS)
            ready = msgspec.json.decode(response.body, type=Readiness)
        except (OctoError, msgspec.DecodeError, UnicodeDecodeError):
            return DependencyStatus(ok=False, detail="it does not answer")
        lacking = [key for key, state in ready.dependencies.items() if not state.ok]
        return DependencyStatus(ok=response.status == 200, detail=f"without {', '.join(lacking)}" if lacking else "")


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
    """Yield the gateway as a service.

    ``local_key`` is the API key of the local user. It is used for loopback peers if ``loopback_only`` (only this
    machine can connect) and the settings trust loopback. ``send_timeout`` (seconds) bounds the wait for a slow client.
    """
    draining = asyncio.Event()
    keys = RedisKeys()
    allowed_hosts = AllowedHosts(settings.allowed_hosts, settings.cors_origins)
    trusted_key = local_key if loopback_only and settings.trust_loopback else None
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
    rate_limiter = RateLimiter(settings.rate_limit, base.clock)
    throttle = FailedLoginThrottle(base.clock)
    authenticator = CredentialAuthenticator(
        exchange, rate_limiter, allowed_hosts, base.metrics, throttle=throttle, local_key=trusted_key
    )
    sessions = SessionHandlers(
        caller, base.identity.signer(), exchange, allowed_hosts, rate_limiter, throttle, base.clock
    )
    upstream = Upstream(caller, exchange, base.clock)
    # Compiling the patterns takes long enough to block the event loop.
    guardrail = InputGuardrail(await asyncio.to_thread(Screener), settings.input_guardrail, upstream, base.metrics)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(exchange.close)
        hub = await stack.enter_async_context(TaskWatchHub(redis, keys, poll_seconds=POLL_FALLBACK_SECONDS))
        known = None if base.revocations is None else base.revocations.revocations
        authority = WatcherAuthority(upstream, known, base.clock, base.log)
        connections = LiveConnections(
            authenticator,
            upstream,
            TaskFeeds(hub, TextStream(redis, keys), base.clock),
            authority,
            base.clock,
            base.metrics,
            draining,
            send_timeout=send_timeout,
            counter=ConnectionCounter(
                ConnectionLimits(
                    settings.max_watchers, settings.max_watchers_per_key, settings.max_watchers_per_address
                )
            ),
        )
        dashboard = DashboardStreams(
            connections, await stack.enter_async_context(DashboardFeeds(redis, keys, base.clock))
        )
        await stack.enter_async_context(connections.run())
        # Off loopback anybody may read /ready: it then names only what the gateway itself cannot do without.
        names = tuple(name for name in SERVICES if name != base.name) if loopback_only else ("orchestrator",)
        checks: dict[str, ReadinessCheck] = {
            **DependencyReadiness(base.http, base.discovery, base.clock, names).checks(),
            "redis": _build_redis_check(redis.ping, hub),
        }
        sockets = TaskWebSockets(
            connections, ClientMessageHandler(upstream, guardrail), dashboard.serve_websocket, base.ids, base.log
        )
        service = build_service(
            base,
            [
                *RequestForwarder(upstream, guardrail, draining).operations(),
                *guardrail.operations(),
                *sessions.operations(),
                *HookReceiver(caller, base.identity.signer(), guardrail, rate_limiter, base.clock).operations(),
                build_sse_operation(connections),
                dashboard.build_sse_operation(),
                _build_asyncapi_operation(),
            ],
            authenticators={"gateway": GatewayAuthenticator(authenticator)},
            readiness_checks=checks,
            extra_routes=[*load_page().routes(), *sockets.routes()],
            draining=draining,
            reports_export=loopback_only,
        )
        if settings.cors_origins:
            # No allow_credentials: a foreign page sends its own key, and never the browser's session.
            service.app.add_middleware(
                CORSMiddleware,
                allow_origins=settings.cors_origins,
                allow_methods=("GET", "POST", "PUT", "DELETE"),
                allow_headers=CORS_HEADERS,
                expose_headers=CORS_EXPOSED,
                max_age=600,
            )
        # Added last, so that it is the outermost: the guard sees a request before anything else, CORS included.
        service.app.add_middleware(
            RequestGuardMiddleware,
            allowed_hosts=allowed_hosts,
            ids=base.ids,
            metrics=base.metrics,
            exempts_probes=not loopback_only,
        )
        yield service


def _build_asyncapi_operation() -> Operation:
    describe = functools.cache(lambda: build_asyncapi(__version__))

    async def asyncapi(_call: IncomingCall, _body: object) -> dict[str, Any]:
        return describe()

    return implement(DESCRIBE_EVENTS, asyncapi, auth="public")


def _build_redis_check(ping: Callable[[], Awaitable[None]], hub: TaskWatchHub) -> ReadinessCheck:
    async def check() -> DependencyStatus:
        try:
            await ping()
        except OctoError as error:
            return DependencyStatus(ok=False, detail=f"live updates are slower: {error.detail}", required=False)
        return DependencyStatus(ok=hub.degraded is None, detail=hub.degraded or "", required=False)

    return check
