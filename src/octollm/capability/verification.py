"""Verification of bearer strings up to a pinned root, without the network.

Three LRU caches make it fast and change no verdict: verdicts by the whole bearer string, the grants of a bearer string
together (an access token minted for each call then costs one signature), and single grants.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from octollm.capability.chain import (
    Chain,
    ChainPart,
    assemble_chain,
    check_access_claims,
    check_access_scopes,
    check_authority,
    check_chain_times,
    check_part_times,
    expected_key,
    parse_access,
    parse_grant,
    split_bearer,
)
from octollm.capability.errors import CapabilityError
from octollm.capability.jose import PublicKey, digest_of
from octollm.capability.revocations import Revocations
from octollm.capability.scopes import Principal, Scope, ScopeSet
from octollm.capability.tokens import (
    MAX_BEARER_CHARS,
    SEPARATOR,
    SKEW_SECONDS,
    AccessClaims,
    GrantClaims,
    TaskRef,
)
from octollm.clock import Clock
from octollm.lru import LruCache

_HASH_CHUNK = 2000
_MAX_FITTING_SCOPES = 64


@dataclass(frozen=True, slots=True)
class VerifiedChain:
    """What a bearer string proved. ``links`` are the claims of every part: the access token, then the grants.

    ``grant`` is this service's own, under which it may call on; ``grants`` are the texts to pass on then, root first
    and ``grant`` last. ``expires`` is when the first link expires, in seconds since the epoch.
    """

    subject: str
    cred: str
    tenant: str
    issuer: str
    scopes: ScopeSet
    task: TaskRef | None
    call: str | None
    expires: float
    links: tuple[AccessClaims | GrantClaims, ...]
    grant: GrantClaims | None
    grants: tuple[str, ...]

    @property
    def principal(self) -> Principal:
        """The principal that the work is for."""
        return Principal(self.subject, self.cred, self.tenant)

    @property
    def is_delegated(self) -> bool:
        """Return whether another service made the access token, under a grant: the orchestrator makes the others."""
        return any(isinstance(link, GrantClaims) and link != self.grant for link in self.links)

    def require(self, scope: str | Scope) -> None:
        """Raise ``CapabilityError`` (code ``scope_missing``), naming ``scope``, unless the token allows it."""
        if not self.scopes.allows(scope):
            raise CapabilityError("scope_not_allowed", f"The bearer token does not allow {scope}.")


@dataclass(slots=True)
class _Conditions:
    """What must still hold when a cached result is used again.

    ``expires`` and ``not_before`` are those of its links together, in seconds since the epoch; ``revocations`` is the
    version of the set of revocations that ``links`` were last checked against.
    """

    links: tuple[AccessClaims | GrantClaims, ...]
    expires: float
    not_before: float
    roots: tuple[PublicKey, ...]
    revocations: int


@dataclass(slots=True)
class _Verdict:
    """The cached result of a whole bearer string."""

    verified: VerifiedChain
    conditions: _Conditions


@dataclass(frozen=True, slots=True)
class _VerifiedGrants:
    """The grants of a bearer string that passed every check except those against an access token."""

    grants: tuple[ChainPart[GrantClaims], ...]
    conditions: _Conditions
    fitting_scopes: set[str] = field(default_factory=set[str])
    """Scopes of access tokens that fitted these grants."""


@dataclass(frozen=True, slots=True)
class _KnownGrant:
    """A grant whose signature by ``key`` was verified; everything else is checked each time."""

    part: ChainPart[GrantClaims]
    key: PublicKey


class Verifier:
    """Verifies bearer strings for the service ``audience``.

    ``roots`` maps thumbprints to the pinned root keys; it is read at each call, so that a root removed from it is no
    longer trusted, in the caches neither. ``revocations`` is shared with the subscriber that keeps it up to date.
    Verdicts are cached by the SHA-256 of the whole bearer string, sets of grants by that of their texts, and grants by
    their own. Times, roots and revocations are checked at every use. ``cache_size`` bounds each cache.
    """

    def __init__(
        self,
        audience: str,
        roots: Mapping[str, PublicKey],
        clock: Clock,
        cache_size: int = 4096,
        revocations: Revocations | None = None,
    ) -> None:
        self.audience = audience
        self.revocations = Revocations() if revocations is None else revocations
        self._roots = roots
        self._clock = clock
        self._verdicts: LruCache[bytes, _Verdict] = LruCache(cache_size)
        self._verified_grants: LruCache[bytes, _VerifiedGrants] = LruCache(cache_size)
        self._grants: LruCache[str, _KnownGrant] = LruCache(cache_size)

    def verify(self, bearer: str | None) -> VerifiedChain:
        """Return what ``bearer``, the text after ``Bearer`` in the header, proves at this moment.

        Raises ``CapabilityError`` with code ``token_missing``, ``token_malformed``, ``token_expired``,
        ``token_invalid`` or ``token_revoked``, and no other exception, whatever the text.
        """
        if not bearer:
            raise CapabilityError("bearer_missing")
        # Before any work on the text: refusing a megabyte costs nothing.
        if len(bearer) > MAX_BEARER_CHARS:
            raise CapabilityError("bearer_too_large")
        try:
            key = _digest(bearer.encode("ascii"))
        except UnicodeEncodeError:
            raise CapabilityError("bearer_malformed") from None
        entry = self._verdicts.get(key)
        if entry is not None and self._has_trusted_roots(entry.conditions):
            try:
                self._recheck(entry.conditions)
            except CapabilityError:
                self._verdicts.pop(key)
                raise
            return entry.verified
        entry = self._verify_uncached(bearer)
        self._verdicts.put(key, entry)
        return entry.verified

    def _has_trusted_roots(self, conditions: _Conditions) -> bool:
        for root in conditions.roots:  # noqa: SIM110  once a call: a generator would double its cost
            if self._roots.get(root.thumbprint) != root:
                return False
        return True

    def _recheck(self, conditions: _Conditions) -> None:
        now = self._clock.now()
        if now - SKEW_SECONDS >= conditions.expires:
            raise CapabilityError("expired")
        if conditions.not_before - SKEW_SECONDS > now:
            raise CapabilityError("not_yet_valid")
        if conditions.revocations != self.revocations.version:
            if self.revocations.is_revoked(conditions.links):
                raise CapabilityError("revoked")
            conditions.revocations = self.revocations.version

    def _verify_uncached(self, bearer: str) -> _Verdict:
        access_text, _, grants_text = bearer.partition(SEPARATOR)
        access = parse_access(access_text)
        # With ``gnt`` the last grant is the callee's own, else it proves the issuer: other checks were passed then.
        key = _digest(grants_text.encode("ascii")) + (b"-" if access.claims.gnt is None else b"+")
        cached = self._verified_grants.get(key)
        if cached is not None and self._has_trusted_roots(cached.conditions):
            return self._verify_access(assemble_chain(access, cached.grants), cached)
        texts = split_bearer(bearer)[1:]
        chain = assemble_chain(access, [self._read_grant(text) for text in texts])
        # Refusing by unverified times is always safe, and saves the signatures of what has merely expired.
        check_chain_times(chain, self._clock.now())
        keys = self._check_signatures(chain)
        check_authority(chain, self.audience)
        if self.revocations.is_revoked(chain.links):
            raise CapabilityError("revoked")
        # After every check: a chain that is refused leaves nothing in the caches.
        for grant in chain.grants:
            self._grants.put(grant.digest, _KnownGrant(grant, keys[grant.digest]))
        roots = tuple(keys[part.digest] for part, parent in chain.parts_with_parents() if parent is None)
        conditions = self._conditions(chain.links, roots)
        if chain.grants:
            of_grants = self._conditions(chain.links[1:], roots)
            self._verified_grants.put(key, _VerifiedGrants(chain.grants, of_grants))
        return _Verdict(_to_verified(chain, conditions), conditions)

    def _verify_access(self, chain: Chain, cached: _VerifiedGrants) -> _Verdict:
        """Verify the access token of a chain with verified grants: it alone is new."""
        access, conditions = chain.access, cached.conditions
        claims = access.claims
        # Times and revocations before the signature, as above: a refusal by unverified claims is always safe.
        check_part_times(access, chain.parent, self._clock.now())
        self._recheck(conditions)
        key = expected_key(access, chain.parent, self._roots)
        access.jws.check_signature(key)
        check_access_claims(chain, self.audience)
        # Whether a scope fits depends on the grants alone: the same call is made under them over and over.
        scopes = str(claims.scope)
        if scopes not in cached.fitting_scopes:
            check_access_scopes(chain)
            if len(cached.fitting_scopes) < _MAX_FITTING_SCOPES:
                cached.fitting_scopes.add(scopes)
        if self.revocations.is_revoked((claims,)):
            raise CapabilityError("revoked")
        conditions = _Conditions(
            (claims, *conditions.links),
            min(conditions.expires, claims.exp),
            max(conditions.not_before, claims.nbf, claims.iat),
            (*conditions.roots, key) if chain.parent is None else conditions.roots,
            self.revocations.version,
        )
        return _Verdict(_to_verified(chain, conditions), conditions)

    def _conditions(self, links: tuple[AccessClaims | GrantClaims, ...], roots: tuple[PublicKey, ...]) -> _Conditions:
        return _Conditions(
            links,
            expires=min(link.exp for link in links),
            not_before=max(max(link.nbf, link.iat) for link in links),
            roots=roots,
            revocations=self.revocations.version,
        )

    def _read_grant(self, text: str) -> ChainPart[GrantClaims]:
        cached = self._grants.get(digest_of(text))
        return parse_grant(text) if cached is None else cached.part

    def _check_signatures(self, chain: Chain) -> dict[str, PublicKey]:
        """Return each part's key by its digest; raise unless every part is signed by the only key that may sign it.

        It goes from the root down, so that a forger without a root's signature costs one check and no more.
        """
        keys: dict[str, PublicKey] = {}
        for part, parent in chain.parts_with_parents():
            key = expected_key(part, parent, self._roots)
            cached = self._grants.get(part.digest)
            # A signature counts for the key that made it: under another parent the grant is verified again.
            if cached is None or cached.key != key:
                part.jws.check_signature(key)
            keys[part.digest] = key
        return keys


def _to_verified(chain: Chain, conditions: _Conditions) -> VerifiedChain:
    access = chain.access.claims
    own = chain.callee_grant
    return VerifiedChain(
        subject=access.sub,
        cred=access.cred,
        tenant=access.tenant,
        issuer=access.iss,
        scopes=access.scope,
        task=access.task_ref,
        call=access.call,
        expires=conditions.expires,
        links=conditions.links,
        grant=None if own is None else own.claims,
        grants=() if own is None else tuple(part.raw for part in chain.grants),
    )


def _digest(bearer: bytes) -> bytes:
    """Return the SHA-256 of a bearer string.

    It is hashed in parts: from 2 KiB on hashlib releases the GIL, and getting it back takes longer than the hash.
    """
    digest = hashlib.sha256(bearer[:_HASH_CHUNK])
    for start in range(_HASH_CHUNK, len(bearer), _HASH_CHUNK):
        digest.update(bearer[start : start + _HASH_CHUNK])
    return digest.digest()
