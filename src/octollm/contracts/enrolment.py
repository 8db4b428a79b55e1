"""Messages between an arm and the orchestrator: enrolment, key rotation, heartbeat, and the enrolment tokens."""

from __future__ import annotations

import msgspec


class EnrolmentNonce(msgspec.Struct, frozen=True):
    """``POST orchestrator/arms/nonce``: what a join has to name; it can be used once, for ``expires_in`` seconds."""

    nonce: str
    expires_in: int


class EnrolmentRequest(msgspec.Struct, frozen=True):
    """``POST orchestrator/arms/join``: an arm asks to be known by its key.

    ``join`` is the id of its secret, ``jwk`` its public key (RFC 8037), ``calls`` the scopes that it calls directly,
    ``proof`` the HMAC of all that.
    """

    join: str
    name: str
    jwk: dict[str, str]
    calls: tuple[str, ...]
    nonce: str
    proof: str


class EnrolmentResponse(msgspec.Struct, frozen=True):
    """The root keys that the arm may trust, and the proof that they come from who made its secret."""

    roots: tuple[dict[str, str], ...]
    proof: str


class KeyRotation(msgspec.Struct, frozen=True):
    """``POST orchestrator/arms/keys``: a new key of an arm, asked for with a token that an old one signed.

    ``proof`` is the new key's signature over the arm's name and the new thumbprint, base64url.
    """

    jwk: dict[str, str]
    proof: str


class InstanceRef(msgspec.Struct, frozen=True):
    """``POST orchestrator/arms/heartbeat`` and ``…/leave``: which process of the arm speaks."""

    instance: str


class EnrolmentTokenRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """``POST /joins``: make a join secret. Scopes that begin with ``?`` may be declared as optional calls."""

    name: str
    calls: tuple[str, ...] = ()
    lifetime_seconds: int = 86_400


class EnrolmentTokenView(msgspec.Struct, frozen=True):
    """A join secret without what is secret. ``state``: ``good``, ``expired`` or ``revoked``."""

    id: str
    name: str
    calls: tuple[str, ...]
    tenant: str
    created_at: str
    expires_at: str
    state: str
    used_at: str | None = None


class NewEnrolmentToken(msgspec.Struct, frozen=True):
    """A new join secret: ``secret`` is shown once."""

    join: EnrolmentTokenView
    secret: str


class EnrolmentTokenList(msgspec.Struct, frozen=True):
    """The join secrets of the tenant, newest first."""

    joins: tuple[EnrolmentTokenView, ...]
