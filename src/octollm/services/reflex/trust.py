"""When a local peer counts as the local user. No I/O."""

from __future__ import annotations

from starlette.datastructures import Headers

from octollm.errors import OctoError
from octollm.services.reflex.addresses import AllowedHosts, is_loopback


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
