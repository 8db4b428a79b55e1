"""Credentials of the public API: API keys, tokens, browser sessions, OpenID Connect logins, revocations."""

from __future__ import annotations

from typing import Annotated, Literal

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


MAX_REVOCATION_BATCH = 500
"""Revocations of one line of the stream."""

_RevocationText = Annotated[str, Meta(max_length=512)]


class RevocationView(msgspec.Struct, frozen=True):
    """Refuses chains of ``tenant`` with a matching link issued at or before ``at`` (epoch seconds).

    For the kinds ``jti``, ``task`` and ``run``, whose values never come back, the time does not matter.
    """

    kind: Literal["jti", "task", "run", "sub", "cred", "aud"]
    value: _RevocationText
    at: float
    tenant: _RevocationText


class RevocationRequest(msgspec.Struct, frozen=True):
    """What to revoke of one's tenant: a token by its ``jti``, or what a principal or a service was lent until now."""

    kind: Literal["jti", "sub", "aud"]
    value: Annotated[str, Meta(min_length=1, max_length=255)]


class RevocationList(msgspec.Struct, frozen=True):
    """All revocations that still matter. What was issued at or before ``floor`` is refused whatever it names."""

    revocations: tuple[RevocationView, ...]
    floor: float | None = None


class RevocationUpdate(msgspec.Struct, frozen=True, omit_defaults=True):
    """A line of the stream. First come all that are in force, the last of them ``whole``; then each as it is made.

    A line without any says that there is nothing new, and that the orchestrator itself knows what is.
    """

    revocations: Annotated[tuple[RevocationView, ...], Meta(max_length=MAX_REVOCATION_BATCH)] = ()
    floor: float | None = None
    whole: bool = False
