"""Verification of bearer strings up to a pinned root, offline, with an LRU of verdicts and of verified grants."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from octollm.capability.chain import (
    Chain,
    ChainPart,
    assemble_chain,
    check_authority,
    check_chain_times,
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
    SKEW_SECONDS,
    AccessClaims,
    GrantClaims,
    TaskRef,
)
from octollm.clock import Clock

_V = TypeVar("_V")
_HASH_CHUNK = 2000


@dataclass(frozen=True, slots=True)
class VerifiedChain:
    """What a bearer string proved. ``links`` are the claims of every part, access token first, then root first.

    ``grant`` is this service's own, under which it may call on; ``grants`` are then the texts to pass on: those
    that prove ``grant``, and ``grant`` itself. ``expires`` is when the first link does, in seconds since the epoch.
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
        """Return whom the work is for."""
        return Principal(self.subject, self.cred, self.tenant)

    def require(self, scope: str | Scope) -> None:
        """Raise ``CapabilityError`` (code ``scope_missing``), naming ``scope``, unless the token allows it."""
        if not self.scopes.allows(scope):
            raise CapabilityError("scope_not_allowed", f"The bearer token does not allow {scope}.")


class _LruCache(Generic[_V]):
    """A dictionary that lets go of what was not used for longest."""

    def __init__(self, size: int) -> None:
        self._items: OrderedDict[bytes | str, _V] = OrderedDict()
        self._size = size

    def get(self, key: bytes | str) -> _V | None:
        found = self._items.get(key)
        if found is not None:
            self._items.move_to_end(key)
        return found

    def put(self, key: bytes | str, value: _V) -> None:
        self._items[key] = value
        self._items.move_to_end(key)
        if len(self._items) > self._size:
            self._items.popitem(last=False)

    def discard(self, key: bytes | str) -> None:
        self._items.pop(key, None)

    def __len__(self) -> int:
        return len(self._items)


@dataclass(slots=True)
class _Verdict:
    """A verdict that was reached, with what must still hold when it is used again."""

    verified: VerifiedChain
    not_before: float
    roots: tuple[PublicKey, ...]
    revocations: int


@dataclass(frozen=True, slots=True)
class _KnownGrant:
    """A grant whose signature by ``key`` was found right; what else it must satisfy is checked each time."""

    part: ChainPart[GrantClaims]
    key: PublicKey


class Verifier:
    """Verifies bearer strings for the service ``audience``.

    ``roots`` maps thumbprints to the pinned root keys; the mapping is read at each call, so that a root taken out
    of it counts no more, in the cache neither. ``revocations`` is shared with whoever keeps it up to date.
    Verdicts are cached by the SHA-256 of the whole bearer string until the first link expires or is revoked, and
    grants by their own, since one grant comes with many access tokens; ``cache_size`` bounds each of the two.
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
        self._verdicts: _LruCache[_Verdict] = _LruCache(cache_size)
        self._grants: _LruCache[_KnownGrant] = _LruCache(cache_size)

    def verify(self, bearer: str | None) -> VerifiedChain:
        """Return what ``bearer``, the text after ``Bearer`` in the header, proves at this moment.

        Raises ``CapabilityError`` with code ``token_missing``, ``token_malformed``, ``token_expired``,
        ``token_invalid`` or ``token_revoked``, and no other exception, whatever the text.
        """
        if not bearer:
            raise CapabilityError("bearer_missing")
        if len(bearer) > MAX_BEARER_CHARS:
            raise CapabilityError("bearer_too_large")
        try:
            key = _digest(bearer.encode("ascii"))
        except UnicodeEncodeError:
            raise CapabilityError("bearer_malformed") from None
        entry = self._verdicts.get(key)
        if entry is not None and self._has_trusted_roots(entry):
            try:
                self._recheck(entry)
            except CapabilityError:
                self._verdicts.discard(key)
                raise
            return entry.verified
        entry = self._verify_uncached(bearer)
        self._verdicts.put(key, entry)
        return entry.verified

    def _has_trusted_roots(self, entry: _Verdict) -> bool:
        for root in entry.roots:  # noqa: SIM110  once a call: a generator would cost as much as the rest of it
            if self._roots.get(root.thumbprint) != root:
                return False
        return True

    def _recheck(self, entry: _Verdict) -> None:
        now = self._clock.now()
        if now - SKEW_SECONDS >= entry.verified.expires:
            raise CapabilityError("expired")
        if entry.not_before - SKEW_SECONDS > now:
            raise CapabilityError("not_yet_valid")
        if entry.revocations != self.revocations.version:
            if self.revocations.is_revoked(entry.verified.links):
                raise CapabilityError("revoked")
            entry.revocations = self.revocations.version

    def _verify_uncached(self, bearer: str) -> _Verdict:
        access_text, *grant_texts = split_bearer(bearer)
        chain = assemble_chain(parse_access(access_text), [self._read_grant(text) for text in grant_texts])
        # Refusing on what nobody signed is always safe, and spares the signatures of what has merely expired.
        check_chain_times(chain, self._clock.now())
        keys = self._check_signatures(chain)
        check_authority(chain, self.audience)
        links = chain.links
        if self.revocations.is_revoked(links):
            raise CapabilityError("revoked")
        for grant in chain.grants:
            self._grants.put(grant.digest, _KnownGrant(grant, keys[grant.digest]))
        return _Verdict(
            verified=_to_verified(chain),
            not_before=max(max(link.nbf, link.iat) for link in links),
            roots=tuple(keys[part.digest] for part, parent in chain.parts_with_parents() if parent is None),
            revocations=self.revocations.version,
        )

    def _read_grant(self, text: str) -> ChainPart[GrantClaims]:
        known = self._grants.get(digest_of(text))
        return parse_grant(text) if known is None else known.part

    def _check_signatures(self, chain: Chain) -> dict[str, PublicKey]:
        """Return each part's key by its digest; raise unless every part is signed by the only key that may.

        It goes from the root down, so that whoever has no root's signature costs one check and no more.
        """
        keys: dict[str, PublicKey] = {}
        for part, parent in chain.parts_with_parents():
            key = expected_key(part, parent, self._roots)
            known = self._grants.get(part.digest)
            if known is None or known.key != key:
                part.jws.check_signature(key)
            keys[part.digest] = key
        return keys


def _to_verified(chain: Chain) -> VerifiedChain:
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
        expires=min(link.exp for link in chain.links),
        links=chain.links,
        grant=None if own is None else own.claims,
        grants=() if own is None else tuple(part.raw for part in chain.grants),
    )


def _digest(bearer: bytes) -> bytes:
    """Return the SHA-256 of a bearer.

    In parts, since hashlib lets other threads run while it takes 2 KiB or more, and to get the turn back takes several
    times as long as to hash a bearer.
    """
    digest = hashlib.sha256(bearer[:_HASH_CHUNK])
    for start in range(_HASH_CHUNK, len(bearer), _HASH_CHUNK):
        digest.update(bearer[start : start + _HASH_CHUNK])
    return digest.digest()
