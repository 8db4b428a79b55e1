"""Service discovery: base URLs from settings, expanded over DNS records as they change, or from the registry of arms."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol
from urllib.parse import urlsplit

import dns.asyncresolver
import dns.exception
import dns.resolver

from octollm.errors import OctoError


class Discovery(Protocol):
    """Finds the instances of a service."""

    def instances(self, service: str) -> tuple[str, ...]:
        """Return base URLs without a trailing slash; raise ``unavailable`` when none is known."""
        ...


class StaticDiscovery:
    """Addresses that were set at start; with ``names``, a host name stands for every address that it has."""

    def __init__(self, urls: Mapping[str, tuple[str, ...]], resolver: DnsResolver | None = None) -> None:
        self._urls = dict(urls)
        self._names = resolver

    def instances(self, service: str) -> tuple[str, ...]:
        """Return base URLs without a trailing slash; raise ``unavailable`` when none is known."""
        urls = self._urls.get(service, ())
        if not urls:
            raise OctoError(
                f"No address is known for {service}; set OCTOLLM_{service.upper()}_URL.", code="unavailable"
            )
        return urls if self._names is None else self._names.expand(urls)


MIN_TTL = 1.0
MAX_TTL = 30.0
"""Seconds: what a name's records say is kept within these, so that a change is seen within half a minute."""
FAILED_TTL = 2.0
"""Seconds until a name is asked for again that was not answered; its last addresses stay."""
LOOKUP_SECONDS = 3.0
MAX_ADDRESSES = 64
MAX_NAMES = 256


@dataclass(frozen=True, slots=True)
class DnsRecords:
    """The addresses of a name, and for how long they hold, in seconds."""

    addresses: tuple[str, ...]
    ttl: float


ResolveAddresses = Callable[[str], Awaitable[DnsRecords]]


async def resolve_addresses(name: str) -> DnsRecords:
    """Ask DNS for the A and AAAA records (RFC 1035, RFC 3596) of ``name``, by the machine's ``resolv.conf``.

    Raises ``LookupError`` when there is no answer.
    """
    resolver = dns.asyncresolver.Resolver()
    resolver.lifetime = LOOKUP_SECONDS
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
    """One name: its addresses as last known, and the task that follows them."""

    def __init__(self) -> None:
        self.addresses: tuple[str, ...] = ()
        self.task: asyncio.Task[None] | None = None


class DnsResolver:
    """Follows names for as long as its ``async with`` lasts. Names that are not used are not asked for."""

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
        tasks = [name.task for name in self._names.values() if name.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def expand(self, urls: Sequence[str]) -> tuple[str, ...]:
        """Return ``urls`` with one for each address that its host name has now.

        A URL whose host is an address stays; so does one whose name has not been answered yet, for the operating
        system to resolve, which also knows names that are in no DNS. ``https`` stays too: its name is in the
        certificate.
        """
        return tuple(url for given in urls for url in self._expand(given))

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
            if len(self._names) >= MAX_NAMES:
                return name
            self._names[host] = name
        if self._open and (name.task is None or name.task.done()):
            name.task = asyncio.create_task(self._refresh(host, name), name=f"dns {host}")
        return name

    async def _refresh(self, host: str, name: _HostRecord) -> None:
        """Ask again whenever the records have run out."""
        while True:
            try:
                found = await self._resolve(host)
            except LookupError:
                await asyncio.sleep(FAILED_TTL)
                continue
            name.addresses = found.addresses
            await asyncio.sleep(min(max(found.ttl, MIN_TTL), MAX_TTL))


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


RegisteredAddresses = Callable[[str], tuple[str, ...]]
"""Finds the registered base URLs of a service; none for one that has not registered, or is silent."""


class RegistryDiscovery:
    """Asks ``first`` (settings, DNS), then what arms registered. So no arm can take a built-in service's place."""

    def __init__(self, static: Discovery, addresses: RegisteredAddresses) -> None:
        self._first = static
        self._addresses = addresses

    def instances(self, service: str) -> tuple[str, ...]:
        """Return base URLs without a trailing slash; raise ``unavailable`` when none is known."""
        try:
            return self._first.instances(service)
        except OctoError as error:
            if error.code != "unavailable":
                raise
            urls = self._addresses(service)
            if not urls:
                raise OctoError(
                    f"{service} is not there: no process of it is registered, and no setting names its address. Start"
                    f" it, or set OCTOLLM_{service.upper()}_URL.",
                    code="unavailable",
                ) from error
            return urls
