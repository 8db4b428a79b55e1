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


class HostAnswer(msgspec.Struct):
    host: str


@dataclass
class DiscoveryCase:
    """A way of finding ``arm``; ``move`` makes it known at other hosts, where that needs no restart."""

    discovery: Discovery
    move: Callable[[tuple[str, ...]], None] | None
    port: int


@pytest.fixture(params=["static", "dns", "registry"])
async def case(request: pytest.FixtureRequest) -> AsyncIterator[DiscoveryCase]:
    with contextlib.closing(listen("127.0.0.1", 0, "arm")) as probe:
        port = probe.getsockname()[1]
    hosts: tuple[str, ...] = PORT_HOSTS[:2]

    def move(now: tuple[str, ...]) -> None:
        nonlocal hosts
        hosts = now

    async def lookup(_name: str) -> DnsRecords:
        if not hosts:
            raise LookupError
        return DnsRecords(hosts, 0.0)

    def urls() -> tuple[str, ...]:
        return tuple(f"http://{host}:{port}" for host in hosts)

    if request.param == "static":
        yield DiscoveryCase(StaticDiscovery({"arm": urls()}), None, port)
    elif request.param == "registry":
        registry = RegistryDiscovery(StaticDiscovery({}), lambda name: urls() if name == "arm" else ())
        yield DiscoveryCase(registry, move, port)
    else:
        async with DnsResolver(resolve=lookup) as names:
            found = StaticDiscovery({"arm": (f"http://arm.internal:{port}",)}, names)
            await wait_until(lambda: found.instances("arm") == urls(), description="DNS answered")
            yield DiscoveryCase(found, move, port)


@contextlib.asynccontextmanager
async def instance(http: HttpClient, host: str, port: int, *, bad: bool = False) -> AsyncIterator[None]:
    async def where(_call: IncomingCall, _body: object) -> HostAnswer:
        if bad:
            raise ZeroDivisionError
        return HostAnswer(host)

    operation = Operation("where", "GET", "/where", where, auth="public", response=HostAnswer)
    base = base_for(http, {"svc": (f"http://{host}:{port}",)})
    async with build_service(base, [operation]).serve(listen(host, port, "svc")):
        yield


@contextlib.asynccontextmanager
async def calling(case: DiscoveryCase, *hosts: str, bad: str = "") -> AsyncIterator[Callable[[], object]]:
    """Serve at ``hosts``, and yield what calls the arm once and returns which of them answered."""
    async with contextlib.AsyncExitStack() as stack:
        http = await stack.enter_async_context(Http1Client())
        for host in hosts:
            await stack.enter_async_context(instance(http, host, case.port, bad=host == bad))
        metrics = base_for(http, {"svc": ("http://127.0.0.1:1",)}).metrics
        caller = ServiceClient("tester", http, case.discovery, clock=CLOCK, ids=IDS, metrics=metrics)

        async def call() -> str:
            target = CallTarget("arm", "where", "GET", "/where", "read_only")
            return (await caller.call(OutgoingCall(target, "none", Deadline.after(CLOCK, 10)), HostAnswer)).host

        yield call


async def test_every_instance_is_called(case: DiscoveryCase) -> None:
    async with calling(case, *PORT_HOSTS[:2]) as call:
        assert {await call() for _ in range(40)} == set(PORT_HOSTS[:2])


async def test_one_that_is_away_is_passed_over(case: DiscoveryCase) -> None:
    async with calling(case, PORT_HOSTS[1]) as call:
        assert {await call() for _ in range(40)} == {PORT_HOSTS[1]}


async def test_one_that_fails_is_left_alone(case: DiscoveryCase) -> None:
    async with calling(case, *PORT_HOSTS[:2], bad=PORT_HOSTS[0]) as call:
        answered = 0
        for _ in range(60):
            with contextlib.suppress(OctoError):
                assert await call() == PORT_HOSTS[1]
                answered += 1
        assert answered >= 50


# What a setting says holds as long as the process.
@pytest.mark.parametrize("case", ["dns", "registry"], indirect=True)
async def test_a_change_is_followed_without_a_restart(case: DiscoveryCase) -> None:
    assert case.move is not None
    async with calling(case, PORT_HOSTS[0], PORT_HOSTS[2]) as call:
        assert await call() == PORT_HOSTS[0]
        case.move((PORT_HOSTS[2],))

        async def is_moved() -> bool:
            return {await call() for _ in range(5)} == {PORT_HOSTS[2]}

        await wait_until(is_moved, description="calls go to the new instance", timeout=10)


async def test_what_is_not_known_is_said_with_what_to_do(case: DiscoveryCase) -> None:
    with pytest.raises(OctoError, match="OCTOLLM_NOBODY_URL") as caught:
        case.discovery.instances("nobody")
    assert caught.value.code == "unavailable"
