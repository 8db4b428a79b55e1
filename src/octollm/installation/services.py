"""The built-in services: how each is opened, and one of them in a process of its own."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial

from octollm.clock import Clock, IdGenerator
from octollm.config import Settings
from octollm.contracts.services import SERVICES
from octollm.errors import OctoError, SettingError
from octollm.installation.network import (
    advertised_url,
    is_loopback,
    resolve_addresses,
    server_transport,
    transport_from_settings,
)
from octollm.installation.provisioning import RootKeys, load_service_keys
from octollm.installation.service_host import (
    DependencyCheck,
    ServiceContextFactory,
    ServiceHost,
    start_service_host,
    wait_for_dependencies,
)
from octollm.rpc.discovery import Discovery, DnsResolver, StaticDiscovery
from octollm.rpc.http_client import HttpClient
from octollm.rpc.identity import ServiceIdentity
from octollm.rpc.service import Service, ServiceBase, build_base
from octollm.services.arms.coder.service import coder_service
from octollm.services.arms.executor.service import executor_service
from octollm.services.arms.judge.service import judge_service
from octollm.services.arms.planner.service import planner_service
from octollm.services.arms.retriever.service import retriever_service
from octollm.services.memory.service import memory_service
from octollm.services.models.service import models_service
from octollm.services.monitor.service import monitor_service
from octollm.services.orchestrator.service import orchestrator_service
from octollm.services.reflex.service import reflex_service
from octollm.storage import RedisClient, open_redis
from octollm.telemetry import configure_logging, get_logger

ServiceFactory = Callable[[ServiceBase, Settings], AbstractAsyncContextManager[Service]]
"""Opens a service that needs nothing but what every service has."""

REDIS_SERVICES = frozenset({"orchestrator", "monitor", "reflex"})
"""The services that are given Redis."""

_SIMPLE_SERVICES: Mapping[str, ServiceFactory] = {
    "memory": memory_service,
    "models": models_service,
    "planner": planner_service,
    "executor": executor_service,
    "coder": coder_service,
    "judge": judge_service,
    "retriever": retriever_service,
}


@dataclass(frozen=True, slots=True)
class ServiceResources:
    """What the services of a process are given besides what every service has.

    ``root`` is for the orchestrator alone. ``local_key`` is the credential that the door uses for a local peer where
    ``loopback_only`` says that nobody else can connect; ``None`` where no peer is trusted.
    """

    settings: Settings
    redis: RedisClient | None = None
    root: RootKeys | None = None
    local_key: str | None = None
    loopback_only: bool = False


def bind_service_factory(
    name: str, base: ServiceBase, resources: ServiceResources, *, override: ServiceFactory | None = None
) -> ServiceContextFactory:
    """Return what opens the built-in service ``name``; ``override`` stands in place of one that needs nothing special.

    Raises ``setting_invalid`` when something that it needs is not supplied.
    """
    settings = resources.settings
    if name in _SIMPLE_SERVICES:
        return partial(override or _SIMPLE_SERVICES[name], base, settings)
    redis = resources.redis
    if redis is None:
        raise SettingError(f"{name} needs a Redis server: set OCTOLLM_REDIS_URL, e.g. redis://localhost:6379/0.")
    if name == "orchestrator":
        root = resources.root
        if root is None:
            raise SettingError("The orchestrator needs the root key: see `octollm keys provision --help`.")
        return partial(
            orchestrator_service,
            base,
            settings,
            redis=redis,
            root_key=root.root,
            service_keys=root.services,
            local_key=root.local,
        )
    if name == "monitor":
        return partial(monitor_service, base, settings, redis=redis)
    trusted = resources.local_key if settings.trust_loopback and resources.loopback_only else None
    return partial(
        reflex_service, base, settings, redis=redis, local_key=trusted, loopback_only=resources.loopback_only
    )


HEALTH_SECONDS = 5.0


@contextlib.asynccontextmanager
async def serve_builtin_service(
    name: str, settings: Settings, *, clock: Clock, ids: IdGenerator, on_wait: Callable[[str], None]
) -> AsyncGenerator[ServiceHost]:
    """Serve the built-in service ``name`` for as long as the context is open; leaving drains.

    It waits for what it needs, and ``tell`` is given in words what that is. Raises ``setting_invalid`` for a name or
    keys that are wrong, ``port_taken``, ``unavailable`` when what it needs does not come in time.
    """
    if name not in SERVICES:
        raise SettingError(f"There is no service {name}. There are {', '.join(SERVICES)}.")
    if name in REDIS_SERVICES and settings.redis_url.startswith("memory:"):
        raise SettingError(f"{name} needs a Redis server: set OCTOLLM_REDIS_URL, e.g. redis://localhost:6379/0.")
    keys = await load_service_keys(settings, name, ids, clock.now())
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(configure_logging(None, level=settings.log_level, clock=clock))
        wire = transport_from_settings(settings)
        http = await stack.enter_async_context(wire.create_client())
        names = await stack.enter_async_context(DnsResolver())
        port = settings.port or SERVICES[name].port + settings.port_offset
        discovery = StaticDiscovery(resolve_addresses(settings), names)
        redis = await stack.enter_async_context(open_redis(settings.redis_url)) if name in REDIS_SERVICES else None
        identity = ServiceIdentity(name, keys.own, keys.roots, clock, ids)
        base = build_base(
            identity,
            http,
            discovery,
            advertised_url=advertised_url(settings, port),
            trace_sample_ratio=settings.trace_sample_ratio,
            transport=server_transport(wire, name),
            follow_revocations=name != "orchestrator",
        )
        supplies = ServiceResources(settings, redis, keys.root, None, is_loopback(settings.host))
        opener = bind_service_factory(name, base, supplies)
        needs = _dependency_checks(name, redis, http, discovery)
        yield await _start_host(
            name, opener, needs, (settings.host, port), settings=settings, clock=clock, on_wait=on_wait, stack=stack
        )


async def _start_host(
    name: str,
    open_service: ServiceContextFactory,
    checks: dict[str, DependencyCheck],
    address: tuple[str, int],
    *,
    settings: Settings,
    clock: Clock,
    on_wait: Callable[[str], None],
    stack: contextlib.AsyncExitStack,
) -> ServiceHost:
    """Wait for what the service needs, then open and serve it; opening it is the last of its needs."""
    started: list[ServiceHost] = []

    async def opened() -> None:
        started.append(await start_service_host(name, open_service, *address, drain=settings.shutdown_grace))

    async def close() -> None:
        for host in started:
            await host.close(settings.shutdown_grace + 2)

    stack.push_async_callback(close)
    end = clock.monotonic() + settings.startup_timeout
    await wait_for_dependencies(checks, clock=clock, timeout=settings.startup_timeout, on_wait=on_wait)
    left = max(1.0, end - clock.monotonic())
    await wait_for_dependencies({name: opened}, clock=clock, timeout=left, on_wait=on_wait)
    get_logger(name).info("service.up", address=f"{address[0]}:{address[1]}")
    return started[0]


def _dependency_checks(
    name: str, redis: RedisClient | None, http: HttpClient, discovery: Discovery
) -> dict[str, DependencyCheck]:
    async def redis_answers() -> None:
        assert redis is not None
        await redis.ping()

    async def orchestrator_answers() -> None:
        url = discovery.instances("orchestrator")[0]
        answer = await http.send("GET", f"{url}/health", {}, None, seconds=HEALTH_SECONDS)
        if answer.status != 200:
            raise OctoError(f"{url}/health answers {answer.status}.", code="unavailable")

    needs: dict[str, DependencyCheck] = {}
    if redis is not None:
        needs["redis"] = redis_answers
    if name != "orchestrator":
        needs["orchestrator"] = orchestrator_answers
    return needs
