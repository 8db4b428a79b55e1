"""Request guard: Host, Origin and path checks before routing, and security headers on every response.

Also decides when a request without a credential is the local user's, and reads the session cookie.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, MutableMapping, Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from octollm.clock import IdGenerator
from octollm.contracts.auth import SESSION_TOKEN_PREFIX
from octollm.errors import OctoError
from octollm.rpc.problems import problem_response
from octollm.telemetry import Metrics

LOOPBACK_NAMES = frozenset({"127.0.0.1", "localhost", "[::1]"})
MAX_PATH = 1024
"""Bytes of a path."""
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
PROBE_PATHS = ("/health", "/ready", "/metrics")
"""Paths that a container orchestrator requests by a pod's address. They neither need nor grant authority."""
COOKIE = "octollm_session"
SECURE_COOKIE = "__Host-octollm_session"
"""Its name over TLS: a browser accepts it from this host only (RFC 6265bis section 4.1.3)."""

_SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; sandbox",
}
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::([0-9]{1,5}))?")
_AMBIGUOUS_ENCODING = re.compile(rb"%(?:2f|5c|2e|25|7f|[01][0-9a-f])", re.IGNORECASE)
_PRINTABLE_ASCII = re.compile(rb"[!-~]+")


class AllowedHosts:
    """The hosts of this gateway: loopback names with the port in use, and those of the settings.

    ``allowed_hosts`` are host names, each with a port, or without one for any port. Checking ``Host`` prevents DNS
    rebinding: there, a foreign name resolves to this machine.
    """

    def __init__(self, allowed_hosts: Sequence[str], cors_origins: Sequence[str] = ()) -> None:
        """``cors_origins`` may call with an API key; they never count as the gateway's own origin."""
        self._allowed = frozenset(allowed_hosts)
        self._cors_origins = frozenset(cors_origins)

    def allows_origin(self, origin: str, port: int) -> bool:
        """Return whether a page of ``origin`` may change something, provided that it sends a credential."""
        return origin in self._cors_origins or self.is_own_origin(origin, port)

    def is_allowed_host(self, host: str, port: int, *, default_port: int = 80) -> bool:
        """Return whether ``host`` (``name[:port]``) is allowed; ``port`` is the port that received the request."""
        match = _HOST.fullmatch(host.lower())
        if match is None:
            return False
        name, host_port = match[1], int(match[2]) if match[2] else default_port
        if name in LOOPBACK_NAMES and host_port == port:
            return True
        return name in self._allowed or f"{name}:{host_port}" in self._allowed

    def is_own_origin(self, origin: str, port: int) -> bool:
        """Return whether ``origin`` (RFC 6454 section 6.1) is the gateway's own. ``null`` is not."""
        scheme, separator, host = origin.partition("://")
        if not separator or scheme not in ("http", "https"):
            return False
        return self.is_allowed_host(host, port, default_port=443 if scheme == "https" else 80)

    def are_own_origins(self, origins: Iterable[str], port: int) -> bool:
        """Return whether all ``origins`` are the gateway's own. True without any."""
        return all(self.is_own_origin(origin, port) for origin in origins)


