"""A service follows what is revoked: before it is ready, at once, through restarts, and it says when it cannot."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field

import msgspec
import pytest
from kit import IDS
from starlette.responses import StreamingResponse
from wires import CURRENT

from octollm.capability import Principal, RootMinter, SigningKey
from octollm.clock import SystemClock
from octollm.contracts.auth import RevocationUpdate, RevocationView
from octollm.contracts.observability import Readiness
from octollm.errors import OctoError
from octollm.rpc import revocations as revoked_module
from octollm.rpc.call import IncomingCall, Operation
from octollm.rpc.discovery import StaticDiscovery
from octollm.rpc.http_client import HttpClient
from octollm.rpc.identity import ServiceIdentity
from octollm.rpc.service import ServiceBase, build_base, build_service
from octollm.rpc.transport import listen
from octollm.testing import wait_until

ALICE = Principal("alice", "key-1", "acme")


class ShiftedClock(SystemClock):
    """A clock that a test puts forward."""

    ahead = 0.0

    def monotonic(self) -> float:
        return super().monotonic() + self.ahead


@dataclass
class RevocationFeed:
    """The revocations that a test's orchestrator streams, line by line; ``cut`` ends the open streams."""

    lines: list[bytes] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    streams: int = 0
    cut: bool = False

    def publish(self, *views: RevocationView, whole: bool = False, floor: float | None = None) -> None:
        self.lines.append(msgspec.json.encode(RevocationUpdate(views, floor, whole)) + b"\n")
        self.news.set()

    async def follow(self, _call: IncomingCall, _body: object) -> StreamingResponse:
        self.streams += 1

        async def lines() -> AsyncIterator[bytes]:
            sent = 0
            while not self.cut:
                while sent < len(self.lines):
                    sent += 1
                    yield self.lines[sent - 1]
                self.news.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.05):
                        await self.news.wait()

        return StreamingResponse(lines(), media_type="application/x-ndjson")


@dataclass
class SubscriberKit:
    http: HttpClient
    feed: RevocationFeed
    clock: ShiftedClock
    base: ServiceBase
    url: str
    minter: RootMinter

    def token(self, **claims: object) -> str:
        return self.minter.mint_access(ALICE, "svc", "svc:work", **claims)  # type: ignore[arg-type]

    async def call(self, path: str, token: str) -> tuple[int, str]:
        answer = await self.http.send("POST", self.url + path, {"Authorization": f"Bearer {token}"}, b"{}", seconds=10)
        body = msgspec.json.decode(answer.body)
        return answer.status, body.get("code", "")

    async def ready(self) -> tuple[int, Readiness]:
        answer = await self.http.send("GET", self.url + "/ready", {}, None, seconds=10)
        return answer.status, msgspec.json.decode(answer.body, type=Readiness)

    async def wait_until_known(self) -> None:
        async def ok() -> bool:
            return (await self.ready())[1].dependencies["revocations"].ok

        await wait_until(ok, description="the revocations are known")


async def nothing(_call: IncomingCall, _body: object) -> dict[str, str]:
    return {}


@contextlib.asynccontextmanager
async def orchestrator(http: HttpClient, feed: RevocationFeed, port: int = 0) -> AsyncGenerator[int]:
    key = SigningKey.generate("orchestrator")
    clock = SystemClock()
    base = build_base(
        ServiceIdentity("orchestrator", key, {}, clock, IDS),
        http,
        StaticDiscovery({}),
        transport=CURRENT.wire,
        follow_revocations=False,
    )
    operation = Operation(
        "revocations", "GET", "/revocations", feed.follow, auth="public", raw=True, limited=False, timeout=3600
    )
    bound = listen("127.0.0.1", port, "orchestrator")
    async with build_service(base, [operation]).serve(bound, shutdown_grace=0.1):
        yield bound.getsockname()[1]
        feed.cut = True
    feed.cut = False


@contextlib.asynccontextmanager
async def kit(feed: RevocationFeed, orchestrator_port: int, http: HttpClient) -> AsyncGenerator[SubscriberKit]:
    root, clock = SigningKey.generate("root"), ShiftedClock()
    bound = listen("127.0.0.1", 0, "svc")
    url = CURRENT.url(bound.getsockname()[1])
    urls = {"orchestrator": (CURRENT.url(orchestrator_port),), "svc": (url,)}
    identity = ServiceIdentity("svc", SigningKey.generate("svc"), {root.thumbprint: root.public}, clock, IDS)
    base = build_base(identity, http, StaticDiscovery(urls), transport=CURRENT.wire)
    operations = [
        Operation("look", "POST", "/look", nothing, scope="svc:work", kind="read_only"),
        Operation("work", "POST", "/work", nothing, scope="svc:work", kind="idempotent"),
        Operation("pay", "POST", "/pay", nothing, scope="svc:work", kind="at_most_once"),
    ]
    async with build_service(base, operations).serve(bound, shutdown_grace=0.1):
        yield SubscriberKit(http, feed, clock, base, url, RootMinter(root, clock, IDS))


@pytest.fixture
async def feed() -> RevocationFeed:
    return RevocationFeed()


