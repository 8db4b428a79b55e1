"""SSRF guard (server-side request forgery): checks HTTP requests to URLs that users choose.

Webhooks, the executor's ``POST /http`` and OpenID Connect send through it. A URL has one strict form; its name is
resolved here, every address must be a public one, and the connection goes to an address that was checked, so that a
second answer of DNS (rebinding) changes nothing. ``Host``, SNI and the certificate keep the name. Redirects are never
followed, proxies of the environment are not used, and bodies, headers and time are bounded.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
import socket
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from octollm.errors import FieldError, OctoError
from octollm.rpc.http1_client import CreateTlsContext, Http1Client
from octollm.rpc.http_client import HttpClient, HttpResponse, StreamedResponse, TransportError
from octollm.rpc.tls import external_context

if TYPE_CHECKING:
    import dns.asyncresolver

MAX_URL = 2048
MAX_ADDRESSES = 16
"""Addresses that a name may have. More are a sign of a fault, and each costs an attempt to connect."""
LOOKUP_SECONDS = 3.0
DEFAULT_PORTS = frozenset({443, 8443})
MAX_RESPONSE_BYTES = 1024 * 1024
"""Bytes of a whole response, unless a client says otherwise."""

_URL = re.compile(r"(https?)://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+)(?::([1-9][0-9]{0,4}))?([/?][!-~]*)?")
_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
# The last label begins with a letter: a number there makes the host an IPv4 address to some readers (WHATWG URL).
_NAME = re.compile(rf"(?:{_LABEL}\.)+[a-z](?:[a-z0-9-]{{0,61}}[a-z0-9])")
_PRIVATE_NAMES = ("localhost", "local", "internal", "intranet", "lan", "home.arpa", "onion", "invalid")
"""Domains that never are public (RFC 6761, 6762, 7686, 8375). Their addresses would be refused as well."""

_IPV4_REFUSED = tuple(
    ipaddress.IPv4Network(block)
    for block in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # shared by carriers (CGNAT); a metadata service of one cloud
        "127.0.0.0/8",  # loopback
        "168.63.129.16/32",  # a public address on which one cloud serves its machines
        "169.254.0.0/16",  # link-local; metadata services
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments; a metadata service of one cloud
        "192.0.2.0/24",  # documentation
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",  # private
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
    )
)
_IPV6_GLOBAL = ipaddress.IPv6Network("2000::/3")
"""Outside it are loopback, IPv4-mapped and -compatible, NAT64, unique local, link-local and multicast addresses."""
_IPV6_REFUSED = tuple(
    ipaddress.IPv6Network(block)
    for block in (
        "2001::/23",  # protocol assignments, Teredo
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4: an IPv4 address inside
        "3fff::/20",  # documentation
    )
)
_ISATAP = 0x5EFE
"""RFC 5214: the interface identifier of an address that has an IPv4 address inside."""

ResolveHost = Callable[[str], Awaitable[Sequence[str]]]
"""Returns the addresses of a host name; raises ``LookupError`` without an answer."""


@dataclass(frozen=True, slots=True)
class Destination:
    """The parts of a URL that passed :meth:`EgressPolicy.parse`. ``host`` is in lower case, without brackets."""

    scheme: str
    host: str
    port: int
    target: str

    @property
    def origin(self) -> str:
        """Return the origin as a URL writes it: a default port is left out."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        default = 443 if self.scheme == "https" else 80
        return f"{self.scheme}://{host}" if self.port == default else f"{self.scheme}://{host}:{self.port}"

    @property
    def url(self) -> str:
        """Return the whole URL."""
        return self.origin + self.target


@dataclass(frozen=True, slots=True)
class EgressPolicy:
    """Which URLs may be requested: ``https`` at public addresses on ``ports``, and every URL of ``origins``.

    ``origins`` are exempt: the operator named them, so they may be private and may use ``http``.
    """

    origins: frozenset[str] = frozenset()
    ports: frozenset[int] = DEFAULT_PORTS

    @classmethod
    def of(cls, origins: Iterable[str], ports: Iterable[int] = DEFAULT_PORTS) -> EgressPolicy:
        """Return a policy that exempts the origins of these URLs. Raises ``url_refused`` for what is no URL."""
        return cls(frozenset(_split(url).origin for url in origins), frozenset(ports))

    def parse(self, url: str) -> Destination:
        """Return the parts of a URL; raise ``url_refused`` for any but the strict form, and for a refused host.

        The address that a name has is checked when it is connected to, by :class:`EgressClient`.
        """
        destination = _split(url)
        if self.is_exempt(destination.origin):
            return destination
        if destination.scheme != "https":
            raise _refused("it must begin with https://")
        if destination.port not in self.ports:
            raise _refused(f"port {destination.port} is not one of {', '.join(map(str, sorted(self.ports)))}")
        host = destination.host
        if _is_address(host):
            if not is_public_address(host):
                raise _refused("its host is not a public address")
        elif len(host) > 253 or _NAME.fullmatch(host) is None:
            raise _refused("its host is neither a full domain name nor an address in the usual notation")
        elif any(host.endswith(f".{name}") for name in _PRIVATE_NAMES):
            raise _refused("its host is not public")
        return destination

    def is_exempt(self, origin: str) -> bool:
        """Return whether the operator exempted an origin."""
        return origin in self.origins


