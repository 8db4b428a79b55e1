"""Making a client, from what is given or from the environment."""

from __future__ import annotations

import os
from collections.abc import Sequence

from octollm.client.client import AsyncClient
from octollm.client.door import DEFAULT_TIMEOUT_SECONDS, GatewayTransport
from octollm.client.portal import Portal
from octollm.client.sync import Client
from octollm.clock import SystemClock, Uuid7Generator
from octollm.config import read_client_settings
from octollm.contracts.services import local_url
from octollm.resilience import RetryPolicy
from octollm.rpc.tls import client_context


def connect(
    url: str | Sequence[str] | None = None,
    api_key: str | None = None,
    *,
    timeout: float = DEFAULT_TIMEOUT_SECONDS,
    retry: RetryPolicy | None = None,
) -> AsyncClient:
    """Return a client of the installation whose public door is at ``url``. Nothing is asked yet.

    Several addresses, in a list or with commas, are doors of the same installation: when one is gone, the next is
    used. Without ``url`` it is ``OCTOLLM_URL``, else this machine's; without ``api_key`` it is ``OCTOLLM_API_KEY``.
    ``timeout`` bounds each call with its retries, in seconds, but not the transfer of files nor what is watched.
    An ``https`` address has to show a certificate that the system's authorities signed, or those of
    ``OCTOLLM_TLS_CA``. Connections are direct: no proxy is used and no redirect followed, so that the key goes nowhere
    else. Raises ``setting_invalid``.
    """
    settings = read_client_settings(os.environ)
    if url is None:
        local = local_url("reflex", port_offset=settings.port_offset, tls=settings.tls_cert is not None)
        urls: Sequence[str] = settings.urls or (local,)
    else:
        urls = [part.strip() for part in url.split(",") if part.strip()] if isinstance(url, str) else url
    clock = SystemClock()
    key = api_key or settings.api_key
    tls = None
    if any(url.startswith("https:") for url in urls):
        tls = client_context(settings.tls_ca, settings.tls_cert, settings.tls_key)
    return AsyncClient(
        GatewayTransport(urls, key, clock=clock, ids=Uuid7Generator(clock), timeout=timeout, retry=retry, tls=tls)
    )


def connect_sync(
    url: str | Sequence[str] | None = None,
    api_key: str | None = None,
    *,
    timeout: float = DEFAULT_TIMEOUT_SECONDS,
    retry: RetryPolicy | None = None,
) -> Client:
    """Return a client for plain code; see :func:`connect`. It runs on a thread of its own until it is closed."""
    inner = connect(url, api_key, timeout=timeout, retry=retry)
    return Client(Portal(), inner)
