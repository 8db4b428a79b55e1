"""What every way of finding instances does: settings, DNS and the registry, under one suite with real calls."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import msgspec
import pytest
from kit import CLOCK, IDS, base_for

from octollm.errors import OctoError
from octollm.resilience import Deadline
from octollm.rpc.call import IncomingCall, Operation
from octollm.rpc.client import CallTarget, OutgoingCall, ServiceClient
from octollm.rpc.discovery import Discovery, DnsRecords, DnsResolver, RegistryDiscovery, StaticDiscovery
from octollm.rpc.http1_client import Http1Client
from octollm.rpc.http_client import HttpClient
from octollm.rpc.service import build_service
from octollm.rpc.transport import listen
from octollm.testing import wait_until

PORT_HOSTS = ("127.0.0.1", "127.0.0.2", "127.0.0.3")


class Where(msgspec.Struct):
    host: str


@dataclass
class Way:
    """A way of finding ``arm``; ``tell`` makes it known at other hosts, where that needs no restart."""

    discovery: Discovery
    tell: Callable[[tuple[str, ...]], None] | None
    port: int


@pytest.fixture(params=["static", "dns", "registry"])
async def way(request: pytest.FixtureRequest) -> AsyncIterator[Way]:
    with contextlib.closing(listen("127.0.0.1", 0, "arm")) as probe:
        port = probe.getsockname()[1]
    hosts: tuple[str, ...] = PORT_HOSTS[:2]

    def tell(now: tuple[str, ...]) -> None:
        nonlocal hosts
        hosts = now

    async def lookup(_name: str) -> DnsRecords:
        if not hosts:
            raise LookupError
        return DnsRecords(hosts, 0.0)

    def urls() -> tuple[str, ...]:
        return tuple(f"http://{host}:{port}" for host in hosts)

    if request.param == "static":
        yield Way(StaticDiscovery({"arm": urls()}), None, port)
    elif request.param == "registry":
        registry = RegistryDiscovery(StaticDiscovery({}), lambda name: urls() if name == "arm" else ())
        yield Way(registry, tell, port)
    else:
        async with DnsResolver(resolve=lookup) as names:
            found = StaticDiscovery({"arm": (f"http://arm.internal:{port}",)}, names)
            await wait_until(lambda: found.instances("arm") == urls(), description="DNS answered")
            yield Way(found, tell, port)


@contextlib.asynccontextmanager
async def instance(http: HttpClient, host: str, port: int, *, bad: bool = False) -> AsyncIterator[None]:
    async def where(_call: IncomingCall, _body: object) -> Where:
        if bad:
            raise ZeroDivisionError
        return Where(host)

    operation = Operation("where", "GET", "/where", where, auth="public", response=Where)
    base = base_for(http, {"svc": (f"http://{host}:{port}",)})
    async with build_service(base, [operation]).serve(listen(host, port, "svc")):
        yield


@contextlib.asynccontextmanager
async def calling(way: Way, *hosts: str, bad: str = "") -> AsyncIterator[Callable[[], object]]:
    """Serve at ``hosts``, and yield what calls the arm once and returns which of them answered."""
    async with contextlib.AsyncExitStack() as stack:
        http = await stack.enter_async_context(Http1Client())
        for host in hosts:
            await stack.enter_async_context(instance(http, host, way.port, bad=host == bad))
        metrics = base_for(http, {"svc": ("http://127.0.0.1:1",)}).metrics
        caller = ServiceClient("tester", http, way.discovery, clock=CLOCK, ids=IDS, metrics=metrics)

        async def call() -> str:
            target = CallTarget("arm", "where", "GET", "/where", "read_only")
            return (await caller.call(OutgoingCall(target, "none", Deadline.after(CLOCK, 10)), Where)).host

        yield call


async def test_every_instance_is_called(way: Way) -> None:
    async with calling(way, *PORT_HOSTS[:2]) as call:
        assert {await call() for _ in range(40)} == set(PORT_HOSTS[:2])


async def test_one_that_is_away_is_passed_over(way: Way) -> None:
    async with calling(way, PORT_HOSTS[1]) as call:
        assert {await call() for _ in range(40)} == {PORT_HOSTS[1]}


async def test_one_that_fails_is_left_alone(way: Way) -> None:
    async with calling(way, *PORT_HOSTS[:2], bad=PORT_HOSTS[0]) as call:
        answered = 0
        for _ in range(60):
            with contextlib.suppress(OctoError):
                assert await call() == PORT_HOSTS[1]
                answered += 1
        assert answered >= 50


# What a setting says holds as long as the process.
@pytest.mark.parametrize("way", ["dns", "registry"], indirect=True)
async def test_a_change_is_followed_without_a_restart(way: Way) -> None:
    assert way.tell is not None
    async with calling(way, PORT_HOSTS[0], PORT_HOSTS[2]) as call:
        assert await call() == PORT_HOSTS[0]
        way.tell((PORT_HOSTS[2],))

        async def moved() -> bool:
            return {await call() for _ in range(5)} == {PORT_HOSTS[2]}

        await wait_until(moved, description="calls go to the new instance", timeout=10)


async def test_what_is_not_known_is_said_with_what_to_do(way: Way) -> None:
    with pytest.raises(OctoError, match="OCTOLLM_NOBODY_URL") as caught:
        way.discovery.instances("nobody")
    assert caught.value.code == "unavailable"
