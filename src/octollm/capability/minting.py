"""Token minting: root tokens by the orchestrator, attenuated tokens under a grant, a service's own tokens.

A delegate reuses what it minted where a fresh token would say the same: a grant for one callee of one step, and an
access token within one served call. Everything else is minted anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypedDict

from octollm.capability.errors import CapabilityError
from octollm.capability.grants import DelegationTree
from octollm.capability.jose import SigningKey, digest_of, encode_jws
from octollm.capability.keyring import KeyRing
from octollm.capability.revocations import Revocations
from octollm.capability.scopes import Principal, Scope, ScopeSet
from octollm.capability.service_tokens import (
    MAX_DIRECTORY_SECONDS,
    MAX_SERVICE_SECONDS,
    DirectoryClaims,
    DirectoryEntry,
    ServiceClaims,
    directory_to_json,
    service_to_json,
    to_jwk_member,
)
from octollm.capability.tokens import (
    MAX_ACCESS_SECONDS,
    MAX_BEARER_CHARS,
    MAX_GRANT_SECONDS,
    MAX_PARTS,
    ROOT_ISSUER,
    ROUNDING_SECONDS,
    SEPARATOR,
    AccessClaims,
    Confirmation,
    GrantClaims,
    TaskRef,
    encode_claims,
)
from octollm.capability.verification import VerifiedChain
from octollm.clock import Clock, IdGenerator
from octollm.contracts.services import service_of
from octollm.lru import LruCache

CALL_TOKEN_SECONDS = 60.0
"""The life of an access token for one call, in seconds."""
REUSE_SHARE = 0.5
"""Share of an access token's life that must be left for another call to use it."""
GRANT_RENEWAL_SECONDS = 60.0
"""A grant is reused unless a fresh one would live longer than it by more than this."""
MAX_CACHED_GRANTS = 4096
MAX_CALL_TOKENS = 64
"""Access tokens that one served call keeps for reuse."""


class _ClaimMembers(TypedDict):
    """The claims that every link of a chain may have."""

    iss: str
    sub: str
    cred: str
    tenant: str
    aud: str
    exp: float
    nbf: float
    iat: float
    jti: str
    task: str | None
    step: str | None
    attempt: int | None
    run: int | None
    prf: str | None


@dataclass(frozen=True, slots=True)
class _CommonClaims:
    """The claims that the tokens of one minting share; ``now`` in seconds since the epoch."""

    issuer: str
    audience: str
    principal: Principal
    task: TaskRef | None
    now: float
    proof: str | None

    def claims(self, jti: str, expires: float) -> _ClaimMembers:
        """Return the claims of one token, with times rounded to milliseconds."""
        task = self.task
        return {
            "iss": self.issuer,
            "sub": self.principal.sub,
            "cred": self.principal.cred,
            "tenant": self.principal.tenant,
            "aud": self.audience,
            "exp": _millis(expires),
            "nbf": _millis(self.now),
            "iat": _millis(self.now),
            "jti": jti,
            "task": None if task is None else task.task,
            "step": None if task is None else task.step,
            "attempt": None if task is None else task.attempt,
            "run": None if task is None else task.run,
            "prf": self.proof,
        }


