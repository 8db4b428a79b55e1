"""Credentials of the public API: API keys, access tokens, browser sessions, OpenID Connect logins, revocations."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

API_KEY_PREFIX = "octo_"
"""An API key is ``octo_<id>_<secret>``."""
LOCAL_KEY_ID = "local"
"""The id of the API key of an installation's owner."""
SESSION_TOKEN_PREFIX = "octosess_"
SESSION_LIFETIME_SECONDS = 12 * 3600


class LoginCode(msgspec.Struct, frozen=True):
    """An authorization code from the redirect of an OpenID Connect issuer, with the browser's PKCE secret.

    ``verifier`` is the code verifier of RFC 7636 section 4.1; ``nonce`` must be in the ID token for the code.
    """

    issuer: Annotated[str, Meta(min_length=1, max_length=512)]
    code: Annotated[str, Meta(min_length=1, max_length=4096)]
    verifier: Annotated[str, Meta(pattern=r"\A[A-Za-z0-9._~-]{43,128}\Z")]
    nonce: Annotated[str, Meta(min_length=16, max_length=128)]
    redirect_uri: Annotated[str, Meta(min_length=1, max_length=512)]


class SessionRequest(msgspec.Struct, frozen=True):
    """``POST /session``: either an API key (or an issuer's token), or the authorization code of a login."""

    api_key: Annotated[str, Meta(min_length=1, max_length=8192)] | None = None
    login: LoginCode | None = None


class IssuerView(msgspec.Struct, frozen=True):
    """An OpenID Connect issuer: its authorization endpoint, and this installation's client id there."""

    url: str
    client_id: str
    authorization_endpoint: str


class IssuerList(msgspec.Struct, frozen=True):
    """``GET /session/issuers``: the issuers that can be reached now."""

    issuers: tuple[IssuerView, ...]


class CurrentUser(msgspec.Struct, frozen=True):
    """``GET /session``: the authenticated caller."""

    tenant: str
    scope: str
    session: bool = False
    """The caller uses a session, which can be ended."""


class CreateSessionRequest(msgspec.Struct, frozen=True):
    """``POST orchestrator/sessions`` by the gateway: the credential that a session is opened for."""

    subject_token: Annotated[str, Meta(min_length=1, max_length=8192)] | None = None
    login: LoginCode | None = None


class EndSessionRequest(msgspec.Struct, frozen=True):
    """``POST orchestrator/sessions/end`` by the gateway."""

    session: Annotated[str, Meta(min_length=1, max_length=512)]


class SessionResponse(msgspec.Struct, frozen=True):
    """An open session: its credential, which only the cookie carries, and its lifetime in seconds."""

    session: str
    expires_in: int
    tenant: str
    scope: str


MAX_REVOCATION_BATCH = 500
"""Revocations in one line of the stream."""

_RevocationText = Annotated[str, Meta(max_length=512)]


class RevocationView(msgspec.Struct, frozen=True):
    """Revokes token chains of ``tenant`` with a matching link issued at or before ``at`` (epoch seconds).

    The kinds ``jti``, ``task`` and ``run`` revoke regardless of time, since their values are never reused.
    """

    kind: Literal["jti", "task", "run", "sub", "cred", "aud"]
    value: _RevocationText
    at: float
    tenant: _RevocationText


class RevocationRequest(msgspec.Struct, frozen=True):
    """Revokes a token of the caller's tenant by ``jti``, or all delegations to a principal or service until now."""

    kind: Literal["jti", "sub", "aud"]
    value: Annotated[str, Meta(min_length=1, max_length=255)]


class RevocationList(msgspec.Struct, frozen=True):
    """All revocations in force. Every token issued at or before ``floor`` is revoked."""

    revocations: tuple[RevocationView, ...]
    floor: float | None = None


class RevocationUpdate(msgspec.Struct, frozen=True, omit_defaults=True):
    """A line of the stream: first all revocations in force, ending with a ``whole`` line, then new ones as they come.

    An empty line is a heartbeat: the orchestrator is up to date, and nothing is new.
    """

    revocations: Annotated[tuple[RevocationView, ...], Meta(max_length=MAX_REVOCATION_BATCH)] = ()
    floor: float | None = None
    whole: bool = False


class DirectoryResponse(msgspec.Struct, frozen=True):
    """The body of ``GET orchestrator/directory``: a ``dir+jwt``."""

    directory: str


class TokenRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """``POST /token`` at the gateway: a token for direct calls, which belong to an ad-hoc task of their own."""

    scope: str
    aud: str
    lifetime_seconds: int = 3600


class TokenResponse(msgspec.Struct, frozen=True):
    """An access token and its lifetime in seconds, in the form of RFC 6749 section 5.1."""

    access_token: str
    expires_in: int
    scope: str
    task_id: str = ""
    token_type: Literal["Bearer"] = "Bearer"
    issued_token_type: str = "urn:ietf:params:oauth:token-type:access_token"
    tenant: str = ""


class KeyRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """``POST /keys``: ``scope`` has presets (``user``, ``admin``) and scopes, separated by spaces.

    ``tenant`` defaults to the caller's own. Only the installation's first tenant creates keys of other tenants.
    """

    name: str
    scope: str = "user"
    tenant: Annotated[str, Meta(pattern=r"\A[a-z0-9][a-z0-9._-]{0,62}\Z")] | None = None


class KeyView(msgspec.Struct, frozen=True):
    """An API key without its secret."""

    id: str
    name: str
    tenant: str
    scope: str
    created_at: str
    revoked_at: str | None = None
    last_used_at: str | None = None


class NewKey(msgspec.Struct, frozen=True):
    """A new API key: ``secret`` is shown once."""

    key: KeyView
    secret: str


class KeyList(msgspec.Struct, frozen=True):
    """All API keys of the tenant."""

    keys: tuple[KeyView, ...]


class TokenExchangeRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """``POST orchestrator/token``: RFC 8693 token exchange, by the gateway with its service token."""

    subject_token: str
    subject_token_type: Literal["urn:octollm:api-key"] = "urn:octollm:api-key"
    grant_type: str = "urn:ietf:params:oauth:grant-type:token-exchange"
    audience: Literal["orchestrator", "memory", "monitor"] = "orchestrator"
    """The service that the gateway forwards the call to."""
