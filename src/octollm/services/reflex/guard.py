"""Request guard: Host, Origin and path checks before routing, security headers on every response, and when a loopback peer counts as the local user."""

from __future__ import annotations

import re
from collections.abc import Iterable, MutableMapping, Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Receive, Scope, Send

from octollm.clock import IdGenerator
from octollm.errors import OctoError
from octollm.rpc.problems import problem_response
from octollm.telemetry import Metrics

LOOPBACK_NAMES = frozenset({"127.0.0.1", "localhost", "[::1]"})
MAX_PATH = 1024

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::([0-9]{1,5}))?")
_AMBIGUOUS_ENCODING = re.compile(rb"%(?:2f|5c|2e|25|7f|[01][0-9a-f])", re.IGNORECASE)
_PRINTABLE_ASCII = re.compile(rb"[!-~]+")


class AllowedHosts:
    """The names under which this door is reached: this machine's with our port, and those of the setting.

    ``allowed`` are host names, each with a port or, for any port, without. A name that is not ours in ``Host`` is
    how DNS rebinding shows.
    """

    def __init__(self, allowed_hosts: Sequence[str], cors_origins: Sequence[str] = ()) -> None:
        """``callers`` are origins whose pages may call with a key of their own: they are not ours for all that."""
        self._allowed = frozenset(allowed_hosts)
        self._cors_origins = frozenset(cors_origins)

    def allows_origin(self, origin: str, port: int) -> bool:
        """Say whether a page of ``origin`` may change something, given that it shows a credential."""
        return origin in self._cors_origins or self.is_own_origin(origin, port)

    def is_allowed_host(self, host: str, port: int, *, default_port: int = 80) -> bool:
        """Say whether ``host`` (``name[:port]``) is ours, with ``port`` the one that the request came in by."""
        match = _HOST.fullmatch(host.lower())
        if match is None:
            return False
        name, given = match[1], int(match[2]) if match[2] else default_port
        if name in LOOPBACK_NAMES and given == port:
            return True
        return name in self._allowed or f"{name}:{given}" in self._allowed

    def is_own_origin(self, origin: str, port: int) -> bool:
        """Say whether ``origin`` (RFC 6454 section 6.1) is a page of ours. ``null`` is nobody's."""
        scheme, separator, host = origin.partition("://")
        if not separator or scheme not in ("http", "https"):
            return False
        return self.is_allowed_host(host, port, default_port=443 if scheme == "https" else 80)

    def are_own_origins(self, origins: Iterable[str], port: int) -> bool:
        """Say whether none of ``origins`` is a page of somebody else's; where none is told, none is."""
        return all(self.is_own_origin(origin, port) for origin in origins)


def check_path(raw: bytes) -> None:
    """Refuse a path with more than one meaning: ``//``, ``.``, ``..``, encoded slashes, dots, percent or control signs.

    ``raw`` is the path as it came, before any decoding. Raises ``invalid_parameter``.
    """
    segments = raw.split(b"/")
    plain = (
        len(raw) <= MAX_PATH
        and raw.startswith(b"/")
        and _PRINTABLE_ASCII.fullmatch(raw) is not None
        and b"\\" not in raw
        and b"//" not in raw
        and _AMBIGUOUS_ENCODING.search(raw) is None
        and not any(segment in (b".", b"..") for segment in segments)
    )
    if not plain:
        raise OctoError("The path is malformed.", code="invalid_parameter")


def is_loopback(address: str) -> bool:
    """Say whether a peer's address is this machine's loopback."""
    return address == "::1" or address.startswith("127.") or address.startswith("::ffff:127.")


SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
PROBE_PATHS = ("/health", "/ready", "/metrics")
"""What an orchestrator of containers asks by a pod's address; nothing there needs or gives authority."""

_SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; sandbox",
}


def get_server_port(scope: MutableMapping[str, Any]) -> int:
    """Return the port that a request came in by; 0 when the server does not tell."""
    server = scope.get("server")
    return int(server[1]) if server and server[1] else 0


def check_request(scope: Scope, allowed_hosts: AllowedHosts, *, exempts_probes: bool) -> None:
    """Raise ``invalid_parameter``, ``host_refused`` or ``origin_refused`` for what may not come in."""
    path: str = scope["path"]
    check_path(scope.get("raw_path") or path.encode())
    headers = Headers(scope=scope)
    port = get_server_port(scope)
    hosts = headers.getlist("host")
    probe = exempts_probes and (path in PROBE_PATHS or path.startswith("/.well-known/"))
    if not probe and (len(hosts) != 1 or not allowed_hosts.is_allowed_host(hosts[0], port)):
        raise OctoError(
            "This server is not reached by that Host; OCTOLLM_ALLOWED_HOSTS names further ones.", code="host_refused"
        )
    changes = scope["type"] == "websocket" or scope["method"] not in SAFE_METHODS
    if changes and any(not allowed_hosts.allows_origin(origin, port) for origin in headers.getlist("origin")):
        raise OctoError("A page of another origin may not do this.", code="origin_refused")


class RequestGuardMiddleware:
    """ASGI middleware in front of the whole service."""

    def __init__(
        self, app: ASGIApp, *, allowed_hosts: AllowedHosts, ids: IdGenerator, metrics: Metrics, exempts_probes: bool
    ) -> None:
        self._app = app
        self._allowed_hosts = allowed_hosts
        self._ids = ids
        self._metrics = metrics
        self._exempts_probes = exempts_probes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or pass on."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return

        async def guarded(message: Any) -> None:
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                headers = MutableHeaders(raw=message.setdefault("headers", []))
                for name, value in _SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            check_request(scope, self._allowed_hosts, exempts_probes=self._exempts_probes)
        except OctoError as error:
            self._metrics.rejected_requests.labels(error.code).inc()
            # On an upgrade this answers the handshake: no socket is opened for a page that is not ours.
            await problem_response(error, "req-" + self._ids.hex())(scope, receive, guarded)
            return
        await self._app(scope, receive, guarded)


def check_local_user(headers: Headers, peer: str, port: int, allowed_hosts: AllowedHosts) -> None:
    """Return when a request from ``peer`` to our ``port``, which shows no key, is the local user's.

    That is only asked where trust is configured: embedded, bound to loopback, and not switched off. Raises
    ``origin_refused`` for a page of another origin, and ``token_missing`` for a peer that is not local, a request
    that went through a proxy, or one that a foreign page caused.
    """
    if not allowed_hosts.are_own_origins(headers.getlist("origin"), port):
        raise OctoError("A page of another origin may not do this.", code="origin_refused")
    if not is_loopback(peer):
        raise _token_missing("only this machine is trusted without one")
    if any(name in ("forwarded", "via") or name.startswith("x-forwarded-") for name in headers):
        raise _token_missing("a request that came through a proxy is not trusted without one")
    if any(value.strip().lower() == "cross-site" for value in headers.getlist("sec-fetch-site")):
        raise _token_missing("a request that another site caused is not trusted without one")
    hosts = headers.getlist("host")
    if len(hosts) != 1 or not allowed_hosts.is_allowed_host(hosts[0], port):
        raise OctoError("This server is not reached by that Host.", code="host_refused")


def _token_missing(reason: str) -> OctoError:
    return OctoError(f"An API key is needed as a bearer token: {reason}.", code="token_missing")
