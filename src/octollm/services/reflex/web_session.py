"""The operations on the cookie sessions of the web page.

The cookie is ``SameSite=Strict`` and ``HttpOnly``, and counts for requests of the gateway's own pages only.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec
from starlette.responses import Response

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
)
from octollm.contracts.declarations import BodyT, DeclaredOperation
from octollm.contracts.internal_operations import CLOSE_SESSION, CREATE_SESSION, LIST_LOGIN_ISSUERS
from octollm.contracts.public_api import END_SESSION, LIST_ISSUERS, OPEN_SESSION, READ_SESSION
from octollm.errors import OctoError, RemoteError
from octollm.resilience import Deadline
from octollm.rpc.call import IncomingCall, Operation, implement
from octollm.rpc.client import CallTarget, OutgoingCall, ServiceClient
from octollm.services.reflex.guard import (
    COOKIE,
    SECURE_COOKIE,
    AllowedHosts,
    get_server_port,
    read_session_cookie,
)
from octollm.services.reflex.throttle import FailedLoginThrottle, RateLimiter, get_address_bucket
from octollm.services.reflex.upstream import TokenExchangeClient, raise_unless_refused

T = TypeVar("T")

CALL_SECONDS = 10.0


class SessionHandlers:
    """Opens and ends sessions at the orchestrator, with the gateway's own service token."""

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
        # Otherwise a foreign page could log the browser in as somebody else (login CSRF).
        if not self._allowed_hosts.are_own_origins(request.headers.getlist("origin"), get_server_port(request.scope)):
            raise OctoError("Only pages of this server may use a session.", code="origin_refused")
        await self._rate_limiter.hit(get_address_bucket(request.client.host if request.client is not None else ""))
        if (body.api_key is None) == (body.login is None):
            raise OctoError("A session needs either an API key or a login.", code="invalid_body")
        credentials = CreateSessionRequest(body.api_key, body.login)
        # This operation is public, so a session could otherwise be used to guess keys without the delay.
        async with self._throttle.attempt(body.api_key or ""):
            session = await self._request(CREATE_SESSION, credentials)
        user = CurrentUser(session.tenant, session.scope, session=True)
        response = Response(msgspec.json.encode(user), media_type="application/json")
        _set_cookie(response, call, session.session, session.expires_in)
        return response

    async def list_issuers(self, call: IncomingCall, _body: object) -> IssuerList:
        """Return where a browser can log in."""
        request = call.request
        await self._rate_limiter.hit(get_address_bucket(request.client.host if request.client is not None else ""))
        return await self._request(LIST_LOGIN_ISSUERS, None)

    async def read(self, call: IncomingCall, _body: object) -> CurrentUser:
        """Return who the caller is."""
        # Not what the authentication has cached: another request may have dropped that as stale.
        cached = await self._exchange.get_valid(call.bearer)
        return CurrentUser(cached.tenant, cached.scope, session=call.bearer.startswith(SESSION_TOKEN_PREFIX))

    async def end(self, call: IncomingCall, _body: object) -> Response:
        """End the session of the request, if it has one, and delete its cookie."""
        session = read_session_cookie(call.request, self._allowed_hosts)
        if session is not None:
            await self._request(CLOSE_SESSION, EndSessionRequest(session))
            self._exchange.invalidate(session)
        response = Response(msgspec.json.encode(Acknowledgement()), media_type="application/json")
        _set_cookie(response, call, "", 0)
        return response

    async def _request(self, declared: DeclaredOperation[BodyT, T], body: BodyT) -> T:
        call = OutgoingCall(
            CallTarget.of(declared),
            self._signer.sign_token("orchestrator"),
            Deadline.after(self._clock, CALL_SECONDS),
            None if body is None else msgspec.json.encode(body),
        )
        try:
            return await self._caller.call(call, declared.response)
        except RemoteError as error:
            if error.status != 400:
                raise_unless_refused(error)
            raise

    def operations(self) -> list[Operation]:
        """Return the operations on ``/session``."""
        return [
            implement(OPEN_SESSION, self.open, auth="public"),
            implement(READ_SESSION, self.read, auth="gateway"),
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
