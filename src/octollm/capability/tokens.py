"""Claims of access tokens and grants, and their form on the wire."""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from octollm.capability.errors import CapabilityError
from octollm.capability.grants import DelegationTree, parse_delegation_tree
from octollm.capability.jose import Thumbprint
from octollm.capability.scopes import Principal, ScopeSet

MAX_BEARER_CHARS = 16_384
"""Most characters of a bearer string, checked before it is parsed."""
MAX_PARTS = 8
"""Most tokens of a bearer string."""
SEPARATOR = "~"
"""Joins the tokens of a bearer string; RFC 6750 section 2.1 allows it in a bearer token."""
SKEW_SECONDS = 30.0
"""Accepted difference between two clocks."""
MAX_GRANT_SECONDS = 3_600.0
"""The longest life of a grant."""
MAX_ACCESS_SECONDS = 86_400.0
"""The longest life of an access token, and so of a revocation."""

_MAX_CACHED_SCOPE_CHARS = 256
ROUNDING_SECONDS = 0.01
"""Tolerance for times, which minting rounds to milliseconds."""

ROOT_ISSUER = "orchestrator"
"""The only service whose tokens need no grant to prove them."""

Identifier = Annotated[str, Meta(pattern=r"\A[!-~]{1,255}\Z")]
"""Printable ASCII without spaces."""
ServiceName = Annotated[str, Meta(pattern=r"\A[a-z0-9._-]{1,64}\Z")]
TokenName = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9._-]{1,128}\Z")]
NumericDate = Annotated[float, Meta(ge=0, le=253_402_300_799)]
"""NumericDate (RFC 7519 section 2): seconds since the epoch, up to the year 9999, here with milliseconds."""
Count = Annotated[int, Meta(ge=0, le=2**53 - 1)]


class TaskRef(msgspec.Struct, frozen=True):
    """The work that a token is for. ``run`` is the fencing token of the worker that holds the task.

    ``step`` and ``attempt`` are absent for work outside a step, such as planning.
    """

    task: str
    step: str | None = None
    attempt: int | None = None
    run: int | None = None


