"""Where an arm of one's own answers: as it told the orchestrator, which no setting can know."""

from __future__ import annotations

from collections.abc import Callable

from octollm.errors import OctoError
from octollm.rpc.discovery import Discovery

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
