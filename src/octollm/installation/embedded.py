"""Every service in one process, speaking real HTTP to each other."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from octollm.clock import Clock, IdGenerator
from octollm.config import Settings
from octollm.errors import OctoError
from octollm.installation.home import Home, RunningInstallation, open_home, open_keys, write_private
from octollm.installation.keys import HomeKeys, load_home_keys
from octollm.installation.network import bind_all, is_loopback, server_transport, transport_from_settings
from octollm.installation.provisioning import RootKeys
from octollm.installation.service_host import ServiceHost, supervise_hosts
from octollm.installation.services import ServiceFactory, ServiceResources, bind_service_factory
from octollm.rpc.discovery import StaticDiscovery
from octollm.rpc.health import Readiness
from octollm.rpc.http_client import HttpClient, TransportError
from octollm.rpc.identity import ServiceIdentity
from octollm.rpc.service import ServiceBase, build_base
from octollm.rpc.transport import TransportConfig
from octollm.storage import MemoryServers, open_redis
from octollm.telemetry import configure_logging, get_logger

STOP_SECONDS = 2.4
"""How long stopping may take before the remaining services are cancelled."""
DRAIN_SECONDS = 2.0
"""How long calls in flight may take to end on shutdown: their callers in this process stop, too."""
READY_SECONDS = 150.0
"""How long the services may take to become ready; loading a model is most of it."""

START_STAGES: Sequence[tuple[str, ...]] = (
    ("orchestrator",),
    ("memory", "monitor", "models"),
    ("judge", "executor", "retriever", "coder", "planner"),
    ("reflex",),
)
"""Services in the order of their dependencies; those of one stage start concurrently."""

STOP_STAGES: Sequence[tuple[str, ...]] = (
    ("reflex",),
    ("orchestrator",),
    ("judge", "executor", "retriever", "coder", "planner"),
    ("memory", "models"),
    ("monitor",),
)
"""Callers stop before their callees, which then have no calls left to drain. The monitor is last: the others export
their last spans to it."""

OnStage = Callable[[str], None]


def _ignore_stage(_name: str) -> None:
    """Ignore the stage."""


@dataclass(frozen=True, slots=True)
class Installation:
    """A running installation. ``urls`` maps each service to its address on this machine."""

    home: Home
    settings: Settings
    urls: Mapping[str, str]
    local_key: str
    http: HttpClient

    @property
    def gateway_url(self) -> str:
        """The URL of the gateway."""
        return self.urls["reflex"]

    async def wait_ready(self, *, timeout: float = READY_SECONDS, on_ready: OnStage = _ignore_stage) -> None:
        """Wait until every service is ready; call ``on_ready`` with the name of each.

        Raises ``unavailable`` after ``timeout`` seconds, naming the services that are not ready, with the reasons.
        """
        end = time.monotonic() + timeout
        unready = dict.fromkeys(self.urls, "it does not answer")
        while unready:
            for name in list(unready):
                reason = await self._unready_reason(name)
                if reason is None:
                    del unready[name]
                    on_ready(name)
                else:
                    unready[name] = reason
            if unready and time.monotonic() > end:
                what = "; ".join(f"{name}: {reason}" for name, reason in unready.items())
                raise OctoError(f"Not ready after {timeout:.0f} s: {what}.", code="unavailable")
            if unready:
                await asyncio.sleep(0.05)

    async def _unready_reason(self, name: str) -> str | None:
        """Return the reason why a service is not ready; ``None`` when it is."""
        try:
            answer = await self.http.send("GET", self.urls[name] + "/ready", {}, None, seconds=10)
        except TransportError as error:
            return error.detail
        if answer.status == 200:
            return None
        try:
            readiness = msgspec.json.decode(answer.body, type=Readiness)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return f"/ready answers {answer.status}"
        missing = (f"{key} ({state.detail})" for key, state in readiness.dependencies.items() if not state.ok)
        return ", ".join(missing) or readiness.status


@contextlib.asynccontextmanager
async def embedded_installation(
    settings: Settings,
    *,
    clock: Clock,
    ids: IdGenerator,
    ports: Mapping[str, int] | None = None,
    overrides: Mapping[str, ServiceFactory] | None = None,
    on_stage: OnStage = _ignore_stage,
) -> AsyncGenerator[Installation]:
    """Run every service in this process while the context is open.

    ``ports`` overrides single ports (0 is any free one), ``overrides`` the factories of single services. ``on_stage``
    is called with the names of the services that start next. When a service dies, the body is cancelled and the reason
    raised. Leaving the context stops everything in less than 3 s. Raises ``home_in_use``, ``port_taken``,
    ``setting_invalid`` and what the services raise at their start.
    """
    async with contextlib.AsyncExitStack() as stack:
        home = await stack.enter_async_context(open_home(settings.home))
        transport = transport_from_settings(settings)
        # All sockets are bound before anything starts, so a port in use is reported at once.
        bound = stack.enter_context(bind_all(settings.host, settings.port_offset, ports, scheme=transport.scheme))
        async with open_keys(settings.home):
            keys = await asyncio.to_thread(load_home_keys, home, ids)
        stack.enter_context(configure_logging(home.log_file, level=settings.log_level, clock=clock))
        http = await stack.enter_async_context(transport.create_client())
        redis = await stack.enter_async_context(open_redis(settings.redis_url, servers=MemoryServers()))
        system = Installation(home, settings, bound.urls, keys.local, http)
        resources = ServiceResources(
            settings, redis, RootKeys(keys.root, keys.public, keys.local), keys.local, is_loopback(settings.host)
        )
        hosts = {
            name: ServiceHost(
                name,
                bind_service_factory(name, base, resources, override=(overrides or {}).get(name)),
                bound.sockets[name],
                drain=DRAIN_SECONDS,
            )
            for name, base in _build_bases(system, keys, transport, clock, ids).items()
        }
        try:
            for stage in START_STAGES:
                on_stage(", ".join(stage))
                await asyncio.gather(*(hosts[name].start() for name in stage))
            running = msgspec.json.encode(RunningInstallation(os.getpid(), system.gateway_url))
            await asyncio.to_thread(write_private, home.running_file, running, ids)
            async with supervise_hosts(hosts.values()):
                yield system
        finally:
            await _stop_hosts(hosts)


def _build_bases(
    system: Installation, keys: HomeKeys, transport: TransportConfig, clock: Clock, ids: IdGenerator
) -> dict[str, ServiceBase]:
    addresses = {name: (url,) for name, url in system.urls.items()}
    discovery = StaticDiscovery({**addresses, **system.settings.service_urls})
    return {
        name: build_base(
            ServiceIdentity(name, key, keys.roots(clock.now()), clock, ids),
            system.http,
            discovery,
            trace_sample_ratio=system.settings.trace_sample_ratio,
            transport=server_transport(transport, name),
            follow_revocations=name != "orchestrator",
        )
        for name, key in keys.services.items()
    }


async def _stop_hosts(hosts: Mapping[str, ServiceHost]) -> None:
    """Stop the services stage by stage; an error of one is logged and does not keep the others from stopping."""
    end = time.monotonic() + STOP_SECONDS
    failures: list[BaseException] = []
    for stage in STOP_STAGES:
        remaining = max(0.1, end - time.monotonic())
        outcomes = await asyncio.gather(*(hosts[name].close(remaining) for name in stage), return_exceptions=True)
        failures += [failure for failure in outcomes if isinstance(failure, Exception)]
    log = get_logger("embedded")
    for failure in failures:
        log.error("service.failed", error=failure)
