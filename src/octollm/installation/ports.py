"""Every socket of an installation, bound before anything starts."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Generator, Mapping
from dataclasses import dataclass

from octollm.contracts.services import SERVICES
from octollm.rpc.hosting import listen

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

    ``check_ports`` overrides single ports; 0 is any free one. Raises ``port_taken`` naming the first that is taken.
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
