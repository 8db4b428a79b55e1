"""Where a service answers: one or several base URLs, set at start or found in DNS."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from octollm.errors import OctoError
from octollm.rpc.discovery_dns import DnsResolver


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
