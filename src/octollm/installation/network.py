"""Sockets, addresses and transport (HTTP version, TLS) of an installation's services."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Generator, Mapping
from dataclasses import dataclass

import msgspec

from octollm.config import Settings
from octollm.contracts.services import SERVICES
from octollm.errors import SettingError
from octollm.rpc.tls import TlsConfig
from octollm.rpc.transport import TransportConfig, listen

_WILDCARD_HOSTS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  compared with, not bound to


@dataclass(frozen=True, slots=True)
class BoundSockets:
    """The bound socket of each service, and the URL by which this machine reaches it."""

    sockets: Mapping[str, socket.socket]
    urls: Mapping[str, str]


def is_loopback(host: str) -> bool:
    """Say whether what listens on ``host`` is reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@contextlib.contextmanager
def bind_all(
    host: str, shift: int, ports: Mapping[str, int] | None, *, scheme: str = "http"
) -> Generator[BoundSockets]:
    """Bind a socket for each service; close those that nobody took over.

    ``ports`` overrides single ports; 0 is any free one. Raises ``port_taken`` naming the first that is taken.
    """
    own = ports or {}
    with contextlib.ExitStack() as stack:
        sockets: dict[str, socket.socket] = {}
        urls: dict[str, str] = {}
        for name, info in SERVICES.items():
            bound = listen(host, own.get(name, info.port + shift), name)
            stack.callback(bound.close)
            sockets[name] = bound
            urls[name] = _url(scheme, host, bound.getsockname()[1])
        yield BoundSockets(sockets, urls)


def _url(scheme: str, host: str, port: int) -> str:
    reached = _WILDCARD_HOSTS.get(host, host)
    return f"{scheme}://[{reached}]:{port}" if ":" in reached else f"{scheme}://{reached}:{port}"


GATEWAY = "reflex"


def transport_from_settings(settings: Settings) -> TransportConfig:
    """Return how services are served and called. Raises ``setting_invalid`` for half of what TLS needs."""
    if settings.tls_cert is None or settings.tls_key is None:
        if settings.tls_cert is not None or settings.tls_key is not None or settings.mtls:
            raise SettingError("TLS needs a certificate and its key: set both OCTOLLM_TLS_CERT and OCTOLLM_TLS_KEY.")
        return TransportConfig(settings.http)
    return TransportConfig(
        settings.http, TlsConfig(settings.tls_cert, settings.tls_key, settings.tls_ca, settings.mtls)
    )


def server_transport(transport: TransportConfig, service: str) -> TransportConfig:
    """Return how one service is served: who comes to the public door has a key to show, not a certificate."""
    if service != GATEWAY or transport.tls is None:
        return transport
    return TransportConfig(transport.http_version, msgspec.structs.replace(transport.tls, mutual=False))


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
