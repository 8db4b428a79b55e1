"""HTTP/2 through the proxy of ``deploy/haproxy.cfg``: bounds, flow control, cancellation, draining and TLS."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import ssl
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
import httpx
import msgspec
import pytest
import trustme
from kit import base_for, served
from proxy import CONFIGURATION, HaProxy
from starlette.responses import Response
from wires import CURRENT, certificates, http2_transport

from octollm.config import SETTING_SPECS
from octollm.contracts.problems import to_problem
from octollm.errors import OctoError
from octollm.resilience.retry import MAX_DEADLINE_SECONDS
from octollm.rpc.call import IncomingCall, Operation
from octollm.rpc.external import PyqwestClient
from octollm.rpc.http1_parser import MAX_HEADER_BYTES
from octollm.rpc.http1_server import HEADER_SECONDS, SEND_SECONDS
from octollm.rpc.http_client import TransportError
from octollm.rpc.service import build_service
from octollm.rpc.tls import TlsConfig, client_context
from octollm.rpc.transport import KEEP_ALIVE_SECONDS, PLAINTEXT, TransportConfig, listen, serve_app
from octollm.testing import wait_until

E = TypeVar("E", bound=h2.events.Event)


class Text(msgspec.Struct):
    text: str


async def echo(_call: IncomingCall, body: Text) -> Text:
    return body


async def large(_call: IncomingCall, _body: object) -> Response:
    return Response(b"x" * 1_000_000, media_type="application/octet-stream")


ECHO = Operation("echo", "POST", "/echo", echo, auth="public", body=Text, response=Text)
LARGE = Operation("large", "GET", "/large", large, auth="public", max_body=0)


class Peer:
    """A client in frames."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self.events: list[h2.events.Event] = []
        self.over = False

    def send(self) -> None:
        self._writer.write(self.h2.data_to_send())

    def ask(self, path: str, *more: tuple[str, str], method: str = "GET", end: bool = True) -> int:
        stream_id = self.h2.get_next_available_stream_id()
        head = [(":method", method), (":path", path), (":scheme", "http"), (":authority", "a"), *more]
        self.h2.send_headers(stream_id, head, end_stream=end)
        return stream_id

    async def read(self) -> None:
        try:
            data = await self._reader.read(65536)
        except ConnectionResetError:
            data = b""
        if not data:
            self.over = True
            return
        self.events += self.h2.receive_data(data)
        self.send()

    async def until(self, kind: type[E] | tuple[type[E], ...], stream_id: int | None = None) -> E:
        async with asyncio.timeout(10):
            while True:
                for event in self.events:
                    if isinstance(event, kind) and stream_id in (None, getattr(event, "stream_id", None)):
                        self.events.remove(event)
                        return event
                assert not self.over, f"the connection ended before {kind}"
                await self.read()

    async def closed(self) -> None:
        async with asyncio.timeout(10):
            while not self.over:
                with contextlib.suppress(h2.exceptions.ProtocolError):  # frames after a GOAWAY
                    await self.read()

    async def status(self, stream_id: int) -> int:
        return status_of(await self.until(h2.events.ResponseReceived, stream_id))


def status_of(event: h2.events.ResponseReceived) -> int:
    return int(dict(event.headers)[":status"])


@contextlib.asynccontextmanager
async def peer(port: int, tls: ssl.SSLContext | None = None, *, window: int | None = None) -> AsyncGenerator[Peer]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=tls)
    made = Peer(reader, writer)
    if window is not None:
        made.h2.local_settings = h2.settings.Settings(
            initial_values={h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window}
        )
    made.h2.initiate_connection()
    made.send()
    try:
        yield made
    finally:
        writer.close()


@pytest.fixture(autouse=True)
def http2() -> Iterator[None]:
    with CURRENT.use("http2"):
        yield


def proxy_port(service_port: int) -> int:
    return CURRENT.proxy(service_port).port


async def test_the_bounds_of_headers_and_url_are_those_of_the_service() -> None:
    async with served([ECHO, LARGE]) as svc, peer(proxy_port(svc.port)) as client:
        big = client.ask("/large", ("x-big", "a" * 40_000))
        long = client.ask("/large?" + "x" * 9_000)
        fits = client.ask("/health?" + "x" * 8_000)
        client.send()
        assert [await client.status(each) for each in (big, long, fits)] == [431, 414, 200]


