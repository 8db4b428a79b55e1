"""The rules by which the tokens of one bearer string prove each other: order, hashes, times, keys, attenuation.

They are pure functions over parsed tokens; the current time is a parameter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from octollm.capability.errors import CapabilityError
from octollm.capability.grants import DelegationTree, contains, union
from octollm.capability.jose import Jws, PublicKey, decode_jws, digest_of, pinned_root
from octollm.capability.tokens import (
    MAX_ACCESS_SECONDS,
    MAX_GRANT_SECONDS,
    MAX_PARTS,
    ROOT_ISSUER,
    SEPARATOR,
    SKEW_SECONDS,
    AccessClaims,
    GrantClaims,
    TokenClaims,
    check_times,
    parse_access_claims,
    parse_canonical_access,
    parse_grant_claims,
)
from octollm.contracts.services import service_of

_C_co = TypeVar("_C_co", bound=TokenClaims, covariant=True)


@dataclass(frozen=True, slots=True)
class ChainPart(Generic[_C_co]):
    """One parsed token of a bearer string, whose signature is not verified yet.

    ``digest`` is the SHA-256 of a grant's text, by which other parts refer to it; empty for an access token.
    """

    raw: str
    digest: str
    jws: Jws
    claims: _C_co
    embedded: PublicKey | None


@dataclass(frozen=True, slots=True)
class Chain:
    """The parts of a bearer string in their places, linked by hashes.

    ``proofs`` are the grants that ``access`` was minted under, root first; ``callee_grant`` is the callee's own.
    """

    access: ChainPart[AccessClaims]
    proofs: tuple[ChainPart[GrantClaims], ...]
    callee_grant: ChainPart[GrantClaims] | None

    @property
    def parent(self) -> ChainPart[GrantClaims] | None:
        """The grant under which the access token and the callee's grant were minted; ``None`` if a root minted them."""
        return self.proofs[-1] if self.proofs else None

    @property
    def grants(self) -> tuple[ChainPart[GrantClaims], ...]:
        """The grants, in the order of the bearer string."""
        return self.proofs if self.callee_grant is None else (*self.proofs, self.callee_grant)

    @property
    def links(self) -> tuple[AccessClaims | GrantClaims, ...]:
        """The claims of every part, in the order of the bearer string."""
        return (self.access.claims, *(part.claims for part in self.grants))

    def parts_with_parents(self) -> list[tuple[ChainPart[TokenClaims], ChainPart[GrantClaims] | None]]:
        """Return every part with the grant that proves its issuer, root first, the access token last."""
        steps: list[tuple[ChainPart[TokenClaims], ChainPart[GrantClaims] | None]] = []
        parent: ChainPart[GrantClaims] | None = None
        for proof in self.proofs:
            steps.append((proof, parent))
            parent = proof
        if self.callee_grant is not None:
            steps.append((self.callee_grant, parent))
        steps.append((self.access, parent))
        return steps


def split_bearer(bearer: str) -> list[str]:
    """Return the tokens of a bearer string whose size is already bounded; raises ``CapabilityError`` for too many."""
    tokens = bearer.split(SEPARATOR)
    if len(tokens) > MAX_PARTS:
        raise CapabilityError("too_many_parts")
    return tokens


def parse_access(raw: str) -> ChainPart[AccessClaims]:
    """Parse an access token; raises ``CapabilityError`` with a reason of a malformed token."""
    jws = decode_jws(raw, "cap+jwt", parse_canonical=parse_canonical_access)
    return ChainPart(raw, "", jws, parse_access_claims(jws.claims), _embedded(jws))


def parse_grant(raw: str) -> ChainPart[GrantClaims]:
    """Parse a grant; raises ``CapabilityError`` with a reason of a malformed token."""
    jws = decode_jws(raw, "cap-grant+jwt")
    return ChainPart(raw, digest_of(raw), jws, parse_grant_claims(jws.claims), _embedded(jws))


def _embedded(jws: Jws) -> PublicKey | None:
    return None if jws.header.jwk is None else jws.embedded_key()


def assemble_chain(access: ChainPart[AccessClaims], grants: Sequence[ChainPart[GrantClaims]]) -> Chain:
    """Link the parts by ``gnt`` and ``prf``, from the access token up to the root.

    Raises ``CapabilityError``: ``grant_mismatch``, ``proof_mismatch``, or ``part_unused`` for one too many.
    """
    proofs = list(grants)
    own: ChainPart[GrantClaims] | None = None
    if access.claims.gnt is not None:
        if not proofs or proofs[-1].digest != access.claims.gnt:
            raise CapabilityError("grant_mismatch")
        # The callee's grant is the last part. It has to be minted under the same grant as the access token.
        own = proofs.pop()
        if own.claims.prf != access.claims.prf:
            raise CapabilityError("proof_mismatch")
    expected = access.claims.prf
    for proof in reversed(proofs):
        if expected is None:
            raise CapabilityError("part_unused")
        if proof.digest != expected:
            raise CapabilityError("proof_mismatch")
        expected = proof.claims.prf
    if expected is not None:
        raise CapabilityError("proof_mismatch")
    return Chain(access, tuple(proofs), own)


