"""The public door of the installation that a command is for."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator

from octollm.client import Client, DoorError, connect
from octollm.client.door import Door
from octollm.config import Settings
from octollm.contracts.services import local_url
from octollm.installation.home import read_local_key, running_in
from octollm.resilience import RetryPolicy

LOOK_SECONDS = 2.0


async def nothing_runs(settings: Settings) -> bool:
    """Say whether no installation answers on this machine, and none elsewhere is meant."""
    if settings.urls or await running_in(settings.home) is not None:
        return False
    async with connect(_local(settings), timeout=LOOK_SECONDS, retry=RetryPolicy(attempts=1)) as octo:
        try:
            await octo.health()
        except DoorError as error:
            return error.code == "connect_failed"
        return False


@contextlib.asynccontextmanager
async def open_client(settings: Settings) -> AsyncGenerator[Client]:
    """Open a client of the door that the settings name: ``OCTOLLM_URL``, else this machine's.

    The home's own key is shown only to the process that holds this home, and only when it wants one.
    """
    urls, key = settings.urls, settings.api_key
    if not urls:
        running = await running_in(settings.home)
        urls = (running.url if running else _local(settings),)
        if running and key is None and not settings.local_trust:
            key = read_local_key(settings.home)
    async with connect(urls, key) as octo:
        yield octo


@contextlib.asynccontextmanager
async def open_door(settings: Settings) -> AsyncGenerator[Door]:
    """Open the same door for requests that the client has no method for."""
    async with open_client(settings) as octo:
        yield octo.door


def _local(settings: Settings) -> str:
    return local_url("reflex", shift=settings.port_shift, tls=settings.tls_cert is not None)