class RootMinter:
    """Mints the first link of a chain, signed by a root key of the orchestrator."""

    def __init__(self, root_key: SigningKey | KeyRing, clock: Clock, ids: IdGenerator) -> None:
        self._ring = KeyRing.of(root_key)
        self._clock = clock
        self._ids = ids

    def mint_access(
        self,
        principal: Principal,
        aud: str,
        scopes: ScopeSet | str,
        lifetime: float = CALL_TOKEN_SECONDS,
        *,
        task: TaskRef | None = None,
        delegation: DelegationTree | None = None,
        holder_jkt: str | None = None,
        grant_lifetime: float = MAX_GRANT_SECONDS,
        call: str | None = None,
    ) -> str:
        """Return a bearer string for ``aud``: an access token, with a grant of ``delegation`` unless that is empty.

        ``lifetime`` of the access token is at most a day, ``grant_lifetime`` at most an hour (pass the time left of
        the step), both in seconds. Raises ``CapabilityError``: ``holder_unknown`` if there is a ``delegation`` and no
        thumbprint of its holder's key, ``does_not_fit`` if the result is too long for a bearer string, ``misuse`` for
        arguments that no verifier would accept.
        """
        granted = scopes if isinstance(scopes, ScopeSet) else ScopeSet.parse(scopes)
        _check_scopes(granted, aud)
        _check_lifetime(lifetime, MAX_ACCESS_SECONDS)
        now = self._clock.now()
        key = self._ring.signing_key(now)
        terms = _CommonClaims(ROOT_ISSUER, aud, principal, task, now, proof=None)
        grant: str | None = None
        if delegation:
            if holder_jkt is None:
                raise CapabilityError("holder_unknown", f"No key of {aud} is known, so it cannot be let call on.")
            _check_lifetime(grant_lifetime, MAX_GRANT_SECONDS)
            expires = now + grant_lifetime
            grant = encode_jws(
                encode_claims(
                    GrantClaims(**terms.claims(self._ids.hex(), expires), cnf=Confirmation(holder_jkt), may=delegation)
                ),
                "cap-grant+jwt",
                key,
                with_kid=True,
            )
        claims = AccessClaims(
            **terms.claims(self._ids.hex(), now + lifetime),
            scope=granted,
            call=call,
            gnt=None if grant is None else digest_of(grant),
        )
        access = encode_jws(encode_claims(claims), "cap+jwt", key, with_kid=True)
        return _assemble_bearer(access, () if grant is None else (grant,))

    def sign_directory(self, entries: Mapping[str, DirectoryEntry], lifetime: float = MAX_DIRECTORY_SECONDS) -> str:
        """Return the signed directory (``dir+jwt``): services' thumbprints and declared calls, and the root keys."""
        _check_lifetime(lifetime, MAX_DIRECTORY_SECONDS)
        now = self._clock.now()
        claims = DirectoryClaims(
            iss=ROOT_ISSUER,
            exp=_millis(now + lifetime),
            iat=_millis(now),
            jti=self._ids.hex(),
            services=dict(entries),
            roots=tuple(to_jwk_member(root) for root in self._ring.trusted_keys(now).values()),
        )
        return encode_jws(directory_to_json(claims), "dir+jwt", self._ring.signing_key(now), with_kid=True)


@dataclass(frozen=True, slots=True)
class _MintedGrant:
    text: str
    digest: str
    claims: GrantClaims


@dataclass(frozen=True, slots=True)
class MintedToken:
    """A bearer string with the claims of the links that were minted for it."""

    bearer: str
    access: AccessClaims
    grant: GrantClaims | None


