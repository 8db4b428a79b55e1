"""The executor's ``POST /http``: a request to an external server, for hosts that the operator allowed a tenant.

The allow-list decides whom a tenant may call, and the egress guard where such a call may go: a host on the list whose
name leads to a private address is refused all the same.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping

from octollm import FieldError, OctoError
from octollm.contracts.operations import ExternalRequest, ExternalResponse
from octollm.resilience import Deadline
from octollm.rpc.egress import EgressClient, EgressPolicy

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
MAX_SECONDS = 60.0
"""Longest time for one request, whatever the caller's deadline."""
MAX_HEADERS = 64
MAX_HEADER_VALUE = 4096
IDEMPOTENCY_KEY = "idempotency-key"

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}")
_VALUE = re.compile(r"[\t -~]*")
_OWN_HEADERS = frozenset(
    {
        "connection",
        "content-length",
        "expect",
        "host",
        "keep-alive",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
"""Headers that frame the message or choose the connection: they are the client's own (RFC 9110 section 7.6.1)."""


class HostAllowlist:
    """The hosts that each tenant may call. ``*.example.org`` stands for every host below ``example.org``."""

    def __init__(self, entries: Iterable[tuple[str, str]]) -> None:
        """``entries`` are pairs of a tenant and a host."""
        self._hosts: dict[str, list[str]] = {}
        for tenant, host in entries:
            self._hosts.setdefault(tenant, []).append(host)

    def check(self, tenant: str, host: str) -> None:
        """Raise ``host_not_allowed`` for a host that the tenant may not call."""
        allowed = self._hosts.get(tenant, ())
        if not any(host == each or (each.startswith("*.") and host.endswith(each[1:])) for each in allowed):
            raise OctoError(
                f"{host} is not on the allow-list of {tenant}. The operator adds it to OCTOLLM_HTTP_ALLOWLIST as"
                f" {tenant}/{host}.",
                code="host_not_allowed",
                field_errors=(FieldError("/url", "the host is not on the allow-list"),),
            )


class ExternalCaller:
    """Sends the requests of ``POST /http``."""

    def __init__(self, allowlist: HostAllowlist, policy: EgressPolicy, http: EgressClient) -> None:
        self._allowlist = allowlist
        self._policy = policy
        self._http = http

    async def send(self, tenant: str, request: ExternalRequest, key: str, deadline: Deadline) -> ExternalResponse:
        """Return the server's response, a redirect like any other.

        ``key`` identifies the effect: a repeated call has the same, and the server gets it as ``Idempotency-Key``
        unless the request has one. Raises ``url_refused``, ``host_not_allowed``, ``invalid_body`` and the failures of
        the connection.
        """
        destination = self._policy.parse(request.url)
        self._allowlist.check(tenant, f"[{destination.host}]" if ":" in destination.host else destination.host)
        headers = _check_headers(request.headers)
        if request.method not in METHODS:
            raise _invalid("/method", f"The method is one of {', '.join(METHODS)}.")
        if request.method not in ("GET", "HEAD", "OPTIONS"):
            headers.setdefault(IDEMPOTENCY_KEY, key)
        headers.setdefault("user-agent", "octollm")
        seconds = min(MAX_SECONDS, deadline.remaining())
        body = request.body.encode() if request.body else None
        response = await self._http.send(request.method, destination.url, headers, body, seconds=seconds)
        try:
            text, encoding = response.body.decode(), "utf-8"
        except UnicodeDecodeError:
            text, encoding = base64.b64encode(response.body).decode(), "base64"
        return ExternalResponse(response.status, dict(response.headers), text, encoding)


def _check_headers(headers: Mapping[str, str]) -> dict[str, str]:
    if len(headers) > MAX_HEADERS:
        raise _invalid("/headers", f"A request has at most {MAX_HEADERS} headers.")
    checked: dict[str, str] = {}
    for name, value in headers.items():
        lower = name.lower()
        if _TOKEN.fullmatch(name) is None or lower in checked:
            raise _invalid("/headers", "A header's name is a token (RFC 9110), and none is there twice.")
        if lower in _OWN_HEADERS or lower.startswith("proxy-"):
            raise _invalid("/headers", f"The header {lower} is set by the executor alone.")
        if len(value) > MAX_HEADER_VALUE or _VALUE.fullmatch(value) is None:
            raise _invalid("/headers", f"{lower} must be at most {MAX_HEADER_VALUE} printable ASCII characters.")
        checked[lower] = value
    return checked


def _invalid(pointer: str, detail: str) -> OctoError:
    return OctoError(detail, code="invalid_body", field_errors=(FieldError(pointer, detail),))