class Confirmation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``cnf`` (RFC 7800): the thumbprint of the key that the holder of a grant must prove."""

    jkt: Thumbprint


class TokenClaims(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """The claims of every link of a chain. Times are seconds since the epoch.

    ``prf`` is the SHA-256 of the grant that the token was minted under, absent when the orchestrator minted it.
    """

    iss: ServiceName
    sub: Identifier
    cred: Identifier
    tenant: Identifier
    aud: ServiceName
    exp: NumericDate
    nbf: NumericDate
    iat: NumericDate
    jti: TokenName
    task: TokenName | None = None
    step: TokenName | None = None
    attempt: Count | None = None
    run: Count | None = None
    prf: Thumbprint | None = None

    @property
    def principal(self) -> Principal:
        """The principal that the work is for."""
        return Principal(self.sub, self.cred, self.tenant)

    @property
    def task_ref(self) -> TaskRef | None:
        """The work that the token is for; ``None`` for a caller at the gateway without a task yet."""
        return None if self.task is None else TaskRef(self.task, self.step, self.attempt, self.run)


class AccessClaims(TokenClaims, frozen=True):
    """``cap+jwt``: its bearer may call ``scope`` at ``aud``.

    ``call`` is the digest of the call that the issuer was serving, for nested idempotency keys; ``gnt`` is the SHA-256
    of the grant sent with the token.
    """

    scope: ScopeSet
    call: TokenName | None = None
    gnt: Thumbprint | None = None


class GrantClaims(TokenClaims, frozen=True):
    """``cap-grant+jwt``: ``aud``, with the key of ``cnf``, may mint tokens within the tree ``may``."""

    cnf: Confirmation
    may: DelegationTree


def parse_access_claims(claims: object) -> AccessClaims:
    """Parse the claims of an access token; raises ``CapabilityError`` (``claims_malformed``)."""
    access = claims if isinstance(claims, AccessClaims) else _read(claims, AccessClaims)
    if not len(access.scope):
        raise CapabilityError("claims_malformed")
    return access


def parse_grant_claims(claims: object) -> GrantClaims:
    """Parse the claims of a grant; raises ``CapabilityError`` (``claims_malformed``)."""
    return _read(claims, GrantClaims)


def check_times(exp: float, nbf: float, iat: float, now: float, longest: float) -> None:
    """Raise ``CapabilityError`` unless a token is valid at ``now`` and lives at most ``longest`` seconds.

    A skew of :data:`SKEW_SECONDS` is tolerated; at ``exp`` itself a token is no longer valid (RFC 7519).
    """
    if now - SKEW_SECONDS >= exp:
        raise CapabilityError("expired")
    if nbf - SKEW_SECONDS > now:
        raise CapabilityError("not_yet_valid")
    if iat - SKEW_SECONDS > now:
        raise CapabilityError("issued_in_future")
    if exp - iat > longest + ROUNDING_SECONDS:
        raise CapabilityError("lives_too_long")


def parse_canonical_access(payload: bytes) -> AccessClaims | None:
    """Return the claims of an access token's payload in one pass, or ``None`` if strict parsing has to judge it.

    A payload that is byte for byte what encoding its claims gives has no member twice, no null and no unknown member,
    so that a strict parser would accept it as well, and with the same claims.
    """
    try:
        claims = _ACCESS_DECODER.decode(payload)
    except (msgspec.MsgspecError, CapabilityError, UnicodeDecodeError, RecursionError):
        return None
    if not _is_consistent(claims) or _ENCODER.encode(claims) != payload:
        return None
    return claims


def encode_claims(claims: TokenClaims) -> bytes:
    """Return the payload of a token.

    The payload is parsed back first, so that nothing is minted that a verifier would call malformed; raises
    ``CapabilityError`` (``misuse``).
    """
    payload = _ENCODER.encode(claims)
    if isinstance(claims, AccessClaims) and parse_canonical_access(payload) is not None:
        return payload
    try:
        _read(msgspec.json.decode(payload), type(claims))
    except (CapabilityError, msgspec.DecodeError) as exc:
        raise CapabilityError("misuse", "A claim of the token to be made is malformed.") from exc
    return payload


_C = TypeVar("_C", bound=TokenClaims)


def _read(claims: object, kind: type[_C]) -> _C:
    try:
        parsed = msgspec.convert(claims, kind, dec_hook=_from_plain)
    except (msgspec.ValidationError, CapabilityError) as exc:
        raise CapabilityError("claims_malformed") from exc
    if not _is_consistent(parsed):
        raise CapabilityError("claims_malformed")
    return parsed


def _is_consistent(claims: TokenClaims) -> bool:
    """Return whether a step has a task, and an attempt a step."""
    if claims.task is None:
        return claims.step is None and claims.attempt is None and claims.run is None
    return claims.step is not None or claims.attempt is None


def _to_plain(value: Any) -> object:
    if isinstance(value, ScopeSet):
        return str(value)
    if isinstance(value, DelegationTree):
        return value.to_dict()
    raise NotImplementedError(f"{type(value).__name__} is not a claim")


@lru_cache(1024)
def _parse_short_scopes(text: str) -> ScopeSet:
    return ScopeSet.parse(text)


def _from_plain(kind: type, value: Any) -> object:
    if kind is ScopeSet and isinstance(value, str):
        # Only short texts are cached, which bounds the memory of the cache as well as its entries.
        return _parse_short_scopes(value) if len(value) <= _MAX_CACHED_SCOPE_CHARS else ScopeSet.parse(value)
    if kind is DelegationTree:
        return parse_delegation_tree(value)
    raise CapabilityError("claims_malformed")


_ENCODER = msgspec.json.Encoder(enc_hook=_to_plain)
_ACCESS_DECODER = msgspec.json.Decoder(AccessClaims, dec_hook=_from_plain)
