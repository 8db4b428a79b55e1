"""Token minting: root tokens by the orchestrator, attenuated tokens under a grant, a service's own tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypedDict

from octollm.capability.errors import CapabilityError
from octollm.capability.grants import DelegationTree
from octollm.capability.jose import SigningKey, digest_of, encode_jws
from octollm.capability.keyring import KeyRing
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

CALL_TOKEN_SECONDS = 60.0
"""The life of an access token for one call, in seconds."""


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


class Delegator:
    """Mints under the grants that the service ``name`` is sent. It has one key, or several while they rotate."""

    def __init__(
        self, key: SigningKey | KeyRing | Iterable[SigningKey], name: str, clock: Clock, ids: IdGenerator
    ) -> None:
        self._ring = KeyRing.of(key)
        self._name = name
        self._clock = clock
        self._ids = ids

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
        """Return a bearer string for calling ``scope`` at ``aud`` on behalf of whom ``verified`` is for.

        The callee is granted what stands under that entry of ``may``, if anything does and ``holder_jkt``, the
        thumbprint of its key, is given; without it, the callee may not call on. Neither token outlives the grant
        that it is made under. Raises ``CapabilityError``: ``grant_absent`` or ``not_in_may`` (code
        ``authority_missing``) naming the scope, before anything is sent; ``expired`` if the grant is;
        ``holder_unknown`` if it is for another key; ``does_not_fit`` if the chain is too long for a bearer string.
        """
        wanted = Scope(scope)
        parent = verified.grant
        if parent is None:
            raise CapabilityError("grant_absent", f"{self._name} was given no authority to call {scope}.")
        below = parent.may.subtree(wanted)
        if below is None or service_of(wanted.family) != aud or parent.aud != self._name:
            raise CapabilityError("not_in_may", f"{self._name} may not call {scope} at {aud} for this work.")
        key = self._ring.find(parent.cnf.jkt)
        if key is None:
            raise CapabilityError(
                "holder_unknown", f"The grant for calling {scope} is for another key of {self._name}."
            )
        now = self._clock.now()
        if now >= parent.exp:
            raise CapabilityError("expired", f"The authority to call {scope} has expired.")
        _check_lifetime(lifetime, MAX_ACCESS_SECONDS)

        terms = _CommonClaims(self._name, aud, verified.principal, verified.task, now, digest_of(verified.grants[-1]))
        grant: str | None = None
        if below and holder_jkt is not None:
            expires = min(now + MAX_GRANT_SECONDS, parent.exp)
            grant = encode_jws(
                encode_claims(
                    GrantClaims(**terms.claims(self._ids.hex(), expires), cnf=Confirmation(holder_jkt), may=below)
                ),
                "cap-grant+jwt",
                key,
                with_jwk=True,
            )
        claims = AccessClaims(
            **terms.claims(self._ids.hex(), min(now + lifetime, parent.exp)),
            scope=ScopeSet((wanted,)),
            call=call,
            gnt=None if grant is None else digest_of(grant),
        )
        access = encode_jws(encode_claims(claims), "cap+jwt", key, with_jwk=True)
        return _assemble_bearer(access, verified.grants if grant is None else (*verified.grants, grant))


class ServiceTokenSigner:
    """Signs the tokens by which the service ``name`` authenticates itself."""

    def __init__(self, key: SigningKey | KeyRing, name: str, clock: Clock, ids: IdGenerator) -> None:
        self._ring = KeyRing.of(key)
        self._name = name
        self._clock = clock
        self._ids = ids

    def sign_token(self, aud: str, lifetime: float = MAX_SERVICE_SECONDS) -> str:
        """Return a ``svc+jwt`` for ``aud`` that lives at most a minute."""
        _check_lifetime(lifetime, MAX_SERVICE_SECONDS)
        now = self._clock.now()
        claims = ServiceClaims(
            iss=self._name,
            sub=self._name,
            aud=aud,
            exp=_millis(now + lifetime),
            iat=_millis(now),
            jti=self._ids.hex(),
        )
        return encode_jws(service_to_json(claims), "svc+jwt", self._ring.signing_key(now), with_kid=True, with_jwk=True)


def _check_scopes(scopes: ScopeSet, aud: str) -> None:
    if not len(scopes):
        raise CapabilityError("misuse", "An access token needs a scope.")
    for scope in scopes:
        if service_of(scope.family) != aud:
            raise CapabilityError("misuse", f"The scope {scope} is not one of {aud}.")


def _check_lifetime(lifetime: float, longest: float) -> None:
    if not 0 < lifetime <= longest:
        raise CapabilityError("misuse", f"A token of this kind lives for up to {longest:.0f} seconds.")


def _millis(seconds: float) -> float:
    return round(seconds, 3)


def _assemble_bearer(access: str, grants: tuple[str, ...]) -> str:
    bearer = SEPARATOR.join((access, *grants))
    if len(bearer) > MAX_BEARER_CHARS or 1 + len(grants) > MAX_PARTS:
        raise CapabilityError("does_not_fit", "The authority to pass on does not fit in a bearer token.")
    return bearer
