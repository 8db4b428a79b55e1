"""Where a service in a process of its own finds the others."""

from __future__ import annotations

import socket
from collections.abc import Mapping

from octollm.config import Settings
from octollm.contracts.services import SERVICES
from octollm.installation.ports import is_loopback
from octollm.installation.wires import transport_from_settings


def resolve_addresses(settings: Settings) -> Mapping[str, tuple[str, ...]]:
    """Return the base URLs of every built-in service.

    They are those of ``OCTOLLM_<SERVICE>_URL``; without one, a process that listens on loopback expects the others
    beside it, and any other expects each at its host name in a cluster, e.g. ``http://coder-arm:8102``.
    """
    beside = is_loopback(settings.host)
    scheme = transport_from_settings(settings).scheme
    found: dict[str, tuple[str, ...]] = {}
    for name, info in SERVICES.items():
        host = url_host(settings.host) if beside else info.host
        found[name] = settings.service_urls.get(name) or (f"{scheme}://{host}:{info.port + settings.port_offset}",)
    return found


def advertised_url(settings: Settings, port: int) -> str:
    """Return the URL by which others reach what this process serves on ``port``."""
    if settings.advertise_url is not None:
        return settings.advertise_url
    host = settings.host if is_loopback(settings.host) else socket.gethostname()
    return f"{transport_from_settings(settings).scheme}://{url_host(host)}:{port}"


def url_host(host: str) -> str:
    """Return a host as it stands in a URL (RFC 3986 section 3.2.2: an IPv6 address in brackets)."""
    return f"[{host}]" if ":" in host else host