async def test_headers_beyond_the_bound_of_the_proxy_end_the_connection() -> None:
    async with served([ECHO]) as svc, peer(proxy_port(svc.port)) as client:
        client.ask("/health", *((f"x-{number}", "b" * 900) for number in range(200)))
        client.send()
        await client.closed()


async def test_a_response_waits_for_the_window_of_the_client() -> None:
    async with served([LARGE], max_concurrent=4) as svc, peer(proxy_port(svc.port), window=10_000) as client:
        stream = client.ask("/large")
        client.send()
        assert await client.status(stream) == 200
        size = 0
        while size < 1_000_000:
            data = await client.until(h2.events.DataReceived, stream)
            size += len(data.data or b"")
            client.h2.acknowledge_received_data(data.flow_controlled_length or 0, stream)
            client.send()
        await client.until(h2.events.StreamEnded, stream)


async def test_a_large_body_arrives_whole_and_a_larger_one_is_refused() -> None:
    async with served([ECHO]) as svc, CURRENT.stock() as client:
        text = "y" * 3_000_000
        found = await client.post(svc.url + "/echo", json={"text": text})
        assert found.http_version == "HTTP/2"
        assert found.json() == {"text": text}
        found = await client.post(svc.url + "/echo", content=b"z" * 5_000_000)
        assert (found.status_code, found.json()["code"]) == (413, "body_too_large")


async def test_a_stream_is_not_buffered() -> None:
    go_on = asyncio.Event()

    async def write(call: IncomingCall, body: Text) -> Text:
        await call.emit.token("first")
        await go_on.wait()
        return body

    operation = Operation("write", "POST", "/write", write, auth="public", body=Text, response=Text)
    async with served([operation]) as svc, CURRENT.stock() as client:
        ndjson = {"Accept": "application/x-ndjson"}
        async with client.stream("POST", svc.url + "/write", json={"text": "a"}, headers=ndjson) as response:
            assert response.http_version == "HTTP/2"
            lines = response.aiter_lines()
            assert "first" in await anext(lines)
            go_on.set()
            assert json.loads([line async for line in lines][-1])["result"] == {"text": "a"}


async def test_a_stream_that_is_reset_cancels_its_handler_and_no_other() -> None:
    began, ended = 0, 0

    async def work(_call: IncomingCall, body: Text) -> Text:
        nonlocal began, ended
        if body.text != "forever":
            return body
        began += 1
        try:
            await asyncio.Event().wait()
        finally:
            ended += 1
        raise AssertionError

    operation = Operation("work", "POST", "/work", work, auth="public", body=Text, response=Text)
    async with served([operation]) as svc, peer(proxy_port(svc.port)) as client:
        streams = [client.ask("/work", method="POST", end=False) for _ in range(6)]
        for number, stream in enumerate(streams):
            body = json.dumps({"text": "forever" if number < 3 else "a"}).encode()
            client.h2.send_data(stream, body, end_stream=True)
        client.send()
        assert [await client.status(stream) for stream in streams[3:]] == [200] * 3
        await wait_until(lambda: began == 3, description="three handlers run")
        client.h2.reset_stream(streams[0])
        client.send()
        await wait_until(lambda: ended == 1, description="the handler of the stream is cancelled")
        again = client.ask("/health")
        client.send()
        assert await client.status(again) == 200
        assert ended == 1


async def test_requests_that_are_reset_at_once_do_not_pile_up_in_the_service() -> None:
    running, most = 0, 0

    async def work(_call: IncomingCall, body: Text) -> Text:
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            await asyncio.Event().wait()
        finally:
            running -= 1
        raise AssertionError

    operation = Operation("work", "POST", "/work", work, auth="public", body=Text, response=Text)
    async with served([operation], max_concurrent=1000) as svc, peer(proxy_port(svc.port)) as client:
        for _ in range(1000):  # CVE-2023-44487
            stream = client.ask("/work", method="POST", end=False)
            client.h2.send_data(stream, b'{"text":"a"}', end_stream=True)
            client.h2.reset_stream(stream)
            client.send()
        async with CURRENT.stock() as other:
            assert (await other.get(svc.url + "/health")).status_code == 200
        await wait_until(lambda: running == 0, description="every handler is cancelled")
        assert most <= 128