def is_public_address(text: str) -> bool:
    """Return whether an IP address belongs to the public Internet and carries no other address inside."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in block for block in _IPV4_REFUSED)
    if address.scope_id is not None or address not in _IPV6_GLOBAL:
        return False
    holds_ipv4 = int(address) >> 32 & 0xFCFFFFFF == _ISATAP
    return not holds_ipv4 and not any(address in block for block in _IPV6_REFUSED)


def _split(url: str) -> Destination:
    if len(url) > MAX_URL:
        raise _refused(f"it has more than {MAX_URL} characters")
    match = _URL.fullmatch(url)
    # Credentials, fragments, backslashes, percent-encoded hosts and letters outside ASCII end here: what two readers
    # may read as two hosts is refused and never repaired. An international name comes as its A-label (xn--).
    if match is None or "#" in url or "\\" in url:
        raise _refused("it is not of the form https://host[:port]/path, in ASCII and without credentials")
    scheme, host, port, target = match[1], match[2].lower(), match[3], match[4] or "/"
    if host.startswith("["):
        try:
            host = ipaddress.IPv6Address(host[1:-1]).compressed
        except ValueError:
            raise _refused("its host is not a valid IPv6 address") from None
    number = int(port) if port else (443 if scheme == "https" else 80)
    if number > 65535:
        raise _refused("its port is above 65535")
    return Destination(scheme, host, number, target if target.startswith("/") else f"/{target}")


def _is_address(host: str) -> bool:
    # Python's parser takes four decimal numbers without leading zeros, and nothing else, for an IPv4 address.
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _refused(reason: str) -> OctoError:
    detail = f"The URL is refused: {reason}."
    return OctoError(detail, code="url_refused", field_errors=(FieldError("/url", detail),))


class DnsHostResolver:
    """Resolves public names by DNS, with a deadline and without threads, so that a dead name server blocks nobody.

    Names are absolute: search domains and the machine's hosts file, which name private hosts, are not used.
    """

    def __init__(self, resolver: dns.asyncresolver.Resolver | None = None) -> None:
        self._resolver = resolver

    async def __call__(self, host: str) -> Sequence[str]:
        """Return the A and AAAA records of ``host``; raise ``LookupError`` without any."""
        # Loaded by the first lookup, since most processes look nothing up, and in a thread: it takes 0.15 s.
        await asyncio.to_thread(import_module, "dns.asyncresolver")
        import dns.asyncresolver  # noqa: PLC0415
        import dns.exception  # noqa: PLC0415
        import dns.name  # noqa: PLC0415

        try:
            if self._resolver is None:
                self._resolver = dns.asyncresolver.Resolver()
            answers = await self._resolver.resolve_name(dns.name.from_text(host), lifetime=LOOKUP_SECONDS)
        except (dns.exception.DNSException, OSError) as error:
            raise LookupError(host) from error
        # IPv4 first: a machine without IPv6 may learn only by a timeout that an address is out of reach.
        return sorted(dict.fromkeys(answers.addresses()), key=lambda address: ":" in address)


class EgressClient(HttpClient):
    """An HTTP client for URLs that a user chose. Every request is checked by ``policy``.

    :meth:`send` refuses a response of more than ``max_response`` bytes (``peer_protocol``); a reader of
    :meth:`stream` bounds what it reads.
    """

    def __init__(
        self,
        policy: EgressPolicy,
        *,
        tls: ssl.SSLContext | CreateTlsContext | None = None,
        resolve: ResolveHost | None = None,
        max_response: int = MAX_RESPONSE_BYTES,
    ) -> None:
        """``tls`` is the system's trust by default; ``resolve`` is DNS."""
        self._policy = policy
        self._resolve = resolve or DnsHostResolver()
        self._max_response = max_response
        self._http = Http1Client(tls or external_context, addresses=self._addresses)

    async def aclose(self) -> None:
        """Close every connection."""
        await self._http.aclose()

    @contextlib.asynccontextmanager
    async def stream(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None, *, seconds: float
    ) -> AsyncGenerator[StreamedResponse]:
        """Send a request and yield its response as it arrives. Raises ``url_refused`` before anything is sent."""
        destination = self._policy.parse(url)
        async with self._http.stream(method, destination.url, headers, body, seconds=seconds) as response:
            yield response

    async def send(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None, *, seconds: float
    ) -> HttpResponse:
        """Send a request and read the whole response. Raises what :meth:`stream` does."""
        async with self.stream(method, url, headers, body, seconds=seconds) as response:
            parts: list[bytes] = []
            size = 0
            async for chunk in response.chunks:
                size += len(chunk)
                if size > self._max_response:
                    raise OctoError(
                        f"{self._policy.parse(url).origin} answered with more than {self._max_response} bytes.",
                        code="peer_protocol",
                    )
                parts.append(chunk)
            return HttpResponse(response.status, response.headers, b"".join(parts))

    async def _addresses(self, origin: str, host: str) -> Sequence[str]:
        """Return the addresses to connect to, each of them checked."""
        if self._policy.is_exempt(origin):
            # The operating system also knows the names of the machine and of its containers.
            found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
            return list(dict.fromkeys(str(address[0]) for *_, address in found))
        try:
            addresses = [host] if _is_address(host) else await self._resolve(host)
        except LookupError:
            addresses = []
        if not addresses:
            raise TransportError(f"{host} has no address.", code="connect_failed", request_sent=False)
        # One private address among public ones is an attempt to get in at the second try, so it spoils them all.
        if len(addresses) > MAX_ADDRESSES or not all(is_public_address(address) for address in addresses):
            raise _refused("its host has an address that is not public")
        return addresses
