"""Sessions of the page: a cookie that scripts cannot read and other sites cannot send."""

from __future__ import annotations

from typing import TypeVar

import msgspec
from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.responses import Response

from octollm.capability import SelfSigner
from octollm.clock import Clock
from octollm.contracts.api import Done
from octollm.contracts.session import (
    SESSION_PREFIX,
    EndSession,
    IssuerList,
    OpenSession,
    SessionAnswer,
    SessionRequest,
    WhoAmI,
)
from octollm.errors import OctoError
from octollm.resilience import Deadline
from octollm.rpc.call import About, Call, Operation
from octollm.rpc.caller import Caller, Outgoing, Target
from octollm.services.reflex.addresses import OurNames
from octollm.services.reflex.doorstep import SAFE_METHODS, port_of
from octollm.services.reflex.exchange import Exchange
from octollm.services.reflex.guessing import Guessing
from octollm.services.reflex.rate import Rate, address_bucket

T = TypeVar("T")

COOKIE = "octollm_session"
SECURE_COOKIE = "__Host-octollm_session"
"""Its name in TLS: a browser then takes it from this host alone (RFC 6265bis section 4.1.3)."""
CALL_SECONDS = 10.0


def shown_session(connection: HTTPConnection, ours: OurNames) -> str | None:
    """Return the session that a request shows in its cookie, ``None`` where it shows none.

    A browser sends a cookie by itself, so what changes something has to come from a page of ours. Raises
    ``origin_refused``.
    """
    session = connection.cookies.get(SECURE_COOKIE) or connection.cookies.get(COOKIE)
    if session is None or not session.startswith(SESSION_PREFIX):
        return None
    headers, port = connection.headers, port_of(connection.scope)
    origins = headers.getlist("origin")
    changes = connection.scope["type"] == "websocket" or connection.scope["method"] not in SAFE_METHODS
    if not ours.are_origins(origins, port) or (changes and len(origins) != 1):
        raise OctoError("A session is for pages of this server alone.", code="origin_refused")
    if _from_elsewhere(headers):
        raise OctoError("A session is for pages of this server alone.", code="origin_refused")
    return session


def _from_elsewhere(headers: Headers) -> bool:
    return any(value.strip().lower() in ("cross-site", "same-site") for value in headers.getlist("sec-fetch-site"))


class PageSessions:
    """Opens and ends sessions with the orchestrator, in the name of the door."""

    def __init__(
        self,
        caller: Caller,
        signer: SelfSigner,
        exchange: Exchange,
        ours: OurNames,
        rate: Rate,
        guessing: Guessing,
        clock: Clock,
    ) -> None:
        self._caller = caller
        self._signer = signer
        self._exchange = exchange
        self._ours = ours
        self._rate = rate
        self._guessing = guessing
        self._clock = clock

    async def open(self, call: Call, body: SessionRequest) -> Response:
        """Open a session for an API key and set its cookie."""
        request = call.request
        if not self._ours.are_origins(request.headers.getlist("origin"), port_of(request.scope)):
            raise OctoError("A session is for pages of this server alone.", code="origin_refused")
        await self._rate.hit(address_bucket(request.client.host if request.client is not None else ""))
        if (body.api_key is None) == (body.login is None):
            raise OctoError("A session is opened by an API key or by a login, one of the two.", code="invalid_body")
        wanted = OpenSession(body.api_key, body.login)
        async with self._guessing.trying(body.api_key or ""):
            answer = await self._ask("sessions.open", "/sessions", wanted, SessionAnswer)
        told = Response(
            msgspec.json.encode(WhoAmI(answer.tenant, answer.scope, session=True)), media_type="application/json"
        )
        _set_cookie(told, call, answer.session, answer.expires_in)
        return told

    async def issuers(self, call: Call, _body: object) -> IssuerList:
        """Return where a browser can log in."""
        request = call.request
        await self._rate.hit(address_bucket(request.client.host if request.client is not None else ""))
        return await self._ask("sessions.issuers", "/sessions/issuers", None, IssuerList)

    async def who(self, call: Call, _body: object) -> WhoAmI:
        """Return who the caller is."""
        held = self._exchange.held(call.bearer)
        return WhoAmI(held.tenant, held.scope, session=call.bearer.startswith(SESSION_PREFIX))

    async def end(self, call: Call, _body: object) -> Response:
        """End the session that is shown, if one is, and take its cookie away."""
        session = shown_session(call.request, self._ours)
        if session is not None:
            await self._ask("sessions.end", "/sessions/end", EndSession(session), Done)
            self._exchange.drop(session)
        told = Response(msgspec.json.encode(Done()), media_type="application/json")
        _set_cookie(told, call, "", 0)
        return told

    async def _ask(self, name: str, path: str, body: object, kind: type[T]) -> T:
        call = Outgoing(
            Target("orchestrator", name, "GET" if body is None else "POST", path, "read_only"),
            self._signer.svc_token("orchestrator"),
            Deadline.after(self._clock, CALL_SECONDS),
            None if body is None else msgspec.json.encode(body),
        )
        return await self._caller.answer(call, kind)

    def operations(self) -> list[Operation]:
        """Return the operations on ``/session``."""
        return [
            Operation(
                "session.open",
                "POST",
                "/session",
                self.open,
                auth="public",
                body=SessionRequest,
                answer=WhoAmI,
                strict=True,
                max_body=16_384,
                summary="Open a session for an API key or a login: a cookie that scripts cannot read.",
                about=About(codes=("api_key_invalid", "login_refused", "origin_refused", "rate_limited")),
            ),
            Operation(
                "session.read",
                "GET",
                "/session",
                self.who,
                auth="door",
                answer=WhoAmI,
                summary="Who the caller is.",
            ),
            Operation(
                "session.issuers",
                "GET",
                "/session/issuers",
                self.issuers,
                auth="public",
                answer=IssuerList,
                summary="Where a browser can log in.",
                about=About(codes=("rate_limited",)),
            ),
            Operation(
                "session.end",
                "DELETE",
                "/session",
                self.end,
                auth="public",
                answer=Done,
                summary="End the session.",
                about=About(codes=("origin_refused",)),
            ),
        ]


def _set_cookie(response: Response, call: Call, session: str, seconds: int) -> None:
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
