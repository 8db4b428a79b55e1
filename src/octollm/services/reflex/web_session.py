"""The web page with its Content-Security-Policy, and its cookie sessions: SameSite=Strict, HttpOnly, same-origin requests only."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources
from typing import TypeVar

import msgspec
from starlette.datastructures import Headers
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.routing import Route

from octollm.capability import ServiceTokenSigner
from octollm.clock import Clock
from octollm.contracts.api import Acknowledgement
from octollm.contracts.auth import (
    SESSION_TOKEN_PREFIX,
    CreateSessionRequest,
    CurrentUser,
    EndSessionRequest,
    IssuerList,
    SessionRequest,
    SessionResponse,
)
from octollm.contracts.public_api import END_SESSION, LIST_ISSUERS, OPEN_SESSION, READ_SESSION
from octollm.errors import OctoError
from octollm.resilience import Deadline
from octollm.rpc.call import IncomingCall, Operation, implement
from octollm.rpc.client import CallTarget, OutgoingCall, ServiceClient
from octollm.services.reflex.guard import SAFE_METHODS, AllowedHosts, get_server_port
from octollm.services.reflex.throttle import FailedLoginThrottle, RateLimiter, get_address_bucket
from octollm.services.reflex.upstream import TokenExchangeClient

_INLINE_ELEMENT = re.compile(r"<(script|style)\b[^>]*>(.*?)</\1>", re.DOTALL)


def build_csp(html: str) -> str:
    """Return a Content-Security-Policy (CSP level 3) that allows the inline scripts and styles of ``html`` only."""
    hashes: dict[str, list[str]] = {"script": [], "style": []}
    for kind, text in _INLINE_ELEMENT.findall(html):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        hashes[kind].append(f"'sha256-{digest}'")
    nothing = "'none'"
    return "; ".join(
        (
            "default-src 'self'",
            f"script-src {' '.join(hashes['script']) or nothing}",
            f"style-src {' '.join(hashes['style']) or nothing}",
            "img-src 'self' data:",
            "connect-src 'self'",
            "object-src 'none'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )


def build_page_route() -> Route:
    """Return the route of the page. The file is read once, here."""
    html = resources.files("octollm.services.reflex").joinpath("page", "index.html").read_text("utf-8")
    headers = {
        "Content-Security-Policy": build_csp(html),
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cache-Control": "no-cache",
    }
    body = html.encode()

    async def page(_request: Request) -> Response:
        return Response(body, media_type="text/html; charset=utf-8", headers=headers)

    return Route("/", page, methods=["GET"])


T = TypeVar("T")

COOKIE = "octollm_session"
SECURE_COOKIE = "__Host-octollm_session"
"""Its name in TLS: a browser then takes it from this host alone (RFC 6265bis section 4.1.3)."""
CALL_SECONDS = 10.0


def read_session_cookie(connection: HTTPConnection, allowed_hosts: AllowedHosts) -> str | None:
    """Return the session that a request shows in its cookie, ``None`` where it shows none.

    A browser sends a cookie by itself, so what changes something has to come from a page of ours. Raises
    ``origin_refused``.
    """
    session = connection.cookies.get(SECURE_COOKIE) or connection.cookies.get(COOKIE)
    if session is None or not session.startswith(SESSION_TOKEN_PREFIX):
        return None
    headers, port = connection.headers, get_server_port(connection.scope)
    origins = headers.getlist("origin")
    changes = connection.scope["type"] == "websocket" or connection.scope["method"] not in SAFE_METHODS
    if not allowed_hosts.are_own_origins(origins, port) or (changes and len(origins) != 1):
        raise OctoError("A session is for pages of this server alone.", code="origin_refused")
    if _is_cross_site(headers):
        raise OctoError("A session is for pages of this server alone.", code="origin_refused")
    return session


def _is_cross_site(headers: Headers) -> bool:
    return any(value.strip().lower() in ("cross-site", "same-site") for value in headers.getlist("sec-fetch-site"))


class SessionHandlers:
    """Opens and ends sessions with the orchestrator, in the name of the door."""

    def __init__(
        self,
        caller: ServiceClient,
        signer: ServiceTokenSigner,
        exchange: TokenExchangeClient,
        allowed_hosts: AllowedHosts,
        rate_limiter: RateLimiter,
        throttle: FailedLoginThrottle,
        clock: Clock,
    ) -> None:
        self._caller = caller
        self._signer = signer
        self._exchange = exchange
        self._allowed_hosts = allowed_hosts
        self._rate_limiter = rate_limiter
        self._throttle = throttle
        self._clock = clock

    async def open(self, call: IncomingCall, body: SessionRequest) -> Response:
        """Open a session for an API key and set its cookie."""
        request = call.request
        if not self._allowed_hosts.are_own_origins(request.headers.getlist("origin"), get_server_port(request.scope)):
            raise OctoError("A session is for pages of this server alone.", code="origin_refused")
        await self._rate_limiter.hit(get_address_bucket(request.client.host if request.client is not None else ""))
        if (body.api_key is None) == (body.login is None):
            raise OctoError("A session is opened by an API key or by a login, one of the two.", code="invalid_body")
        wanted = CreateSessionRequest(body.api_key, body.login)
        async with self._throttle.attempt(body.api_key or ""):
            answer = await self._request("sessions.open", "/sessions", wanted, SessionResponse)
        told = Response(
            msgspec.json.encode(CurrentUser(answer.tenant, answer.scope, session=True)), media_type="application/json"
        )
        _set_cookie(told, call, answer.session, answer.expires_in)
        return told

    async def list_issuers(self, call: IncomingCall, _body: object) -> IssuerList:
        """Return where a browser can log in."""
        request = call.request
        await self._rate_limiter.hit(get_address_bucket(request.client.host if request.client is not None else ""))
        return await self._request("sessions.issuers", "/sessions/issuers", None, IssuerList)

    async def read(self, call: IncomingCall, _body: object) -> CurrentUser:
        """Return who the caller is."""
        held = self._exchange.get_cached(call.bearer)
        return CurrentUser(held.tenant, held.scope, session=call.bearer.startswith(SESSION_TOKEN_PREFIX))

    async def end(self, call: IncomingCall, _body: object) -> Response:
        """End the session that is shown, if one is, and take its cookie away."""
        session = read_session_cookie(call.request, self._allowed_hosts)
        if session is not None:
            await self._request("sessions.end", "/sessions/end", EndSessionRequest(session), Acknowledgement)
            self._exchange.invalidate(session)
        told = Response(msgspec.json.encode(Acknowledgement()), media_type="application/json")
        _set_cookie(told, call, "", 0)
        return told

    async def _request(self, name: str, path: str, body: object, response_type: type[T]) -> T:
        call = OutgoingCall(
            CallTarget("orchestrator", name, "GET" if body is None else "POST", path, "read_only"),
            self._signer.sign_token("orchestrator"),
            Deadline.after(self._clock, CALL_SECONDS),
            None if body is None else msgspec.json.encode(body),
        )
        return await self._caller.call(call, response_type)

    def operations(self) -> list[Operation]:
        """Return the operations on ``/session``."""
        return [
            implement(OPEN_SESSION, self.open, auth="public"),
            implement(READ_SESSION, self.read, auth="door"),
            implement(LIST_ISSUERS, self.list_issuers, auth="public"),
            implement(END_SESSION, self.end, auth="public"),
        ]


def _set_cookie(response: Response, call: IncomingCall, session: str, seconds: int) -> None:
    secure = call.request.url.scheme == "https"
    response.set_cookie(
        SECURE_COOKIE if secure else COOKIE,
        session,
        max_age=seconds,
        path="/",
        secure=secure,
        httponly=True,
        samesite="strict",
    )
    response.headers["Cache-Control"] = "no-store"