class Delegator:
    """Delegation: mints attenuated tokens under the grants that other services send to the service ``name``.

    ``key`` is its key, or its keys while they rotate. A callee's grant is reused for the same callee, scope and key
    under the same parent grant, and so within one attempt of one step. ``revocations`` are the service's own copy of
    the list: a grant in it is not reused.
    """

    def __init__(
        self,
        key: SigningKey | KeyRing | Iterable[SigningKey],
        name: str,
        clock: Clock,
        ids: IdGenerator,
        revocations: Revocations | None = None,
    ) -> None:
        self._ring = KeyRing.of(key)
        self._name = name
        self._clock = clock
        self._ids = ids
        self._revocations = revocations
        self._grants: LruCache[str, _MintedGrant] = LruCache(MAX_CACHED_GRANTS)

    def delegate(
        self,
        verified: VerifiedChain,
        aud: str,
        scope: str,
        holder_jkt: str | None,
        *,
        lifetime: float = CALL_TOKEN_SECONDS,
        call: str | None = None,
    ) -> str:
        """Return a bearer string for calling ``scope`` at ``aud`` on behalf of the principal of ``verified``.

        Its access token is new. If calls may follow ``scope`` and ``holder_jkt``, the thumbprint of the callee's key,
        is given, it includes a grant for the callee; without that, the callee cannot call on. Neither token outlives
        the grant that it is minted under. Raises ``CapabilityError``: ``grant_absent`` or ``not_in_may`` (code
        ``authority_missing``), naming the scope; ``expired`` if the grant is; ``holder_unknown`` if it is for another
        key; ``does_not_fit`` if the chain is too long for a bearer string.
        """
        return self.mint(verified, aud, scope, holder_jkt, lifetime=lifetime, call=call).bearer

    def mint(
        self,
        verified: VerifiedChain,
        aud: str,
        scope: str,
        holder_jkt: str | None,
        *,
        lifetime: float = CALL_TOKEN_SECONDS,
        call: str | None = None,
    ) -> MintedToken:
        """Return the bearer string of :meth:`delegate` with the claims of its new links."""
        requested = Scope(scope)
        parent = verified.grant
        if parent is None:
            raise CapabilityError("grant_absent", f"{self._name} was given no authority to call {scope}.")
        below = parent.may.subtree(requested)
        # Each of these every verifier would refuse; here the error names the scope.
        if below is None or service_of(requested.family) != aud or parent.aud != self._name:
            raise CapabilityError("not_in_may", f"{self._name} may not call {scope} at {aud} for this work.")
        key = self._ring.find(parent.cnf.jkt)
        if key is None:
            raise CapabilityError(
                "holder_unknown", f"The grant for calling {scope} is for another key of {self._name}."
            )
        now = self._clock.now()
        # No skew here: a child may not outlive its parent, so it would have no life left.
        if now >= parent.exp:
            raise CapabilityError("expired", f"The authority to call {scope} has expired.")
        _check_lifetime(lifetime, MAX_ACCESS_SECONDS)

        terms = _CommonClaims(self._name, aud, verified.principal, verified.task, now, digest_of(verified.grants[-1]))
        grant = None
        if below and holder_jkt is not None:
            grant = self._callee_grant(terms, parent, requested, below, holder_jkt, key)
        claims = AccessClaims(
            **terms.claims(self._ids.hex(), min(now + lifetime, parent.exp)),
            scope=ScopeSet((requested,)),
            call=call,
            gnt=None if grant is None else grant.digest,
        )
        access = encode_jws(encode_claims(claims), "cap+jwt", key, with_jwk=True)
        grants = verified.grants if grant is None else (*verified.grants, grant.text)
        return MintedToken(_assemble_bearer(access, grants), claims, None if grant is None else grant.claims)

    def is_reusable(self, token: MintedToken, parent: GrantClaims, lifetime: float) -> bool:
        """Return whether ``token``, minted under ``parent``, is as good for another call as a fresh one.

        It has half of ``lifetime`` left, or as much as a fresh one under ``parent`` could have, and neither of its
        links is revoked.
        """
        now = self._clock.now()
        if now >= parent.exp or _is_from_future(token.access.iat, now):
            return False
        if token.access.exp < min(now + lifetime * REUSE_SHARE, parent.exp):
            return False
        return not self._is_revoked(token.access) and (token.grant is None or not self._is_revoked(token.grant))

    def _callee_grant(
        self,
        terms: _CommonClaims,
        parent: GrantClaims,
        scope: Scope,
        below: DelegationTree,
        holder_jkt: str,
        key: SigningKey,
    ) -> _MintedGrant:
        """Return a grant of ``below`` for the callee, minted before if a fresh one would say the same."""
        # The parent's digest stands for everything that the grant inherits: principal, task, step, attempt, run.
        # Scope and key decide the rest of what it says, besides its times and id.
        place = f"{terms.proof} {scope} {holder_jkt}"
        cached = self._grants.get(place)
        expires = min(terms.now + MAX_GRANT_SECONDS, parent.exp)
        if (
            cached is not None
            and not _is_from_future(cached.claims.iat, terms.now)
            and expires - cached.claims.exp <= GRANT_RENEWAL_SECONDS
            and not self._is_revoked(cached.claims)
        ):
            return cached
        claims = GrantClaims(**terms.claims(self._ids.hex(), expires), cnf=Confirmation(holder_jkt), may=below)
        text = encode_jws(encode_claims(claims), "cap-grant+jwt", key, with_jwk=True)
        minted = _MintedGrant(text, digest_of(text), claims)
        self._grants.put(place, minted)
        return minted

    def _is_revoked(self, claims: AccessClaims | GrantClaims) -> bool:
        return self._revocations is not None and self._revocations.is_revoked((claims,))


