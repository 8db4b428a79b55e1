"""One service in a process of its own, with settings from the environment and servers that others run."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable

from octollm.clock import Clock, Ids
from octollm.config import Settings
from octollm.contracts.services import SERVICES
from octollm.errors import OctoError, SettingError
from octollm.installation.addresses import addresses, advertised
from octollm.installation.hosted import Hosted, Opener, start_hosted
from octollm.installation.own_keys import own_keys
from octollm.installation.ports import is_loopback
from octollm.installation.services import NEED_REDIS, Supplies, service_opener
from octollm.installation.starting import Need, wait_for
from octollm.installation.wires import served, wire_of
from octollm.rpc.discovery import Discovery, StaticDiscovery
from octollm.rpc.discovery_dns import DnsNames
from octollm.rpc.http import Http
from octollm.rpc.identity import Identity
from octollm.rpc.service import build_base
from octollm.storage import RedisClient, open_redis
from octollm.telemetry import configure_logs, log_for

HEALTH_SECONDS = 5.0


@contextlib.asynccontextmanager
async def single_service(
    name: str, settings: Settings, *, clock: Clock, ids: Ids, tell: Callable[[str], None]
) -> AsyncGenerator[Hosted]:
    """Serve the built-in service ``name`` for as long as the context is open; leaving drains.

    It waits for what it needs, and ``tell`` is given in words what that is. Raises ``setting_invalid`` for a name or
    keys that are wrong, ``port_taken``, ``unavailable`` when what it needs does not come in time.
    """
    if name not in SERVICES:
        raise SettingError(f"There is no service {name}. There are {', '.join(SERVICES)}.")
    if name in NEED_REDIS and settings.redis_url.startswith("memory:"):
        raise SettingError(f"{name} needs a Redis server: set OCTOLLM_REDIS_URL, e.g. redis://localhost:6379/0.")
    keys = await own_keys(settings, name, ids, clock.now())
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(configure_logs(None, level=settings.log_level, clock=clock))
        wire = wire_of(settings)
        http = await stack.enter_async_context(wire.client())
        names = await stack.enter_async_context(DnsNames())
        port = settings.port or SERVICES[name].port + settings.port_shift
        discovery = StaticDiscovery(addresses(settings), names)
        redis = await stack.enter_async_context(open_redis(settings.redis_url)) if name in NEED_REDIS else None
        identity = Identity(name, keys.own, keys.roots, clock, ids)
        base = build_base(
            identity,
            http,
            discovery,
            url=advertised(settings, port),
            trace_share=settings.trace_share,
            wire=served(wire, name),
            follow_revocations=name != "orchestrator",
        )
        supplies = Supplies(settings, redis, keys.root, None, is_loopback(settings.host))
        opener = service_opener(name, base, supplies)
        needs = _needs(name, redis, http, discovery)
        yield await _started(
            name, opener, needs, (settings.host, port), settings=settings, clock=clock, tell=tell, stack=stack
        )


async def _started(
    name: str,
    opener: Opener,
    needs: dict[str, Need],
    address: tuple[str, int],
    *,
    settings: Settings,
    clock: Clock,
    tell: Callable[[str], None],
    stack: contextlib.AsyncExitStack,
) -> Hosted:
    """Wait for what the service needs, then open and serve it; opening it is the last of its needs."""
    started: list[Hosted] = []

    async def opened() -> None:
        started.append(await start_hosted(name, opener, *address, drain=settings.drain_seconds))

    async def close() -> None:
        for host in started:
            await host.close(settings.drain_seconds + 2)

    stack.push_async_callback(close)
    end = clock.monotonic() + settings.start_seconds
    await wait_for(needs, clock=clock, seconds=settings.start_seconds, tell=tell)
    left = max(1.0, end - clock.monotonic())
    await wait_for({name: opened}, clock=clock, seconds=left, tell=tell)
    log_for(name).info("service.up", address=f"{address[0]}:{address[1]}")
    return started[0]


def _needs(name: str, redis: RedisClient | None, http: Http, discovery: Discovery) -> dict[str, Need]:
    async def redis_answers() -> None:
        assert redis is not None
        await redis.ping()

    async def orchestrator_answers() -> None:
        url = discovery.instances("orchestrator")[0]
        answer = await http.send("GET", f"{url}/health", {}, None, seconds=HEALTH_SECONDS)
        if answer.status != 200:
            raise OctoError(f"{url}/health answers {answer.status}.", code="unavailable")

    needs: dict[str, Need] = {}
    if redis is not None:
        needs["redis"] = redis_answers
    if name != "orchestrator":
        needs["orchestrator"] = orchestrator_answers
    return needs
