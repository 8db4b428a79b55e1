"""Sockets, addresses and TLS of an installation's services."""

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
from octollm.rpc.transport import PLAINTEXT, TransportConfig, listen

GATEWAY = "reflex"
_WILDCARD_HOSTS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  compared with, not bound to


@dataclass(frozen=True, slots=True)
class BoundSockets:
    """The bound socket of each service, and its URL on this machine."""

    sockets: Mapping[str, socket.socket]
    urls: Mapping[str, str]


def is_loopback(host: str) -> bool:
    """Return whether a server bound to ``host`` is reachable from this machine only."""
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
    """Bind a socket for each service; leaving the context closes them.

    ``shift`` is added to the default ports; ``ports`` overrides single ones, where 0 is any free port. Raises
    ``port_taken`` naming the first that is in use.
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
    # A wildcard address can be bound, but not connected to on every platform.
    return f"{scheme}://{url_host(_WILDCARD_HOSTS.get(host, host))}:{port}"


def transport_from_settings(settings: Settings) -> TransportConfig:
    """Return how the services talk. Raises ``setting_invalid`` for a certificate without its key."""
    if settings.tls_cert is None or settings.tls_key is None:
        if settings.tls_cert is not None or settings.tls_key is not None or settings.mtls:
            raise SettingError("TLS needs a certificate and its key: set both OCTOLLM_TLS_CERT and OCTOLLM_TLS_KEY.")
        return PLAINTEXT
    return TransportConfig(TlsConfig(settings.tls_cert, settings.tls_key, settings.tls_ca, settings.mtls))


def server_transport(transport: TransportConfig, service: str) -> TransportConfig:
    """Return the server side of ``transport``: clients of the gateway show an API key, not a certificate."""
    if service != GATEWAY or transport.tls is None:
        return transport
    return TransportConfig(msgspec.structs.replace(transport.tls, mutual=False))


def resolve_addresses(settings: Settings) -> Mapping[str, tuple[str, ...]]:
    """Return the base URLs of every built-in service.

    ``OCTOLLM_<SERVICE>_URL`` takes precedence. Without it, a process that listens on loopback expects the others on
    this machine, and any other expects each at its host name in a cluster, e.g. ``http://coder-arm:8102``.
    """
    is_local = is_loopback(settings.host)
    scheme = transport_from_settings(settings).scheme
    urls: dict[str, tuple[str, ...]] = {}
    for name, info in SERVICES.items():
        host = url_host(settings.host) if is_local else info.host
        urls[name] = settings.service_urls.get(name) or (f"{scheme}://{host}:{info.port + settings.port_offset}",)
    return urls


def advertised_url(settings: Settings, port: int) -> str:
    """Return the URL at which other services reach this process's server on ``port``."""
    if settings.advertise_url is not None:
        return settings.advertise_url
    host = settings.host if is_loopback(settings.host) else socket.gethostname()
    return f"{transport_from_settings(settings).scheme}://{url_host(host)}:{port}"


def url_host(host: str) -> str:
    """Return a host for use in a URL: an IPv6 address in brackets (RFC 3986 section 3.2.2)."""
    return f"[{host}]" if ":" in host else host