class CallTokens:
    """The bearer strings for the calls that a service makes while it serves one call.

    One is reused for the same scope and callee as :meth:`Delegator.is_reusable` allows, and by no other served call:
    its claim ``call`` is the digest of this one.
    """

    def __init__(self, delegator: Delegator, verified: VerifiedChain, call: str) -> None:
        """Mint under ``verified``, the authority of the served call, whose digest is ``call``."""
        self._delegator = delegator
        self._verified = verified
        self._call = call
        self._tokens: dict[tuple[str, str, str | None], MintedToken] = {}

    def bearer(self, aud: str, scope: str, holder_jkt: str | None) -> str:
        """Return a bearer string for ``scope`` at ``aud``; raises what :meth:`Delegator.delegate` raises."""
        place = (aud, scope, holder_jkt)
        token = self._tokens.get(place)
        parent = self._verified.grant
        if token is not None and parent is not None:
            if self._delegator.is_reusable(token, parent, CALL_TOKEN_SECONDS):
                return token.bearer
            del self._tokens[place]
        token = self._delegator.mint(self._verified, aud, scope, holder_jkt, call=self._call)
        # Selectors can make the scopes of one call many; those past the bound are minted each time.
        if len(self._tokens) < MAX_CALL_TOKENS:
            self._tokens[place] = token
        return token.bearer


class ServiceTokenSigner:
    """Signs the tokens by which the service ``name`` authenticates itself."""

    def __init__(self, key: SigningKey | KeyRing, name: str, clock: Clock, ids: IdGenerator) -> None:
        self._ring = KeyRing.of(key)
        self._name = name
        self._clock = clock
        self._ids = ids
        self._tokens: dict[str, tuple[str, ServiceClaims, SigningKey]] = {}
        """The last token for each audience; there are as many as services that this one calls."""

    def sign_token(self, aud: str, lifetime: float = MAX_SERVICE_SECONDS) -> str:
        """Return a ``svc+jwt`` for ``aud`` that lives at most a minute, and at least half of ``lifetime`` from now.

        A token is reused for that long: it says nothing of the call that it authenticates.
        """
        _check_lifetime(lifetime, MAX_SERVICE_SECONDS)
        now = self._clock.now()
        key = self._ring.signing_key(now)
        last = self._tokens.get(aud)
        if last is not None:
            token, claims, signed_by = last
            # The upper bound keeps a caller who asked for a short life from getting an older, longer token.
            is_long_enough = now + lifetime * REUSE_SHARE <= claims.exp <= now + lifetime + ROUNDING_SECONDS
            # After a rotation the new key signs at once, since peers stop trusting the old one.
            if signed_by is key and is_long_enough and not _is_from_future(claims.iat, now):
                return token
        claims = ServiceClaims(
            iss=self._name,
            sub=self._name,
            aud=aud,
            exp=_millis(now + lifetime),
            iat=_millis(now),
            jti=self._ids.hex(),
        )
        token = encode_jws(service_to_json(claims), "svc+jwt", key, with_kid=True, with_jwk=True)
        self._tokens[aud] = (token, claims, key)
        return token


def _check_scopes(scopes: ScopeSet, aud: str) -> None:
    if not len(scopes):
        raise CapabilityError("misuse", "An access token needs a scope.")
    for scope in scopes:
        if service_of(scope.family) != aud:
            raise CapabilityError("misuse", f"The scope {scope} is not one of {aud}.")


def _check_lifetime(lifetime: float, longest: float) -> None:
    if not 0 < lifetime <= longest:
        raise CapabilityError("misuse", f"A token of this kind lives for up to {longest:.0f} seconds.")


def _is_from_future(issued_at: float, now: float) -> bool:
    """Return whether the clock was set back since: a peer could then refuse the token as issued in the future."""
    return issued_at > now + ROUNDING_SECONDS


def _millis(seconds: float) -> float:
    return round(seconds, 3)


def _assemble_bearer(access: str, grants: tuple[str, ...]) -> str:
    bearer = SEPARATOR.join((access, *grants))
    if len(bearer) > MAX_BEARER_CHARS or 1 + len(grants) > MAX_PARTS:
        raise CapabilityError("does_not_fit", "The authority to pass on does not fit in a bearer token.")
    return bearer
