"""A session of the page: a cookie that its scripts cannot read, for a row that can be ended."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

SESSION_TOKEN_PREFIX = "octosess_"
SESSION_LIFETIME_SECONDS = 12 * 3600


class LoginCode(msgspec.Struct, frozen=True):
    """What an OpenID Connect issuer sent the browser back with, and the secret that only this browser knows.

    ``verifier`` is that of RFC 7636 section 4.1; ``nonce`` stands in the login that the code is good for.
    """

    issuer: Annotated[str, Meta(min_length=1, max_length=512)]
    code: Annotated[str, Meta(min_length=1, max_length=4096)]
    verifier: Annotated[str, Meta(pattern=r"\A[A-Za-z0-9._~-]{43,128}\Z")]
    nonce: Annotated[str, Meta(min_length=16, max_length=128)]
    redirect_uri: Annotated[str, Meta(min_length=1, max_length=512)]


class SessionRequest(msgspec.Struct, frozen=True):
    """``POST /session``: an API key (or a login by an issuer, as a token), or the code of a login; one of the two."""

    api_key: Annotated[str, Meta(min_length=1, max_length=8192)] | None = None
    login: LoginCode | None = None


class IssuerView(msgspec.Struct, frozen=True):
    """An issuer at which one can log in: where the browser goes, and our client id there."""

    url: str
    client_id: str
    authorization_endpoint: str


class IssuerList(msgspec.Struct, frozen=True):
    """``GET /session/issuers``: those that answer just now."""

    issuers: tuple[IssuerView, ...]


class CurrentUser(msgspec.Struct, frozen=True):
    """``GET /session``: who the caller is at the door."""

    tenant: str
    scope: str
    session: bool = False
    """It is shown a session, which can be ended."""


class CreateSessionRequest(msgspec.Struct, frozen=True):
    """``POST orchestrator/sessions`` by the public door: the credential that a session is opened for."""

    subject_token: Annotated[str, Meta(min_length=1, max_length=8192)] | None = None
    login: LoginCode | None = None


class EndSessionRequest(msgspec.Struct, frozen=True):
    """``POST orchestrator/sessions/end`` by the public door."""

    session: Annotated[str, Meta(min_length=1, max_length=512)]


class SessionResponse(msgspec.Struct, frozen=True):
    """A session that was opened: its credential, which goes into the cookie alone, and how long it lasts (seconds)."""

    session: str
    expires_in: int
    tenant: str
    scope: str
