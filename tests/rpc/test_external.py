from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest
from wires import certificates

from octollm.clock import SystemClock
from octollm.errors import OctoError, RemoteError
from octollm.llm.openai_compatible import OpenAICompatibleModel
from octollm.llm.types import ChatMessage, ChatRequest, TextDelta
from octollm.resilience import Deadline, EjectionPolicy, RetryPolicy
from octollm.rpc.external import ExternalClient, create_external_http_client
from octollm.rpc.http1_client import Http1Client
from octollm.rpc.tls import TlsConfig
from octollm.rpc.transport import PLAINTEXT, TransportConfig, listen, serve_app
from octollm.telemetry import Metrics, get_logger
from octollm.testing import ManualClock
from octollm.testing.fake_model import ScriptedModel

CLOCK = SystemClock()
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy")


def external_client(clock: SystemClock = CLOCK, **options: object) -> ExternalClient:
    quick = {"retry": RetryPolicy(base_delay=0.0), **options}
    return ExternalClient(
        "models", "provider at example.org", clock=clock, metrics=Metrics("m"), log=get_logger("m"), **quick
    )  # type: ignore[arg-type]


@dataclass
class FlakyServer:
    """An external server: fails with each of ``failures``, then answers."""

    failures: list[OctoError] = field(default_factory=list[OctoError])
    called: int = 0

    async def __call__(self) -> str:
        self.called += 1
        if self.failures:
            raise self.failures.pop(0)
        return "answer"


def connection_failure(after: float | None = None) -> OctoError:
    return OctoError("provider at example.org: no connection.", code="model_failed", retry_after=after)


def refusal(code: str = "model_failed") -> RemoteError:
    return RemoteError("provider: the key was refused.", code=code, status=503, retryable=False)


async def call(
    server: FlakyServer,
    client: ExternalClient,
    *,
    seconds: float = 10,
    repeats: bool = True,
    clock: SystemClock = CLOCK,
):
    return await client.call("chat", server, Deadline.after(clock, seconds), is_repeatable=lambda: repeats)


async def test_what_may_pass_is_tried_again() -> None:
    server = FlakyServer([connection_failure(), connection_failure()])
    assert await call(server, external_client()) == "answer"
    assert server.called == 3


@pytest.mark.parametrize(
    ("failures", "repeats", "called"),
    [
        ([connection_failure()] * 9, True, 3),
        ([refusal()], True, 1),
        ([connection_failure()], False, 1),
        ([connection_failure(60.0)], True, 1),
    ],
    ids=["three times", "what it refuses", "what was begun", "not past the deadline"],
)
async def test_and_given_up_with_what_was_tried(failures: list[OctoError], repeats: bool, called: int) -> None:
    server = FlakyServer(list(failures))
    with pytest.raises(OctoError) as caught:
        await call(server, external_client(), repeats=repeats)
    assert server.called == called
    tried = caught.value.call_attempts
    assert tried is not None
    assert (tried.service, tried.attempts) == ("provider at example.org", called)


async def test_an_outage_is_not_multiplied() -> None:
    client = external_client(ejection=EjectionPolicy(consecutive_failures=10_000))
    server = FlakyServer([connection_failure() for _ in range(1000)])
    for _ in range(500):
        with contextlib.suppress(OctoError):
            await call(server, client)
    assert server.called <= 500 * 1.2 + 10


async def test_after_failures_in_a_row_it_is_left_alone_and_probed() -> None:
    clock = ManualClock()
    client = external_client(clock)
    server = FlakyServer([connection_failure() for _ in range(6)])
    for _ in range(2):
        with pytest.raises(OctoError):
            await call(server, client, clock=clock)
    assert server.called == 5
    with pytest.raises(OctoError) as refused:
        await call(server, client, clock=clock)
    assert server.called == 5
    assert refused.value.code == "unavailable"
    assert "provider at example.org" in refused.value.detail
    assert refused.value.retry_after is not None
    clock.time += 6
    with pytest.raises(OctoError):
        await call(server, client, clock=clock, repeats=False)
    assert server.called == 6  # the probe, which failed
    clock.time += 5
    with pytest.raises(OctoError, match="next try"):
        await call(server, client, clock=clock)
    clock.time += 6
    assert await call(server, client, clock=clock) == "answer"


