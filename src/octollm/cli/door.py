"""The public door of the installation that a command is for."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator

from octollm.client import APIError, AsyncClient, connect
from octollm.client.door import GatewayTransport
from octollm.config import Settings
from octollm.contracts.services import local_url
from octollm.installation.home import find_running, read_local_key
from octollm.resilience import RetryPolicy

PROBE_SECONDS = 2.0


async def has_no_installation(settings: Settings) -> bool:
    """Say whether no installation answers on this machine, and none elsewhere is meant."""
    if settings.urls or await find_running(settings.home) is not None:
        return False
    async with connect(_local_url(settings), timeout=PROBE_SECONDS, retry=RetryPolicy(max_attempts=1)) as octo:
        try:
            await octo.health()
        except APIError as error:
            return error.code == "connect_failed"
        return False


@contextlib.asynccontextmanager
async def open_client(settings: Settings) -> AsyncGenerator[AsyncClient]:
    """Open a client of the door that the settings name: ``OCTOLLM_URL``, else this machine's.

    The home's own key is shown only to the process that holds this home, and only when it wants one.
    """
    urls, key = settings.urls, settings.api_key
    if not urls:
        running = await find_running(settings.home)
        urls = (running.url if running else _local_url(settings),)
        if running and key is None and not settings.trust_loopback:
            key = read_local_key(settings.home)
    async with connect(urls, key) as octo:
        yield octo


@contextlib.asynccontextmanager
async def open_transport(settings: Settings) -> AsyncGenerator[GatewayTransport]:
    """Open the same door for requests that the client has no method for."""
    async with open_client(settings) as octo:
        yield octo.transport


def _local_url(settings: Settings) -> str:
    return local_url("reflex", port_offset=settings.port_offset, tls=settings.tls_cert is not None)