async def test_an_invalid_frame_ends_the_connection() -> None:
    async with served([ECHO]) as svc, peer(proxy_port(svc.port)) as client:
        client._writer.write(b"\x00\x00\x04\x08\x00\x00\x00\x00\x00\x00\x00\x00\x00")  # an empty window update
        await client.until(h2.events.ConnectionTerminated)
        await client.closed()


async def test_a_connection_without_a_request_is_closed() -> None:
    async with served([ECHO]) as svc:
        proxy = HaProxy(svc.port, timeouts={"http-request": "300ms", "http-keep-alive": "300ms"})
        proxy.start()
        try:
            async with peer(proxy.port) as client:
                await client.closed()
            with socket.create_connection(("127.0.0.1", proxy.port), 10) as silent:
                silent.sendall(b"PRI * ")
                assert b"HTTP/2" not in await asyncio.to_thread(silent.recv, 1000)
        finally:
            proxy.stop()


class InFlight(NamedTuple):
    """A client whose call is in flight; the service and its socket; ``finish`` lets the call end."""

    client: Peer
    bound: socket.socket
    serving: contextlib.AbstractAsyncContextManager[None]
    finish: asyncio.Event


@contextlib.asynccontextmanager
async def working() -> AsyncGenerator[InFlight]:
    began, finish = asyncio.Event(), asyncio.Event()

    async def work(_call: IncomingCall, body: Text) -> Text:
        began.set()
        await finish.wait()
        return body

    operation = Operation("work", "POST", "/work", work, auth="public", body=Text, response=Text)
    bound = listen("127.0.0.1", 0, "svc")
    port = bound.getsockname()[1]
    async with CURRENT.client() as http:
        service = build_service(base_for(http, {"svc": (CURRENT.url(port),)}), [operation])
        serving = service.serve(bound, shutdown_grace=5)
        await serving.__aenter__()
        async with peer(proxy_port(port)) as client:
            stream = client.ask("/work", method="POST", end=False)
            client.h2.send_data(stream, b'{"text":"a"}', end_stream=True)
            client.send()
            await began.wait()
            yield InFlight(client, bound, serving, finish)


async def test_a_service_that_drains_answers_the_calls_in_flight() -> None:
    async with working() as (client, bound, serving, finish):
        leaving = asyncio.create_task(serving.__aexit__(None, None, None))
        await wait_until(lambda: bound.fileno() < 0, description="the service takes no connection any more")
        refused = client.ask("/health")
        client.send()
        assert await client.status(refused) == 503
        finish.set()
        stream = 1
        assert await client.status(stream) == 200
        data = await client.until(h2.events.DataReceived, stream)
        assert data.data == b'{"text":"a"}'
        await leaving


async def test_a_proxy_that_drains_says_so_and_answers_the_calls_in_flight() -> None:
    async with working() as (client, bound, serving, finish):
        proxy = CURRENT.proxy(bound.getsockname()[1])
        proxy.drain()
        ended = await client.until(h2.events.ConnectionTerminated)
        assert ended.error_code == h2.errors.ErrorCodes.NO_ERROR
        finish.set()
        # The library of this client reads no frame after a GOAWAY.
        async with asyncio.timeout(10):
            await client._reader.readuntil(b'{"text":"a"}')
        client._writer.close()  # as a client does after a GOAWAY
        assert await asyncio.to_thread(proxy.wait) == 0
        await serving.__aexit__(None, None, None)


def test_the_limits_of_the_proxy_fit_those_of_the_services() -> None:
    text = CONFIGURATION.read_text()

    def value(name: str) -> int:
        (found,) = re.findall(rf"(?m)^ +{re.escape(name)} (\d+)s?$", text)
        return int(found)

    assert value("tune.bufsize") == 2 * MAX_HEADER_BYTES
    assert value("hard-stop-after") > float(SETTING_SPECS["shutdown_grace"].default)
    assert value("timeout http-request") == HEADER_SECONDS
    assert value("timeout http-keep-alive") == KEEP_ALIVE_SECONDS
    assert value("timeout client") == SEND_SECONDS
    assert value("timeout server") == MAX_DEADLINE_SECONDS
    streams = value("tune.h2.max-concurrent-streams")
    assert f"at most {streams} concurrent calls" in (CONFIGURATION.parents[1] / "docs/spread-out.md").read_text()


