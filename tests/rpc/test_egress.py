"""The guard against server-side request forgery: URLs, addresses, names that change, and answers without an end."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import ssl
from collections.abc import AsyncGenerator, Callable, Sequence

import dns.asyncresolver
import dns.flags
import dns.message
import dns.name
import dns.rrset
import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st

from octollm.errors import OctoError, SettingError
from octollm.rpc.egress import DnsHostResolver, EgressClient, EgressPolicy, is_public_address
from octollm.rpc.http_client import TransportError
from octollm.rpc.tls import external_context_factory
from octollm.testing import wait_until

POLICY = EgressPolicy()

PRIVATE_ADDRESSES = """
0.0.0.0 0.1.2.3 10.0.0.1 10.255.255.255 100.64.0.1 100.100.100.200 100.127.255.254 127.0.0.1 127.1.2.3
127.255.255.255 168.63.129.16 169.254.0.1 169.254.169.254 169.254.170.2 169.254.169.253 172.16.0.1 172.31.255.255
192.0.0.1 192.0.0.192 192.0.2.1 192.88.99.1 192.168.0.1 192.168.255.255 198.18.0.1 198.19.255.255 198.51.100.7
203.0.113.9 224.0.0.1 239.255.255.250 240.0.0.1 255.255.255.255
""".split()  # noqa: SIM905  a list would be a page long
PRIVATE_IPV6 = """
:: ::1 ::2 ::127.0.0.1 ::7f00:1 ::ffff:127.0.0.1 ::ffff:7f00:1 ::ffff:10.0.0.1 ::ffff:169.254.169.254 ::ffff:8.8.8.8
::ffff:0:127.0.0.1 64:ff9b::127.0.0.1 64:ff9b::a9fe:a9fe 64:ff9b::8.8.8.8 64:ff9b:1::10.0.0.1 100::1 2001::1
2001:0:4136:e378:8000:63bf:3fff:fdd2 2001:10::1 2001:20::1 2001:db8::1 2002:7f00:1::1 2002:a9fe:a9fe::1
2002:808:808::1 3fff::1 4000::1 5f00::1 fc00::1 fd00::1 fd00:ec2::254 fd20:ce::254 fe80::1 fe80::a9fe:a9fe fec0::1
ff02::1 ff05::2 2600::5efe:127.0.0.1 2600::200:5efe:10.0.0.1 ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff 0:0:0:0:0:0:0:1
0:0:0:0:0:ffff:7f00:0001
""".split()  # noqa: SIM905  a list would be a page long
ODD_HOSTS = """
127.1 127.0.1 0 1 2130706433 0x7f000001 0x7f.0x0.0x0.0x1 0x7f.1 0X7F.1 017700000001 0177.0.0.1 0177.0.0.01
127.0.0.01 127.000.000.001 00127.0.0.1 4294967295 256.0.0.1 1.1.1.256 1.1.1 1.1.1.1.1 1.1.1.1. 127.0.0.1. 3232235521
0xa9fea9fe 2852039166 0251.0376.0251.0376 169.254.43518 169.16689662 0xA9.0xFE.0xA9.0xFE 10.0x1.0.1 localhost
localhost. LOCALHOST foo.localhost localhost.localdomain. printer.local host.docker.internal
metadata.google.internal kubernetes.default.svc.cluster.local router.lan intranet db nas.home.arpa abcdefgh.onion
name.invalid example.com. example..com .example.com -a.example.com a-.example.com exa_mple.com example.1 example.0x1
example.c0m.1 a.b.127 1.2.3.4.5.6 example%2ecom 127%2e0%2e0%2e1 %31%32%37.0.0.1 １２７.０.０.１ ①②⑦.⓪.⓪.① 127。0。0。1
localhost。 ｅxample.com bücher.example exam­ple.com example.com\\ example.com\\@127.0.0.1 ::1 [::1 ::1] [::1].
metadata metadata.google.internal. METADATA.GOOGLE.INTERNAL instance-data instance-data.ec2.internal rancher-metadata
metadata.azure.internal ip-10-0-0-1.ec2.internal gateway.docker.internal kubernetes.docker.internal 169.254.169.254.
0xA9FEA9FE 0xa9.0xfe.0xa9.0xfe. 025177524776 0250.0376.0250.1 0xc0a80001 3232235777 192.168.1 10.1
172.16.1 [::ffff:0a00:0001%25eth0] [64:ff9b::10.0.0.1%251] [fe80::1%251] xn--.com example.xn-- ⓛocalhost ʟocalhost
127.0.0.1%00.example.com 127.0.0.1%0a 127.0.0.1%2f.example.com example.com%23@127.0.0.1 ١٢٧.٠.٠.١ 127．0．0．1 127｡0｡0｡1
[127.0.0.1] [::ffff:127.0.0.1%25lo] [fe80::1%25eth0] [fe80::1%eth0] [] [:::1] [1::2::3] [12345::] [::1]evil.com
example.com[::1]
""".split()  # noqa: SIM905  a list would be a page long
WHOLE_URLS = [
    "",
    " ",
    "https://",
    "https:///",
    "https:/example.com/",
    "https:example.com",
    "//example.com/",
    "/etc/passwd",
    "example.com",
    "example.com:443",
    " https://example.com/",
    "https://example.com/ ",
    "https://exam ple.com/",
    "https://example.com\t/",
    "https://example.com/\r\nHost: inside",
    "https://example.com\n.evil.com/",
    "https://example.com/\x00",
    "https://example.com\x00.evil.com/",
    "http://example.com/",
    "http://93.184.216.34/",
    "HTTPS://example.com/",
    "hTTps://example.com/",
    "ftp://example.com/",
    "file:///etc/passwd",
    "gopher://127.0.0.1:6379/_FLUSHALL",
    "dict://127.0.0.1:11211/stats",
    "javascript:alert(1)",
    "data:text/plain,hello",
    "ldap://example.com/",
    "ws://example.com/",
    "wss://example.com/",
    "unix:///var/run/docker.sock",
    "jar:https://example.com!/",
    "https://user@example.com/",
    "https://user:password@example.com/",
    "https://example.com@127.0.0.1/",
    "https://example.com:443@127.0.0.1/",
    "https://example.com%40127.0.0.1/",
    "https://example.com:@127.0.0.1/",
    "https://@127.0.0.1/",
    "https://:@127.0.0.1/",
    "https://127.0.0.1:443@example.com/",
    "https://example.com?@127.0.0.1/#",
    "https:///127.0.0.1/",
    "https://///127.0.0.1/",
    "https://example.com:443#@127.0.0.1/",
    "https://127.0.0.1#@example.com/",
    "https://example.com#@127.0.0.1/",
    "https://example.com/#fragment",
    "https://example.com\\.evil.com/",
    "https://example.com/\\evil",
    "https:\\\\example.com/",
    "https://example.com:/",
    "https://example.com:0/",
    "https://example.com:0443/",
    "https://example.com:+443/",
    "https://example.com:443:443/",
    "https://example.com:65536/",
    "https://example.com:99999/",
    "https://example.com:４４３/",
    "https://example.com:22/",
    "https://example.com:25/",
    "https://example.com:80/",
    "https://example.com:6379/",
    "https://example.com:8000/",
    "https://example.com:8001/",
    "https://example.com/é",
    "https://example.com/\u202e",
    "https://example.com?q=\u3002",
    "https://*.example.com/",
    "https://exam*ple.com/",
    "https://example.com,127.0.0.1/",
    "https://example.com;127.0.0.1/",
    "https://example.com&@127.0.0.1/",
    "https://{host}/",
    "https://$(id).example.com/",
    "https://" + "a" * 64 + ".example.com/",
    "https://" + ".".join(["a" * 60] * 5) + ".com/",
    "https://example.com/" + "a" * 2048,
]
HOSTILE = [
    *(f"https://{address}/" for address in PRIVATE_ADDRESSES),
    *(f"https://[{address}]/" for address in PRIVATE_IPV6),
    *(f"https://{host}/" for host in ODD_HOSTS),
    *WHOLE_URLS,
]
GOOD = [
    "https://example.com",
    "https://example.com/",
    "https://EXAMPLE.com/Path?Query=1",
    "https://hooks.example.co.uk:8443/a/b;c?d=%20",
    "https://example.com:443/",
    "https://xn--bcher-kva.example.org/",
    "https://a-b.example.io?x=http://127.0.0.1/",
    "https://8.8.8.8/",
    "https://[2606:4700:4700::1111]/",
    "https://[2606:4700:4700::1111]:8443/x",
    "https://1.2.3.4.example.com/",
]


def test_there_are_enough_of_them():
    assert len(set(HOSTILE)) >= 250


@pytest.mark.parametrize("url", HOSTILE)
def test_a_hostile_url_is_refused_before_anything_is_sent(url: str):
    with pytest.raises(OctoError) as caught:
        POLICY.parse(url)
    assert caught.value.code == "url_refused"
    assert caught.value.field_errors[0].pointer == "/url"


@pytest.mark.parametrize("url", GOOD)
def test_a_good_url_is_accepted(url: str):
    destination = POLICY.parse(url)
    assert (destination.scheme, destination.port in (443, 8443)) == ("https", True)
    assert POLICY.parse(destination.url) == destination


@given(st.ip_addresses(v=4))
def test_an_ipv4_address_is_public_only_if_the_registry_says_so(address: ipaddress.IPv4Address):
    if is_public_address(str(address)):
        assert address.is_global and not address.is_multicast and not address.is_reserved


@given(st.ip_addresses(v=6))
def test_an_ipv6_address_is_public_only_if_the_registry_says_so(address: ipaddress.IPv6Address):
    if is_public_address(str(address)):
        assert address.is_global and address.ipv4_mapped is None and address.sixtofour is None
        assert address.teredo is None and not address.is_multicast


@given(st.sampled_from(PRIVATE_ADDRESSES), st.sampled_from(["::ffff:{}", "::{}", "64:ff9b::{}", "64:ff9b:1::{}"]))
def test_no_ipv6_address_carries_a_private_one_in(address: str, form: str):
    assert not is_public_address(form.format(address))


@given(st.text(max_size=60))
def test_any_text_is_parsed_or_refused(text: str):
    try:
        destination = POLICY.parse("https://" + text)
    except OctoError as error:
        assert error.code == "url_refused"
    else:
        # What is connected to is what the text says: reading the result again changes nothing.
        assert POLICY.parse(destination.url) == destination


def test_origins_of_the_operator_are_exempt_and_nothing_else_of_their_host():
    policy = EgressPolicy.of(["http://127.0.0.1:9000", "https://inside.example:443", "http://receiver:80"])
    assert policy.parse("http://127.0.0.1:9000/hook").port == 9000
    assert policy.parse("https://inside.example/").host == "inside.example"
    assert policy.parse("http://receiver/").host == "receiver"
    for url in (
        "http://127.0.0.1:9001/",
        "https://127.0.0.1:9000/",
        "http://localhost:9000/",
        "http://inside.example/",
    ):
        with pytest.raises(OctoError, match="refused"):
            policy.parse(url)


class DnsStub(asyncio.DatagramProtocol):
    """A DNS server (RFC 1035) on a real UDP socket: it answers the n-th question of a name."""

    def __init__(self, answer: Callable[[str, int], Sequence[str]]) -> None:
        self.answer = answer
        self.asked: dict[tuple[str, str], int] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        query = dns.message.from_wire(data)
        question = query.question[0]
        name = question.name.to_text(omit_final_dot=True)
        kind = "AAAA" if question.rdtype == 28 else "A"
        count = self.asked[name, kind] = self.asked.get((name, kind), 0) + 1
        response = dns.message.make_response(query)
        response.flags |= dns.flags.RA
        owner, answers = question.name, self.answer(name, count)
        for alias in [each.removeprefix("CNAME ") for each in answers if each.startswith("CNAME ")]:
            # A recursive server follows the alias and answers with what it leads to.
            response.answer.append(dns.rrset.from_text(owner, 0, "IN", "CNAME", f"{alias}."))
            owner = dns.name.from_text(alias)
            answers = self.answer(alias, count)
        found = [each for each in answers if (":" in each) == (kind == "AAAA")]
        if found:
            response.answer.append(dns.rrset.from_text(owner, 0, "IN", kind, *found))
        self.transport.sendto(response.to_wire(), addr)


@contextlib.asynccontextmanager
async def dns_stub(answer: Callable[[str, int], Sequence[str]]) -> AsyncGenerator[tuple[DnsStub, DnsHostResolver]]:
    transport, stub = await asyncio.get_running_loop().create_datagram_endpoint(
        lambda: DnsStub(answer), local_addr=("127.0.0.1", 0)
    )
    resolver = dns.asyncresolver.Resolver(configure=False)
    resolver.nameservers = ["127.0.0.1"]
    resolver.port = transport.get_extra_info("sockname")[1]
    try:
        yield stub, DnsHostResolver(resolver)
    finally:
        transport.close()


@pytest.mark.parametrize(
    "addresses",
    [["127.0.0.1"], ["::1"], ["10.0.0.1", "93.184.216.34"], ["93.184.216.34", "fd00:ec2::254"], ["169.254.169.254"]],
)
async def test_a_name_with_a_private_address_is_refused(addresses: list[str]):
    async with dns_stub(lambda _name, _count: addresses) as (_, resolve), EgressClient(POLICY, resolve=resolve) as http:
        with pytest.raises(OctoError) as caught:
            await http.send("GET", "https://rebind.example.com/", {}, None, seconds=5)
        assert caught.value.code == "url_refused"


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("metadata.goog", "169.254.169.254"),
        ("metadata.tencentyun.com", "169.254.0.23"),
        ("127.0.0.1.nip.io", "127.0.0.1"),
        ("localtest.me", "::1"),
        ("kubernetes.default.svc", "10.96.0.1"),
        ("wpad.example.com", "::ffff:10.0.0.1"),
        ("nat64.example.com", "64:ff9b::a9fe:a9fe"),
        ("sixtofour.example.com", "2002:a9fe:a9fe::1"),
        ("teredo.example.com", "2001:0:4136:e378:8000:63bf:3fff:fdd2"),
    ],
)
@pytest.mark.parametrize("alias", [False, True], ids=["address", "CNAME"])
async def test_a_public_name_that_leads_inside_is_refused_when_it_is_resolved(name: str, address: str, alias: bool):
    def answer(asked: str, _count: int) -> list[str]:
        return ["CNAME inside.example.net"] if alias and asked == name else [address]

    async with dns_stub(answer) as (stub, resolve), EgressClient(POLICY, resolve=resolve) as http:
        with pytest.raises(OctoError) as caught:
            await http.send("GET", f"https://{name}/", {}, None, seconds=5)
        assert caught.value.code == "url_refused"
        assert stub.asked[name, "A"] == 1


async def test_a_name_that_changes_between_check_and_connection_gets_no_second_look(monkeypatch):
    """The first answer is public, every later one is loopback: the connection goes to the first, or nowhere."""
    connected: list[str] = []
    loop = asyncio.get_running_loop()
    connect = loop.create_connection

    async def recorded(factory: object, host: str, port: int, **more: object) -> object:
        connected.append(host)
        raise OSError("the test has no Internet")

    async with (
        dns_stub(lambda _name, count: ["93.184.216.34"] if count == 1 else ["127.0.0.1"]) as (stub, resolve),
        EgressClient(POLICY, resolve=resolve) as http,
    ):
        monkeypatch.setattr(loop, "create_connection", recorded, raising=False)
        try:
            with pytest.raises(TransportError):
                await http.send("GET", "https://rebind.example.com/", {}, None, seconds=5)
            assert connected == ["93.184.216.34"]
            with pytest.raises(OctoError) as caught:
                await http.send("GET", "https://rebind.example.com/", {}, None, seconds=5)
        finally:
            monkeypatch.setattr(loop, "create_connection", connect, raising=False)
        assert caught.value.code == "url_refused"
        assert connected == ["93.184.216.34"]
        assert stub.asked["rebind.example.com", "A"] == 2


async def test_a_name_without_an_address_and_a_silent_server_are_failures_in_time():
    async with dns_stub(lambda _name, _count: []) as (_, resolve), EgressClient(POLICY, resolve=resolve) as http:
        with pytest.raises(TransportError) as caught:
            await http.send("GET", "https://nowhere.example.com/", {}, None, seconds=5)
        assert (caught.value.code, caught.value.request_sent) == ("connect_failed", False)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        resolver = dns.asyncresolver.Resolver(configure=False)
        resolver.nameservers, resolver.port = ["127.0.0.1"], silent.getsockname()[1]
        async with EgressClient(POLICY, resolve=DnsHostResolver(resolver)) as http:
            with pytest.raises(OctoError) as late:
                await http.send("GET", "https://slow.example.com/", {}, None, seconds=0.2)
            assert late.value.code == "deadline_exceeded"


@contextlib.asynccontextmanager
async def receiver(respond: Callable[[asyncio.StreamWriter], None], ca: trustme.CA | None = None):
    """A receiver on loopback, with TLS for ``hooks.example.com`` if a CA is given; yields port, heads and SNI."""
    heads: list[bytes] = []
    names: list[str | None] = []
    context = None
    if ca is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        ca.issue_cert("hooks.example.com").configure_cert(context)
        context.sni_callback = lambda _socket, name, _context: names.append(name)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            heads.append(await reader.readuntil(b"\r\n\r\n"))
            respond(writer)
            with contextlib.suppress(ConnectionError):
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    async with server:
        yield server.sockets[0].getsockname()[1], heads, names


async def test_the_connection_goes_to_the_checked_address_and_keeps_the_name(monkeypatch, tmp_path):
    """TLS with SNI and Host of the name, at the checked address: loopback, public for this test."""
    ca = trustme.CA()
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    create, created = external_context_factory(tmp_path / "ca.pem"), list[int]()

    def trust() -> ssl.SSLContext:
        created.append(1)
        return create()

    monkeypatch.setattr("octollm.rpc.egress.is_public_address", lambda text: text == "127.0.0.1")

    async def resolve(_host: str) -> list[str]:
        return ["127.0.0.1"]

    def ok(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")

    async with receiver(ok, ca) as (port, heads, names):
        policy = EgressPolicy(ports=frozenset({port}))
        async with EgressClient(policy, tls=trust, resolve=resolve) as http:
            response = await http.send("GET", f"https://hooks.example.com:{port}/in?a=1", {}, None, seconds=5)
            assert (response.status, response.body) == (200, b"ok")
            assert f"host: hooks.example.com:{port}".encode() in heads[0]
            assert heads[0].startswith(b"GET /in?a=1 HTTP/1.1\r\n")
            assert names == ["hooks.example.com"]
            # The certificate is for the name: another name at the same address fails.
            with pytest.raises(TransportError):
                await http.send("GET", f"https://other.example.com:{port}/", {}, None, seconds=5)
            assert created == [1]


def test_authorities_that_cannot_be_loaded_are_refused_before_they_are_needed(tmp_path):
    (tmp_path / "ca.pem").write_text("no certificate")
    with pytest.raises(SettingError, match="OCTOLLM_TLS_CA"):
        external_context_factory(tmp_path / "ca.pem")


async def test_proxies_of_the_environment_are_not_used(monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")

    def ok(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")

    async with receiver(ok) as (port, _heads, _names):
        origin = f"http://127.0.0.1:{port}"
        async with EgressClient(EgressPolicy.of([origin])) as http:
            assert (await http.send("GET", f"{origin}/", {}, None, seconds=5)).status == 204


async def test_redirects_are_returned_and_not_followed():
    def redirect(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 302 Found\r\nlocation: http://169.254.169.254/\r\ncontent-length: 0\r\n\r\n")

    async with receiver(redirect) as (port, heads, _names):
        origin = f"http://127.0.0.1:{port}"
        async with EgressClient(EgressPolicy.of([origin])) as http:
            response = await http.send("GET", f"{origin}/", {}, None, seconds=5)
            assert (response.status, response.headers["location"]) == (302, "http://169.254.169.254/")
            assert len(heads) == 1


@pytest.mark.parametrize(
    ("head", "code"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 10737418240\r\n\r\n", "peer_protocol"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", "peer_protocol"),
        (b"HTTP/1.1 200 OK\r\n" + b"x: " + b"y" * 70_000 + b"\r\n\r\n", "peer_protocol"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "peer_protocol"),
        (b"HTTP/1.1 200 OK\r\n", "deadline_exceeded"),
        (b"", "deadline_exceeded"),
    ],
)
async def test_answers_are_bounded_in_bytes_and_time(head: bytes, code: str):
    gone = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(head)
            piece = b"z" * 65536
            if b"chunked" in head:
                piece = b"10000\r\n" + piece + b"\r\n"
            while b"\r\n\r\n" in head and code == "peer_protocol":
                writer.write(piece)
                await writer.drain()
            await reader.read()
        gone.set()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        origin = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with EgressClient(EgressPolicy.of([origin])) as http:
            with pytest.raises(OctoError) as caught:
                await http.send("GET", f"{origin}/", {}, None, seconds=0.3 if code == "deadline_exceeded" else 10)
            assert caught.value.code == code
            await wait_until(gone.is_set, description="the connection was closed")