def check_chain_times(chain: Chain, now: float) -> None:
    """Check every link of ``chain`` at ``now`` as :func:`check_times` does, and each against its parent."""
    for part, parent in chain.parts_with_parents():
        check_part_times(part, parent, now)


def check_part_times(part: ChainPart[TokenClaims], parent: ChainPart[GrantClaims] | None, now: float) -> None:
    """Check one link at ``now`` as :func:`check_times` does, and against its parent."""
    claims = part.claims
    longest = MAX_GRANT_SECONDS if isinstance(claims, GrantClaims) else MAX_ACCESS_SECONDS
    check_times(claims.exp, claims.nbf, claims.iat, now, longest)
    if parent is not None:
        if claims.exp > parent.claims.exp:
            raise CapabilityError("outlives_parent")
        # Clocks may differ by the skew; beyond it, a child cannot be older than its parent.
        if claims.iat < parent.claims.iat - SKEW_SECONDS:
            raise CapabilityError("older_than_parent")


def expected_key(
    part: ChainPart[TokenClaims], parent: ChainPart[GrantClaims] | None, roots: Mapping[str, PublicKey]
) -> PublicKey:
    """Return the only key that may have signed ``part``.

    That is a pinned root named by ``kid``, or the key that the parent grant confirms, embedded as ``jwk``.
    Raises ``CapabilityError``: ``key_unexpected``, ``key_missing``, ``key_mismatch`` or ``root_unknown``.
    """
    header = part.jws.header
    if parent is None:
        return pinned_root(header, roots)
    # A key named by ``kid`` would be looked up somewhere: below the root, only the parent says which key signs.
    if header.kid is not None:
        raise CapabilityError("key_unexpected")
    if part.embedded is None:
        raise CapabilityError("key_missing")
    if part.embedded.thumbprint != parent.claims.cnf.jkt:
        raise CapabilityError("key_mismatch")
    return part.embedded


def check_authority(chain: Chain, audience: str) -> None:
    """Raise ``CapabilityError`` if a link allows more than its parent, or is for another principal or task."""
    access = chain.access.claims
    if access.aud != audience:
        raise CapabilityError("audience_wrong")
    for part, parent in chain.parts_with_parents():
        _check_issuer(part.claims, parent)
        _check_same_work(part.claims, access)
        if isinstance(part.claims, GrantClaims) and not part.claims.may:
            raise CapabilityError("may_empty")
    for parent, child in zip(chain.proofs, chain.proofs[1:], strict=False):
        # The access token that accompanied an inner grant is not in the chain: the union of everything that it can
        # have allowed bounds the grant.
        allowed = [below for scope, below in parent.claims.may.items() if service_of(scope.family) == child.claims.aud]
        if not contains(_union_of(allowed), child.claims.may):
            raise CapabilityError("may_exceeds_parent")
    check_access_scopes(chain)


def check_access_claims(chain: Chain, audience: str) -> None:
    """Check the access token of a chain whose grants have passed :func:`check_authority` with another one.

    Those grants are for one work, and none allows more than its parent: the access token has to fit them, which is
    this check and :func:`check_access_scopes`.
    """
    access = chain.access.claims
    if access.aud != audience:
        raise CapabilityError("audience_wrong")
    _check_issuer(access, chain.parent)
    # One grant stands for all, since they were found to be for the same work before.
    _check_same_work(chain.grants[0].claims, access)


def _check_issuer(claims: TokenClaims, parent: ChainPart[GrantClaims] | None) -> None:
    if claims.iss != (ROOT_ISSUER if parent is None else parent.claims.aud):
        raise CapabilityError("issuer_wrong")


def check_access_scopes(chain: Chain) -> None:
    """Check that the grants allow the scopes of the access token, and the callee's grant no more than follows them."""
    access = chain.access.claims
    if any(service_of(scope.family) != access.aud for scope in access.scope):
        raise CapabilityError("scope_foreign")
    if chain.callee_grant is not None and chain.callee_grant.claims.aud != access.aud:
        raise CapabilityError("audience_wrong")
    # A root minted it, and a root's authority has no bounds that it could exceed.
    if chain.parent is None:
        return
    allowed: list[DelegationTree] = []
    for scope in access.scope:
        below = chain.parent.claims.may.subtree(scope)
        if below is None:
            raise CapabilityError("scope_exceeds_parent")
        allowed.append(below)
    if chain.callee_grant is not None and not contains(_union_of(allowed), chain.callee_grant.claims.may):
        raise CapabilityError("may_exceeds_scope")


def _check_same_work(claims: TokenClaims, access: AccessClaims) -> None:
    if (claims.sub, claims.cred, claims.tenant) != (access.sub, access.cred, access.tenant):
        raise CapabilityError("subject_differs")
    if (claims.task, claims.step, claims.attempt, claims.run) != (
        access.task,
        access.step,
        access.attempt,
        access.run,
    ):
        raise CapabilityError("task_differs")


def _union_of(trees: Sequence[DelegationTree]) -> DelegationTree:
    combined = DelegationTree()
    for tree in trees:
        combined = union(combined, tree)
    return combined
