"""Where a service answers: every address that its DNS name has, followed as they change."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from urllib.parse import urlsplit

import dns.asyncresolver
import dns.exception
import dns.resolver

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