async def test_nothing_is_done_before_all_that_is_revoked_is_known(feed: RevocationFeed) -> None:
    async with CURRENT.client() as http, orchestrator(http, feed) as port, kit(feed, port, http) as svc:
        token = svc.token(task=None)
        assert await svc.call("/look", token) == (503, "revocations_unknown")
        status, ready = await svc.ready()
        assert (status, ready.status) == (503, "not ready")
        feed.publish(RevocationView("sub", "mallory", 1.0, "acme"))
        await wait_until(lambda: len(svc.base.revocations.revocations) == 1, description="a first line came")  # type: ignore[union-attr]
        assert await svc.call("/look", token) == (503, "revocations_unknown"), "the rest may name this one"
        feed.publish(whole=True)
        await svc.wait_until_known()
        for path in ("/look", "/work", "/pay"):
            assert await svc.call(path, token) == (200, "")
        assert (await svc.ready())[0] == 200


async def test_what_is_revoked_is_refused_as_soon_as_it_is_told(feed: RevocationFeed) -> None:
    feed.publish(whole=True)
    async with CURRENT.client() as http, orchestrator(http, feed) as port, kit(feed, port, http) as svc:
        await svc.wait_until_known()
        token, other = svc.token(), svc.token()
        assert await svc.call("/look", token) == (200, "")
        jti = svc.base.identity.verifier().verify(token).links[0].jti
        feed.publish(RevocationView("jti", jti, svc.clock.now(), "globex"))
        feed.publish(RevocationView("jti", jti, svc.clock.now(), "acme"))

        async def refused() -> bool:
            return await svc.call("/look", token) == (401, "token_revoked")

        await wait_until(refused, description="the token is refused", timeout=1)
        assert await svc.call("/look", other) == (200, "")
        feed.publish(floor=svc.clock.now() + 1)

        async def all_refused() -> bool:
            return await svc.call("/look", other) == (401, "token_revoked")

        await wait_until(all_refused, description="everything up to the floor is refused", timeout=1)


async def test_without_news_only_what_changes_nothing_is_done_and_ready_says_so(feed: RevocationFeed) -> None:
    feed.publish(whole=True)
    async with CURRENT.client() as http, orchestrator(http, feed) as port, kit(feed, port, http) as svc:
        await svc.wait_until_known()
        token = svc.token(lifetime=600.0)
        svc.clock.ahead += 30
        status, ready = await svc.ready()
        assert (status, ready.status) == (200, "degraded")
        assert await svc.call("/work", token) == (200, ""), "for a minute all goes on"
        svc.clock.ahead += 40
        assert await svc.call("/work", token) == (503, "revocations_unknown")
        assert await svc.call("/pay", token) == (503, "revocations_unknown")
        assert await svc.call("/look", token) == (200, "")
        status, ready = await svc.ready()
        assert (status, ready.status) == (200, "degraded")
        assert "calls that are not read-only are refused" in ready.dependencies["revocations"].detail
        feed.publish()
        await svc.wait_until_known()
        assert await svc.call("/work", token) == (200, "")


async def test_a_lost_orchestrator_is_asked_again_and_what_was_known_stays_refused(feed: RevocationFeed) -> None:
    feed.publish(RevocationView("cred", "key-1", 4e9, "acme"), whole=True)
    async with CURRENT.client() as http:
        async with orchestrator(http, feed) as port, contextlib.AsyncExitStack() as stack:
            svc = await stack.enter_async_context(kit(feed, port, http))
            await svc.wait_until_known()
            outer = stack.pop_all()
        async with outer:
            assert await svc.call("/look", svc.token()) == (401, "token_revoked")
            feed.lines.clear()
            feed.publish(whole=True)
            before = feed.streams
            async with orchestrator(http, feed, port):
                await wait_until(lambda: feed.streams > before, description="it asks again")
                await svc.wait_until_known()
                assert await svc.call("/look", svc.token()) == (401, "token_revoked"), "a shorter list revives nothing"


@pytest.mark.parametrize("line", [b"[]\n", b'{"revocations":[{"kind":"all"}]}\n', b"x" * 1_100_000, b"\xff\n"])
async def test_what_is_no_revocation_is_no_news(
    feed: RevocationFeed, line: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(revoked_module, "LONGEST_PAUSE", 0.1)
    feed.lines.append(line)
    async with CURRENT.client() as http, orchestrator(http, feed) as port, kit(feed, port, http) as svc:
        await wait_until(lambda: feed.streams > 1, description="the stream was given up and asked for again")
        assert await svc.call("/look", svc.token()) == (503, "revocations_unknown")
        feed.lines.clear()
        feed.publish(whole=True)
        await svc.wait_until_known()


def test_a_check_tells_when_to_come_back() -> None:
    clock = ShiftedClock()
    base = build_base(
        ServiceIdentity("svc", SigningKey.generate("svc"), {}, clock, IDS),
        None,
        StaticDiscovery({}),  # type: ignore[arg-type]
    )
    assert base.revocations is not None
    with pytest.raises(OctoError) as caught:
        base.revocations.check(read_only=True)
    assert (caught.value.code, caught.value.retry_after) == ("revocations_unknown", 1)
