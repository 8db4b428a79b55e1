"""One service in a process of its own, with settings from the environment and servers that others run."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable

from octollm.clock import Clock, IdGenerator
from octollm.config import Settings
from octollm.contracts.services import SERVICES
from octollm.errors import OctoError, SettingError
from octollm.installation.addresses import advertised_url, resolve_addresses
from octollm.installation.hosted import ServiceContextFactory, ServiceHost, start_service_host
from octollm.installation.own_keys import load_service_keys
from octollm.installation.ports import is_loopback
from octollm.installation.services import REDIS_SERVICES, ServiceResources, bind_service_factory
from octollm.installation.starting import DependencyCheck, wait_for_dependencies
from octollm.installation.wires import server_transport, transport_from_settings
from octollm.rpc.discovery import Discovery, StaticDiscovery
from octollm.rpc.discovery_dns import DnsResolver
from octollm.rpc.http import HttpClient
from octollm.rpc.identity import ServiceIdentity
from octollm.rpc.service import build_base
from octollm.storage import RedisClient, open_redis
from octollm.telemetry import configure_logging, get_logger

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
