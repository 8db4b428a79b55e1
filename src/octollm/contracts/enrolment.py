"""Messages about arms: the list of arms, and enrolment, key rotation, registration and heartbeat of an arm."""

from __future__ import annotations

import msgspec


class EnrolmentNonce(msgspec.Struct, frozen=True):
    """``POST orchestrator/arms/nonce``: a nonce for one enrolment, valid for ``expires_in`` seconds."""

    nonce: str
    expires_in: int


class EnrolmentRequest(msgspec.Struct, frozen=True):
    """``POST orchestrator/arms/join``: an arm enrols its public key.

    ``join`` is the id of its enrolment token, ``jwk`` the public key (RFC 8037), ``calls`` the scopes that it calls
    directly, and ``proof`` an HMAC over all of these.
    """

    join: str
    name: str
    jwk: dict[str, str]
    calls: tuple[str, ...]
    nonce: str
    proof: str


class EnrolmentResponse(msgspec.Struct, frozen=True):
    """The root keys to trust, and the proof that the issuer of the enrolment token sent them."""

    roots: tuple[dict[str, str], ...]
    proof: str


class KeyRotation(msgspec.Struct, frozen=True):
    """``POST orchestrator/arms/keys``: a new key of an arm; the request's token is signed by the old one.

    ``proof`` is the new key's signature over the arm's name and the new thumbprint, base64url.
    """

    jwk: dict[str, str]
    proof: str


class InstanceRef(msgspec.Struct, frozen=True):
    """``POST orchestrator/arms/heartbeat`` and ``…/leave``: the process of the arm that calls."""

    instance: str


class EnrolmentTokenRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """``POST /joins``: create an enrolment token. ``?`` before a scope admits it as an optional call."""

    name: str
    calls: tuple[str, ...] = ()
    lifetime_seconds: int = 86_400


class EnrolmentTokenView(msgspec.Struct, frozen=True):
    """An enrolment token without its secret. ``state`` is ``good``, ``expired`` or ``revoked``."""

    id: str
    name: str
    calls: tuple[str, ...]
    tenant: str
    created_at: str
    expires_at: str
    state: str
    used_at: str | None = None


class NewEnrolmentToken(msgspec.Struct, frozen=True):
    """A new enrolment token: ``secret`` is shown once."""

    join: EnrolmentTokenView
    secret: str


class EnrolmentTokenList(msgspec.Struct, frozen=True):
    """The enrolment tokens of the tenant, newest first."""

    joins: tuple[EnrolmentTokenView, ...]


class ArmView(msgspec.Struct, frozen=True):
    """A registered arm."""

    name: str
    description: str
    operations: tuple[str, ...]
    calls: tuple[str, ...]
    url: str
    registered_at: str
    state: str = "healthy"
    urls: tuple[str, ...] = ()
    """The URL of each of its processes."""


class ArmList(msgspec.Struct, frozen=True):
    """All arms of the tenant."""

    arms: tuple[ArmView, ...]


class ArmRegistration(msgspec.Struct, frozen=True, omit_defaults=True):
    """``POST orchestrator/arms/register`` by an arm at its start; its name is that of its service token.

    ``instance`` names the process among the arm's replicas, and ``url`` is its address. ``about`` describes each
    operation in a sentence. A call that begins with ``?`` is optional. ``calls`` are those of all operations together;
    ``operation_calls`` has the calls of the operations that declare their own. ``approval`` is why a person has to
    approve each step of the arm; empty if nobody has to.
    """

    description: str
    operations: tuple[str, ...]
    calls: tuple[str, ...]
    accepts: tuple[str, ...]
    url: str
    instance: str = ""
    about: dict[str, str] = {}
    operation_calls: dict[str, tuple[str, ...]] = {}
    approval: str = ""
