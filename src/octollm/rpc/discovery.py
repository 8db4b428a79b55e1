"""Service discovery: the base URLs of a service's instances.

They come from settings, expanded over DNS records as those change, or from the registry of arms.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import TracebackType
from typing import Protocol
from urllib.parse import urlsplit

from octollm.concurrency import BackgroundLoop
from octollm.errors import OctoError


class Discovery(Protocol):
    """Where the instances of a service are. Implementations answer from memory; they run for every call."""

    def instances(self, service: str) -> tuple[str, ...]:
        """Return base URLs without a trailing slash; raise ``unavailable`` when none is known."""
        ...


class StaticDiscovery:
    """Addresses from settings; with a ``resolver``, a host name stands for each of its addresses."""

    def __init__(self, urls: Mapping[str, tuple[str, ...]], resolver: DnsResolver | None = None) -> None:
        self._urls = dict(urls)
        self._resolver = resolver

    def instances(self, service: str) -> tuple[str, ...]:
        """Return base URLs without a trailing slash; raise ``unavailable`` when none is known."""
        urls = self._urls.get(service, ())
        if not urls:
            raise OctoError(
                f"No address is known for {service}; set OCTOLLM_{service.upper()}_URL.", code="unavailable"
            )
        return urls if self._resolver is None else self._resolver.expand(urls)


MIN_TTL = 1.0
MAX_TTL = 30.0
"""Bounds of a record's TTL in seconds, so that a change takes effect within half a minute."""
FAILED_TTL = 2.0
"""Seconds until a failed lookup is repeated. The last known addresses stay in use."""
LOOKUP_SECONDS = 3.0
MAX_ADDRESSES = 64
MAX_NAMES = 256


@dataclass(frozen=True, slots=True)
class DnsRecords:
    """The addresses of a name, and their TTL in seconds."""

    addresses: tuple[str, ...]
    ttl: float


ResolveAddresses = Callable[[str], Awaitable[DnsRecords]]


async def resolve_addresses(name: str) -> DnsRecords:
    """Query the A and AAAA records (RFC 1035, RFC 3596) of ``name``, as the machine's ``resolv.conf`` says.

    Raises ``LookupError`` when there is no answer.
    """
    # Loaded by the first lookup, since most processes look nothing up, and in a thread: it takes 0.15 s.
    await asyncio.to_thread(import_module, "dns.asyncresolver")
    import dns.asyncresolver  # noqa: PLC0415
    import dns.exception  # noqa: PLC0415
    import dns.resolver  # noqa: PLC0415

    resolver = dns.asyncresolver.Resolver()
    resolver.lifetime = LOOKUP_SECONDS
    # Exceptions are collected, since a name with records of one family only is complete.
    answers = await asyncio.gather(
        *(resolver.resolve(name, kind, search=True) for kind in ("A", "AAAA")), return_exceptions=True
    )
    addresses: list[str] = []
    ttl = MAX_TTL
    for answer in answers:
        if isinstance(answer, dns.resolver.Answer) and answer.rrset is not None:
            addresses += [str(record) for record in answer.rrset]  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
            ttl = min(ttl, float(answer.rrset.ttl))
        elif isinstance(answer, BaseException) and not isinstance(answer, dns.exception.DNSException | OSError):
            raise answer
    if not addresses:
        raise LookupError(name)
    return DnsRecords(tuple(sorted(set(addresses))[:MAX_ADDRESSES]), ttl)


class _HostRecord:
    """The last known addresses of a name, and the loop that refreshes them."""

    def __init__(self) -> None:
        self.addresses: tuple[str, ...] = ()
        self.loop: BackgroundLoop | None = None


class DnsResolver:
    """Keeps the addresses of used names fresh while its ``async with`` block is open."""

    def __init__(self, *, resolve: ResolveAddresses = resolve_addresses) -> None:
        self._resolve = resolve
        self._names: dict[str, _HostRecord] = {}
        self._open = False

    async def __aenter__(self) -> DnsResolver:
        self._open = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open = False
        loops = [name.loop for name in self._names.values() if name.loop is not None]
        await asyncio.gather(*(loop.aclose() for loop in loops))

    def expand(self, urls: Sequence[str]) -> tuple[str, ...]:
        """Return ``urls`` with one URL for each current address of its host name.

        A URL stays as it is when its host is an address, when its name is not resolved yet (the operating system
        also knows names outside DNS), and with ``https``, whose certificate is for the name.
        """
        return tuple(expanded for url in urls for expanded in self._expand(url))

    def _expand(self, url: str) -> tuple[str, ...]:
        parts = urlsplit(url)
        host = parts.hostname or ""
        if parts.scheme != "http" or host == "localhost" or _is_address(host):
            return (url,)
        addresses = self._follow(host).addresses
        port = f":{parts.port}" if parts.port else ""
        return tuple(
            f"http://[{address}]{port}{parts.path}" if ":" in address else f"http://{address}{port}{parts.path}"
            for address in addresses
        ) or (url,)

    def _follow(self, host: str) -> _HostRecord:
        name = self._names.get(host)
        if name is None:
            name = _HostRecord()
            # Past the bound a name is not followed: its URL stays as it is, and the operating system resolves it.
            if len(self._names) >= MAX_NAMES:
                return name
            self._names[host] = name
        if self._open and name.loop is None:
            name.loop = BackgroundLoop(f"dns {host}", lambda: self._refresh(host, name), restart=True)
            name.loop.start()
        return name

    async def _refresh(self, host: str, name: _HostRecord) -> None:
        """Look a name up, and wait until its records expire."""
        try:
            records = await self._resolve(host)
        except LookupError:
            await asyncio.sleep(FAILED_TTL)
            return
        name.addresses = records.addresses
        await asyncio.sleep(min(max(records.ttl, MIN_TTL), MAX_TTL))


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


RegisteredAddresses = Callable[[str], tuple[str, ...]]
"""Returns the registered base URLs of a service; none for one that is not registered or has gone silent."""


class RegistryDiscovery:
    """Prefers ``static`` (settings, DNS) to the registry, so that no arm can take a built-in service's place."""

    def __init__(self, static: Discovery, addresses: RegisteredAddresses) -> None:
        self._static = static
        self._addresses = addresses

    def instances(self, service: str) -> tuple[str, ...]:
        """Return base URLs without a trailing slash; raise ``unavailable`` when none is known."""
        try:
            return self._static.instances(service)
        except OctoError as error:
            if error.code != "unavailable":
                raise
            urls = self._addresses(service)
            if not urls:
                raise OctoError(
                    f"{service} is not available: no process of it is registered, and no setting names its address."
                    f" Start it, or set OCTOLLM_{service.upper()}_URL.",
                    code="unavailable",
                ) from error
            return urls