async def test_a_service_that_is_away_is_a_problem_document() -> None:
    async with served([ECHO]) as svc:
        pass
    async with CURRENT.stock() as client:
        answer = await client.get(svc.url + "/health")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.headers["content-type"] == "application/problem+json"
    expected = msgspec.to_builtins(to_problem(OctoError("The proxy cannot reach the gateway.", code="unavailable")))
    assert answer.json() == {name: expected[name] for name in answer.json()}
    assert {"type", "title", "status", "detail", "code", "retryable"} == set(answer.json())


async def test_http1_is_spoken_on_the_same_port() -> None:
    async with served([ECHO]) as svc:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy_port(svc.port))
        writer.write(b"P")
        await writer.drain()
        writer.write(b'OST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 12\r\nConnection: close\r\n\r\n{"text":"a"}')
        assert (await reader.read()).endswith(b'{"text":"a"}')
        writer.close()


async def test_tls_negotiates_the_version() -> None:
    tls = certificates()
    with CURRENT.use("tls-http2"):
        async with served([ECHO]) as svc:
            for offered, expected in ((["h2", "http/1.1"], "h2"), (["http/1.1"], "http/1.1")):
                context = client_context(tls.ca, tls.certificate, tls.key)
                context.set_alpn_protocols(offered)
                _, writer = await asyncio.open_connection("127.0.0.1", proxy_port(svc.port), ssl=context)
                assert writer.get_extra_info("ssl_object").selected_alpn_protocol() == expected
                writer.close()


async def test_a_client_without_a_certificate_of_the_authority_is_not_served() -> None:
    tls = certificates()
    with CURRENT.use("tls-http2"):
        async with served([ECHO]) as svc:
            for http in (PyqwestClient(http2_transport(None)), PLAINTEXT.create_client()):
                async with http:
                    with pytest.raises(TransportError) as caught:
                        await http.send("GET", svc.url + "/health", {}, None, seconds=5)
                    assert caught.value.code in ("connect_failed", "connection_lost")
            context = client_context(tls.ca)  # trusts the proxy, and shows no certificate
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection("127.0.0.1", proxy_port(svc.port), ssl=context)
                writer.write(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
                assert await reader.read() == b""
                writer.close()
            async with CURRENT.client() as http:
                answer = await http.send("GET", svc.url + "/health", {}, None, seconds=5)
            assert answer.status == 200


@pytest.mark.parametrize(
    ("own_authority", "name", "status"), [(True, "localhost", 200), (False, "localhost", 503), (True, "elsewhere", 503)]
)
async def test_only_the_named_server_with_a_certificate_of_the_authority_is_called(
    tmp_path: Path, own_authority: bool, name: str, status: int
) -> None:
    authority, other = trustme.CA(), trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")

    def issue(by: trustme.CA, host: str, file: str) -> TlsConfig:
        issued = by.issue_cert(host)
        files = TlsConfig(tmp_path / f"{file}.pem", tmp_path / f"{file}.key", tmp_path / "ca.pem")
        issued.cert_chain_pems[0].write_to_path(files.certificate)
        issued.private_key_pem.write_to_path(files.key)
        return files

    shown = issue(authority if own_authority else other, name, "server")
    bound = listen("127.0.0.1", 0, "svc")
    proxy = HaProxy(bound.getsockname()[1], issue(authority, "localhost", "proxy"))
    proxy.start()
    try:
        async with (
            serve_app(Response("served"), bound, transport=TransportConfig(shown)),
            httpx.AsyncClient(http1=False, http2=True, verify=client_context(tmp_path / "ca.pem")) as client,
        ):
            assert (await client.get(f"https://localhost:{proxy.port}")).status_code == status
    finally:
        proxy.stop()
