"""What every request passes before anything else looks at it: path, Host, Origin; and the headers of every answer."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Receive, Scope, Send

from octollm.clock import IdGenerator
from octollm.errors import OctoError
from octollm.rpc.problems import problem_response
from octollm.services.reflex.addresses import AllowedHosts, check_path
from octollm.telemetry import Metrics

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