async def test_who_refuses_or_asks_for_patience_is_well() -> None:
    client = external_client()
    for failure in [refusal(), connection_failure(60.0)] * 10:
        with pytest.raises(OctoError):
            await call(FlakyServer([failure]), client)
    assert await call(FlakyServer(), client) == "answer"


async def test_no_time_left_is_no_call() -> None:
    server = FlakyServer()
    with pytest.raises(OctoError) as caught:
        await call(server, external_client(), seconds=0)
    assert (caught.value.code, server.called) == ("deadline_exceeded", 0)


async def test_leaving_is_nobodys_failure() -> None:
    client = external_client()

    async def hang() -> str:
        await asyncio.Event().wait()
        return ""

    for _ in range(10):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.001):
                await client.call("chat", hang, Deadline.after(CLOCK, 10), is_repeatable=lambda: True)
    assert await call(FlakyServer(), client) == "answer"


@dataclass
class Proxy:
    """A forward proxy (RFC 9110 sections 7.6 and 9.3.6) that notes what it is asked for."""

    asked: list[str] = field(default_factory=list[str])
    url: str = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        line, _, rest = head.decode().partition("\r\n")
        method, target, _ = line.split(" ")
        self.asked.append(f"{method} {target}")
        host, path = (target, "") if method == "CONNECT" else target.removeprefix("http://").split("/", 1)
        name, _, port = host.partition(":")
        to_reader, to_writer = await asyncio.open_connection(name, int(port))
        if method == "CONNECT":
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        else:
            to_writer.write(f"{method} /{path} HTTP/1.1\r\n{rest}".encode())

        async def pass_on(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            with contextlib.suppress(ConnectionError):
                while data := await source.read(65536):
                    sink.write(data)
                    await sink.drain()
            sink.close()

        await asyncio.gather(pass_on(reader, to_writer), pass_on(to_reader, writer))


@pytest.fixture
async def proxy(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Proxy]:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
    found = Proxy()
    server = await asyncio.start_server(found.serve, "127.0.0.1", 0)
    found.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        yield found
        server.close()


@contextlib.asynccontextmanager
async def provider(wire: TransportConfig = PLAINTEXT) -> AsyncIterator[str]:
    bound = listen("127.0.0.1", 0, "provider")
    async with serve_app(ScriptedModel(lambda _asked: "Hello.").app(), bound, transport=wire):
        yield f"{wire.scheme}://127.0.0.1:{bound.getsockname()[1]}"


async def read_answer(url: str) -> str:
    model = OpenAICompatibleModel("scripted", base_url=url + "/v1")
    request = ChatRequest("scripted", (ChatMessage("user", "hi"),))
    try:
        return "".join([piece.text async for piece in model.stream(request) if isinstance(piece, TextDelta)])
    finally:
        await model.aclose()


async def test_providers_are_called_through_the_proxy_of_the_environment(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with provider() as url:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        assert await read_answer(url) == "Hello."
        assert proxy.asked == [f"POST {url}/v1/chat/completions"]
        async with create_external_http_client(read_timeout=5) as http:
            assert (await http.send("GET", url + "/v1/models", {}, None, seconds=5)).status == 200
        assert proxy.asked[1:] == [f"GET {url}/v1/models"]
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        assert await read_answer(url) == "Hello."
        assert len(proxy.asked) == 2


async def test_and_with_the_authorities_of_the_environment(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    files = certificates()
    wire = TransportConfig(TlsConfig(files.certificate, files.key))
    async with provider(wire) as url:
        with pytest.raises(OctoError) as caught:
            await read_answer(url)
        assert caught.value.code == "model_failed"
        assert url in caught.value.detail
        monkeypatch.setenv("SSL_CERT_FILE", str(files.ca))
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        assert await read_answer(url) == "Hello."
    assert proxy.asked == [f"CONNECT {url.removeprefix('https://')}"]


async def test_calls_between_services_know_no_proxy(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("HTTP_PROXY", "ALL_PROXY", "http_proxy", "all_proxy"):
        monkeypatch.setenv(variable, proxy.url)
    async with provider() as url, Http1Client() as http:
        assert (await http.send("GET", url + "/v1/models", {}, None, seconds=5)).status == 200
    assert proxy.asked == []
