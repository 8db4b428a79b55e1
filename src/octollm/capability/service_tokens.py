"""Service tokens, by which a service authenticates itself, and the signed directory of the services' keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from octollm.capability.errors import CapabilityError
from octollm.capability.grants import DeclaredCall
from octollm.capability.jose import Jwk, PublicKey, Thumbprint, b64decode, decode_jws, pinned_root
from octollm.capability.scopes import MAX_SCOPE_CHARS, Scope
from octollm.capability.tokens import ROOT_ISSUER, NumericDate, ServiceName, TokenName, check_times
from octollm.clock import Clock
from octollm.lru import LruCache

MAX_SERVICE_SECONDS = 60.0
"""The longest life of a ``svc+jwt``."""
MAX_DIRECTORY_SECONDS = 300.0
"""The longest life of a directory, and so how long a key removed from it may still be trusted."""
MAX_SERVICE_CHARS = 2_048
"""Characters of a ``svc+jwt``."""
MAX_DIRECTORY_CHARS = 1_048_576
"""Characters of a directory."""
_MAX_DIRECTORY_BRACKETS = 50_000

_Url = Annotated[str, Meta(pattern=r"\Ahttps?://[!-~]{1,248}\Z")]
_ScopeText = Annotated[str, Meta(max_length=MAX_SCOPE_CHARS)]


class DirectoryEntry(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """A registered service: the thumbprints of its keys, newest first, and the declared calls of its operations.

    ``urls`` are the addresses of a custom arm, which no setting names.
    """

    jkts: Annotated[tuple[Thumbprint, ...], Meta(max_length=16)]
    calls: dict[_ScopeText, tuple[DeclaredCall, ...]] = {}
    urls: Annotated[tuple[_Url, ...], Meta(max_length=32)] = ()


Directory = Mapping[str, DirectoryEntry]
"""The registered services by name."""


class ServiceClaims(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``svc+jwt``: the service ``iss``, which is also ``sub``, authenticates itself to ``aud``."""

    iss: ServiceName
    sub: ServiceName
    aud: ServiceName
    exp: NumericDate
    iat: NumericDate
    jti: TokenName