def check_path(raw: bytes) -> None:
    """Refuse an ambiguous path: ``//``, ``.``, ``..``, encoded slashes, dots, percent signs or control characters.

    ``raw`` is the path before decoding. Raises ``invalid_parameter``.
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
    """Return whether a peer's address is this machine's loopback."""
    return address == "::1" or address.startswith("127.") or address.startswith("::ffff:127.")


def get_server_port(scope: MutableMapping[str, Any]) -> int:
    """Return the port that received a request; 0 when the server does not say."""
    server = scope.get("server")
    return int(server[1]) if server and server[1] else 0


def check_request(scope: Scope, allowed_hosts: AllowedHosts, *, exempts_probes: bool) -> None:
    """Check path, ``Host`` and ``Origin``. Raises ``invalid_parameter``, ``host_refused``, ``origin_refused``."""
    path: str = scope["path"]
    check_path(scope.get("raw_path") or path.encode())
    headers = Headers(scope=scope)
    port = get_server_port(scope)
    hosts = headers.getlist("host")
    probe = exempts_probes and (path in PROBE_PATHS or path.startswith("/.well-known/"))
    if not probe and (len(hosts) != 1 or not allowed_hosts.is_allowed_host(hosts[0], port)):
        raise OctoError(
            "This server does not have that Host; OCTOLLM_ALLOWED_HOSTS names further ones.", code="host_refused"
        )
    # A WebSocket counts as a change: its handshake is a GET that any page may make, and it carries messages.
    changes = scope["type"] == "websocket" or scope["method"] not in SAFE_METHODS
    if changes and any(not allowed_hosts.allows_origin(origin, port) for origin in headers.getlist("origin")):
        raise OctoError("A page of another origin may not do this.", code="origin_refused")


class RequestGuardMiddleware:
    """ASGI middleware that runs the checks before anything else of the gateway."""

    def __init__(
        self, app: ASGIApp, *, allowed_hosts: AllowedHosts, ids: IdGenerator, metrics: Metrics, exempts_probes: bool
    ) -> None:
        self._app = app
        self._allowed_hosts = allowed_hosts
        self._ids = ids
        self._metrics = metrics
        self._exempts_probes = exempts_probes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a refused request with its problem; pass any other on."""
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
            # For an upgrade this is the response to the handshake: no socket opens for a foreign page.
            await problem_response(error, "req-" + self._ids.hex())(scope, receive, guarded)
            return
        await self._app(scope, receive, guarded)


def check_local_user(headers: Headers, peer: str, port: int, allowed_hosts: AllowedHosts) -> None:
    """Return when a request without a key, from ``peer`` to ``port``, is the local user's.

    Called only where loopback is trusted: one process, bound to loopback, and not switched off. Raises
    ``origin_refused`` for a page of another origin, and ``token_missing`` for a peer that is not local, a proxied
    request, or a request that a foreign page caused.
    """
    if not allowed_hosts.are_own_origins(headers.getlist("origin"), port):
        raise OctoError("A page of another origin may not do this.", code="origin_refused")
    if not is_loopback(peer):
        raise _token_missing("only this machine is trusted without one")
    # Behind a proxy on this machine every stranger has a loopback address.
    if any(name in ("forwarded", "via") or name.startswith("x-forwarded-") for name in headers):
        raise _token_missing("a proxied request is not trusted without one")
    if any(value.strip().lower() == "cross-site" for value in headers.getlist("sec-fetch-site")):
        raise _token_missing("a request that another site caused is not trusted without one")
    hosts = headers.getlist("host")
    if len(hosts) != 1 or not allowed_hosts.is_allowed_host(hosts[0], port):
        raise OctoError("This server does not have that Host.", code="host_refused")


def _token_missing(reason: str) -> OctoError:
    return OctoError(f"An API key is needed as a bearer token: {reason}.", code="token_missing")


def read_session_cookie(connection: HTTPConnection, allowed_hosts: AllowedHosts) -> str | None:
    """Return the session in a request's cookie; ``None`` without one.

    A browser adds the cookie to requests of foreign pages too, so a request that changes something needs the
    gateway's own ``Origin``. Raises ``origin_refused``.
    """
    session = connection.cookies.get(SECURE_COOKIE) or connection.cookies.get(COOKIE)
    if session is None or not session.startswith(SESSION_TOKEN_PREFIX):
        return None
    headers, port = connection.headers, get_server_port(connection.scope)
    origins = headers.getlist("origin")
    changes = connection.scope["type"] == "websocket" or connection.scope["method"] not in SAFE_METHODS
    is_foreign = not allowed_hosts.are_own_origins(origins, port) or (changes and len(origins) != 1)
    if is_foreign or _is_cross_site(headers):
        raise OctoError("Only pages of this server may use a session.", code="origin_refused")
    return session


def _is_cross_site(headers: Headers) -> bool:
    # SameSite=Strict lets pages of other ports and sibling hosts send the cookie: they are refused here.
    return any(value.strip().lower() in ("cross-site", "same-site") for value in headers.getlist("sec-fetch-site"))
