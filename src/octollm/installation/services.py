"""The built-in services: how each is opened, and one of them in a process of its own."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

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
    start_when_ready,
)
from octollm.rpc.discovery import Discovery, DnsResolver, StaticDiscovery
from octollm.rpc.http_client import HttpClient
from octollm.rpc.identity import ServiceIdentity
from octollm.rpc.service import Service, ServiceBase, build_base
from octollm.telemetry import configure_logging, get_logger

if TYPE_CHECKING:
    from octollm.storage import RedisClient

ServiceFactory = Callable[[ServiceBase, Settings], AbstractAsyncContextManager[Service]]
"""Opens a service from its base and the settings alone."""

REDIS_SERVICES = frozenset({"orchestrator", "monitor", "reflex"})
"""The services that need Redis. The memory caches there where it has one, and works without."""


def _load_factory(name: str) -> ServiceFactory | None:
    """Return the factory of a service that needs its base and the settings alone; ``None`` for the others.

    Only the module of the service is imported: a process of one arm starts in half the time without SQLAlchemy, Alembic
    and the other services.
    """
    match name:
        case "models":
            from octollm.services.models.service import models_service as factory
        case "planner":
            from octollm.services.arms.planner.service import planner_service as factory
        case "executor":
            from octollm.services.arms.executor.service import executor_service as factory
        case "coder":
            from octollm.services.arms.coder.service import coder_service as factory
        case "judge":
            from octollm.services.arms.judge.service import judge_service as factory
        case "retriever":
            from octollm.services.arms.retriever.service import retriever_service as factory
        case _:
            return None
    return factory


@dataclass(frozen=True, slots=True)
class ServiceResources:
    """What single services need besides their base.

    ``root`` is for the orchestrator alone. The gateway uses ``local_key`` as the credential of peers without one if
    ``loopback_only`` (only this machine can connect); ``None`` trusts no peer.
    """

    settings: Settings
    redis: RedisClient | None = None
    root: RootKeys | None = None
    local_key: str | None = None
    loopback_only: bool = False


def bind_service_factory(
    name: str, base: ServiceBase, resources: ServiceResources, *, override: ServiceFactory | None = None
) -> ServiceContextFactory:
    """Return the factory of the built-in service ``name``; ``override`` replaces a :data:`ServiceFactory`.

    Raises ``setting_invalid`` when a resource that it needs is missing.
    """
    settings = resources.settings
    factory = override or _load_factory(name)
    if factory is not None:
        return partial(factory, base, settings)
    redis = resources.redis
    if name == "memory":
        from octollm.services.memory.service import memory_service

        return partial(memory_service, base, settings, redis=redis)
    if redis is None:
        raise SettingError(f"{name} needs a Redis server: set OCTOLLM_REDIS_URL, e.g. redis://localhost:6379/0.")
    if name == "orchestrator":
        root = resources.root
        if root is None:
            raise SettingError("The orchestrator needs the root key: see `octollm keys provision --help`.")
        from octollm.services.orchestrator.service import orchestrator_service

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
        from octollm.services.monitor.service import monitor_service

        return partial(monitor_service, base, settings, redis=redis)
    from octollm.services.reflex.service import reflex_service

    trusted = resources.local_key if settings.trust_loopback and resources.loopback_only else None
    return partial(
        reflex_service, base, settings, redis=redis, local_key=trusted, loopback_only=resources.loopback_only
    )


HEALTH_SECONDS = 5.0
"""Timeout of a check of the orchestrator."""


@contextlib.asynccontextmanager
async def serve_builtin_service(
    name: str, settings: Settings, *, clock: Clock, ids: IdGenerator, on_wait: Callable[[str], None]
) -> AsyncGenerator[ServiceHost]:
    """Serve the built-in service ``name`` while the context is open; leaving it drains.

    It waits for its dependencies and calls ``on_wait`` with those that are missing. Raises ``setting_invalid`` for a
    wrong name or wrong keys, ``port_taken``, and ``unavailable`` when a dependency does not answer in time.
    """
    if name not in SERVICES:
        raise SettingError(f"There is no service {name}. There are {', '.join(SERVICES)}.")
    if name in REDIS_SERVICES and settings.redis_url.startswith("memory:"):
        raise SettingError(f"{name} needs a Redis server: set OCTOLLM_REDIS_URL, e.g. redis://localhost:6379/0.")
    keys = await load_service_keys(settings, name, ids, clock.now())
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(configure_logging(None, level=settings.log_level, clock=clock))
        transport = transport_from_settings(settings)
        http = await stack.enter_async_context(transport.create_client())
        resolver = await stack.enter_async_context(DnsResolver())
        port = settings.port or SERVICES[name].port + settings.port_offset
        discovery = StaticDiscovery(resolve_addresses(settings), resolver)
        wants_redis = name in REDIS_SERVICES or (name == "memory" and not settings.redis_url.startswith("memory:"))
        redis = await _enter_redis(stack, settings) if wants_redis else None
        identity = ServiceIdentity(name, keys.own, keys.roots, clock, ids)
        base = build_base(
            identity,
            http,
            discovery,
            advertised_url=advertised_url(settings, port),
            trace_sample_ratio=settings.trace_sample_ratio,
            transport=server_transport(transport, name),
            follow_revocations=name != "orchestrator",
        )
        resources = ServiceResources(settings, redis, keys.root, None, is_loopback(settings.host))
        host = await start_when_ready(
            name,
            bind_service_factory(name, base, resources),
            (settings.host, port),
            drain=settings.shutdown_grace,
            checks=_dependency_checks(name, redis if name in REDIS_SERVICES else None, http, discovery),
            opening=name,
            clock=clock,
            timeout=settings.startup_timeout,
            on_wait=on_wait,
        )
        stack.push_async_callback(host.close, settings.shutdown_grace + 2)
        get_logger(name).info("service.up", address=f"{settings.host}:{port}")
        yield host


async def _enter_redis(stack: contextlib.AsyncExitStack, settings: Settings) -> RedisClient:
    from octollm.storage import open_redis

    return await stack.enter_async_context(open_redis(settings.redis_url))


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

    checks: dict[str, DependencyCheck] = {}
    if redis is not None:
        checks["redis"] = redis_answers
    if name != "orchestrator":
        checks["orchestrator"] = orchestrator_answers
    return checks