class DirectoryClaims(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``dir+jwt``: the registered services, signed by the orchestrator."""

    iss: ServiceName
    exp: NumericDate
    iat: NumericDate
    jti: TokenName
    services: dict[ServiceName, DirectoryEntry]
    roots: Annotated[tuple[Jwk, ...], Meta(max_length=16)] = ()
    """The trusted root keys, the signing one first."""


def service_to_json(claims: ServiceClaims) -> bytes:
    """Return the payload of a ``svc+jwt``; raises ``CapabilityError`` (``misuse``) if no verifier would accept it."""
    return _to_json(claims, ServiceClaims)


def directory_to_json(claims: DirectoryClaims) -> bytes:
    """Return the payload of a ``dir+jwt``; raises ``CapabilityError`` (``misuse``) if no verifier would accept it."""
    _check_calls(claims.services)
    return _to_json(claims, DirectoryClaims)


def verify_service_token(token: str | None, aud: str, directory: Directory, clock: Clock) -> str:
    """Return the name of the service that authenticates to ``aud`` by a ``svc+jwt`` signed with one of its keys.

    The token embeds its key as ``jwk``, which is used only if ``directory`` lists its thumbprint under the name that
    the token claims. Raises ``CapabilityError`` with the codes of :meth:`Verifier.verify`.
    """
    return ServiceTokenVerifier(aud, clock, cache_size=1).verify(token, directory)


class ServiceTokenVerifier:
    """Verifies service tokens for ``aud`` as :func:`verify_service_token` does, each signature once.

    Whether the directory still lists the key, and the times, are checked at every use. ``cache_size`` bounds the
    number of tokens.
    """

    def __init__(self, aud: str, clock: Clock, cache_size: int = 1024) -> None:
        self._aud = aud
        self._clock = clock
        self._verified: LruCache[str, tuple[ServiceClaims, str]] = LruCache(cache_size)

    def verify(self, token: str | None, directory: Directory) -> str:
        """Return the name of the service; raises as :func:`verify_service_token` does."""
        if not token:
            raise CapabilityError("bearer_missing")
        if len(token) > MAX_SERVICE_CHARS:
            raise CapabilityError("bearer_too_large")
        cached = self._verified.get(token)
        if cached is not None:
            claims, thumbprint = cached
            _check_registered(claims.iss, thumbprint, directory)
            check_times(claims.exp, claims.iat, claims.iat, self._clock.now(), MAX_SERVICE_SECONDS)
            return claims.iss
        jws = decode_jws(token, "svc+jwt")
        claims = _read(jws.claims, ServiceClaims)
        key = jws.embedded_key()
        if claims.iss != claims.sub:
            raise CapabilityError("issuer_wrong")
        # The directory before the signature: a key that it does not list proves nothing, and costs no check.
        _check_registered(claims.iss, key.thumbprint, directory)
        if key.thumbprint != jws.header.kid:
            raise CapabilityError("key_mismatch")
        check_times(claims.exp, claims.iat, claims.iat, self._clock.now(), MAX_SERVICE_SECONDS)
        jws.check_signature(key)
        if claims.aud != self._aud:
            raise CapabilityError("audience_wrong")
        self._verified.put(token, (claims, key.thumbprint))
        return claims.iss


def _check_registered(service: str, thumbprint: str, directory: Directory) -> None:
    entry = directory.get(service)
    if entry is None:
        raise CapabilityError("service_unknown")
    if thumbprint not in entry.jkts:
        raise CapabilityError("key_mismatch")


def verify_directory(
    token: str | None, roots: Mapping[str, PublicKey], clock: Clock
) -> tuple[Directory, dict[str, PublicKey]]:
    """Return the directory that a pinned root signed, and the root keys that it lists as trusted.

    Raises ``CapabilityError`` with the codes of :meth:`Verifier.verify`.
    """
    if not token:
        raise CapabilityError("bearer_missing")
    if len(token) > MAX_DIRECTORY_CHARS:
        raise CapabilityError("bearer_too_large")
    jws = decode_jws(token, "dir+jwt", max_brackets=_MAX_DIRECTORY_BRACKETS)
    # The signature before the claims: the list of roots in them would otherwise vouch for itself.
    root = pinned_root(jws.header, roots)
    jws.check_signature(root)
    claims = _read(jws.claims, DirectoryClaims)
    if claims.iss != ROOT_ISSUER:
        raise CapabilityError("issuer_wrong")
    check_times(claims.exp, claims.iat, claims.iat, clock.now(), MAX_DIRECTORY_SECONDS)
    try:
        _check_calls(claims.services)
    except CapabilityError:
        raise CapabilityError("claims_malformed") from None
    return claims.services, _root_keys(claims.roots)


def to_jwk_member(key: PublicKey) -> Jwk:
    """Return a key in the form that a directory lists."""
    return Jwk("OKP", "Ed25519", key.to_jwk()["x"])


def _root_keys(jwks: tuple[Jwk, ...]) -> dict[str, PublicKey]:
    keys = [PublicKey(b64decode(jwk.x)) for jwk in jwks]
    return {key.thumbprint: key for key in keys}


def _check_calls(services: Directory) -> None:
    for entry in services.values():
        for operation, calls in entry.calls.items():
            Scope(operation)
            for call in calls:
                Scope(call.scope)


_C = TypeVar("_C", ServiceClaims, DirectoryClaims)


def _read(claims: object, kind: type[_C]) -> _C:
    try:
        return msgspec.convert(claims, kind)
    except msgspec.ValidationError as exc:
        raise CapabilityError("claims_malformed") from exc


def _to_json(claims: _C, kind: type[_C]) -> bytes:
    plain = msgspec.to_builtins(claims)
    try:
        _read(plain, kind)
    except CapabilityError as exc:
        raise CapabilityError("misuse", "A claim of the token to be made is malformed.") from exc
    return msgspec.json.encode(plain)
