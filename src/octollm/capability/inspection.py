"""Inspection of a bearer string: each hop of its chain, what it attenuated, and why a service would refuse it.

Inspecting proves nothing: signatures are checked only by :func:`find_refusal_reason`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from octollm.capability.chain import Chain, ChainPart, assemble_chain, parse_access, parse_grant, split_bearer
from octollm.capability.errors import REASON_TEXTS, CapabilityError
from octollm.capability.grants import DelegationTree
from octollm.capability.jose import PublicKey
from octollm.capability.revocations import Revocations
from octollm.capability.tokens import MAX_BEARER_CHARS, AccessClaims, GrantClaims, TaskRef, TokenClaims
from octollm.capability.verification import Verifier
from octollm.clock import Clock
from octollm.contracts.services import service_of


@dataclass(frozen=True, slots=True)
class Hop:
    """One link: ``issuer`` granted ``holder`` the paths in ``allows``, until ``expires`` (epoch seconds).

    ``dropped`` lists what its parent allows and this link does not. ``hops`` is the number of calls that may follow;
    an access token alone allows none.
    """

    kind: str
    issuer: str
    holder: str
    allows: tuple[str, ...]
    dropped: tuple[str, ...]
    hops: int
    issued: float
    expires: float
    jti: str
    key: str


@dataclass(frozen=True, slots=True)
class Inspection:
    """The claims of a bearer string, unproved; its hops are root first, the access token last."""

    subject: str
    credential: str
    tenant: str
    task: TaskRef | None
    audience: str
    hops: tuple[Hop, ...]
    chars: int


def inspect(bearer: str) -> Inspection:
    """Return the claims of a bearer string. Raises ``CapabilityError`` for a text that is not a chain."""
    chain = read_chain(bearer)
    access = chain.access.claims
    return Inspection(
        access.sub,
        access.cred,
        access.tenant,
        access.task_ref,
        access.aud,
        tuple(_hop(part, parent) for part, parent in chain.parts_with_parents()),
        len(bearer),
    )


def read_chain(bearer: str) -> Chain:
    """Parse a bearer string without verifying it; raises ``CapabilityError`` for a text that is not a chain."""
    if not bearer:
        raise CapabilityError("bearer_missing")
    if len(bearer) > MAX_BEARER_CHARS:
        raise CapabilityError("bearer_too_large")
    if not bearer.isascii():
        raise CapabilityError("bearer_malformed")
    access, *grants = split_bearer(bearer)
    return assemble_chain(parse_access(access), [parse_grant(text) for text in grants])


def find_refusal_reason(
    bearer: str, service: str, roots: Mapping[str, PublicKey], clock: Clock, revocations: Revocations | None = None
) -> str | None:
    """Return the reason for which ``service`` would refuse ``bearer`` now, or ``None`` if it would accept it.

    Revocation counts only with ``revocations``.
    """
    try:
        Verifier(service, roots, clock, cache_size=1, revocations=revocations).verify(bearer)
    except CapabilityError as error:
        return error.reason
    return None


def explain_reason(reason: str) -> str:
    """Return one sentence that explains a reason of :data:`~octollm.capability.REASONS`."""
    return REASON_TEXTS[reason]


def _hop(part: ChainPart[TokenClaims], parent: ChainPart[GrantClaims] | None) -> Hop:
    claims = part.claims
    grant = isinstance(claims, GrantClaims)
    return Hop(
        "grant" if grant else "access",
        claims.iss,
        claims.aud,
        _allowed_paths(claims),
        () if parent is None else _dropped(parent.claims.may, claims),
        claims.may.depth if grant else 0,
        claims.iat,
        claims.exp,
        claims.jti,
        part.embedded.thumbprint if part.embedded is not None else part.jws.header.kid or "",
    )


def _dropped(may: DelegationTree, claims: TokenClaims) -> tuple[str, ...]:
    """Return the paths that the parent allows and this link does not."""
    if isinstance(claims, GrantClaims):
        # A grant says what may follow its own call, so entries for other services end at this hop.
        others = [scope.text for scope in may if service_of(scope.family) != claims.aud]
        under = [below for scope, below in may.items() if service_of(scope.family) == claims.aud]
        paths = dict.fromkeys(path for tree in under for path in _paths(tree))
        return (*others, *(path for path in paths if path not in _paths(claims.may)))
    allowed = _allowed_paths(claims)
    return tuple(scope.text for scope in may if scope.text not in allowed)


def _allowed_paths(claims: TokenClaims) -> tuple[str, ...]:
    if isinstance(claims, GrantClaims):
        return _paths(claims.may)
    return tuple(scope.text for scope in claims.scope) if isinstance(claims, AccessClaims) else ()


def _paths(may: DelegationTree) -> tuple[str, ...]:
    """Return every path of calls that a tree allows, such as ``judge:validate > executor:run``, parents first."""
    paths: list[str] = []
    for scope, under in may.items():
        paths.append(scope.text)
        paths += [f"{scope.text} > {path}" for path in _paths(under)]
    return tuple(paths)
