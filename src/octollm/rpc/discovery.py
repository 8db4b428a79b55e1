"""Where a service answers: static URLs, one or several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from octollm.errors import OctoError


class Discovery(Protocol):
    """Finds the instances of a service."""

    def instances(self, service: str) -> tuple[str, ...]:
        """Return base URLs without a trailing slash; raise ``unavailable`` when none is known."""
        ...


class StaticDiscovery:
    """Addresses that were set at start. Services may be added while the process composes itself."""

    def __init__(self, urls: Mapping[str, tuple[str, ...]]) -> None:
        self._urls = dict(urls)

    def instances(self, service: str) -> tuple[str, ...]:
        """Return base URLs without a trailing slash; raise ``unavailable`` when none is known."""
        urls = self._urls.get(service, ())
        if not urls:
            raise OctoError(
                f"No address is known for {service}; set OCTOLLM_{service.upper()}_URL.", code="unavailable"
            )
        return urls
