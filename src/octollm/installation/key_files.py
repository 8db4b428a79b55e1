"""Keys as files: one JSON Web Key, or a set (RFC 7517 section 5) whose members say when they were made (``iat``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from octollm.capability import CapabilityError, PublicKey, SigningKey
from octollm.capability.keyring import DatedKey, KeyRing, PublicRing
from octollm.capability.keys import published_jwk

_MADE = "iat"


class _Set(msgspec.Struct, frozen=True):
    keys: list[dict[str, Any]]


def read_ring(content: bytes, name: str) -> KeyRing:
    """Return the key pairs of a file; raise ``CapabilityError`` (``key_malformed``) for any other content."""
    return KeyRing(DatedKey(SigningKey.from_jwk(jwk, name), made) for jwk, made in _members(content))


def write_ring(ring: KeyRing) -> bytes:
    """Return the content of a private file; one key that signs at once is a plain JWK."""
    keys = [(each.key.to_jwk(private=True), each.made) for each in ring]
    if len(keys) == 1 and keys[0][1] == 0:
        return msgspec.json.encode(keys[0][0])
    return msgspec.json.encode(_Set([{**jwk, _MADE: made} for jwk, made in keys]))


def read_public(content: bytes) -> list[tuple[PublicKey, float]]:
    """Return the public keys of a file, with when each was made; raise ``CapabilityError`` (``key_malformed``)."""
    return [(PublicKey.from_jwk(jwk), made) for jwk, made in _members(content)]


def write_public(keys: list[tuple[PublicKey, float]]) -> bytes:
    """Return the content of a file of public keys."""
    return msgspec.json.encode(_Set([_public_member(key, made) for key, made in keys]))


def read_public_rings(content: bytes) -> dict[str, PublicRing]:
    """Return the public keys of a file that has those of several names."""
    found = _decoded(content, dict[str, dict[str, Any]])
    return {name: PublicRing(read_public(msgspec.json.encode(value))) for name, value in found.items()}


def write_public_rings(rings: Mapping[str, KeyRing]) -> bytes:
    """Return the content of a file of the public keys of several names."""
    return msgspec.json.encode(
        {name: _Set([_public_member(each.key.public, each.made) for each in ring]) for name, ring in rings.items()}
    )


def _public_member(key: PublicKey, made: float) -> dict[str, Any]:
    member: dict[str, Any] = {**published_jwk(key)}
    return {**member, _MADE: made} if made else member


def _members(content: bytes) -> list[tuple[dict[str, object], float]]:
    found = _decoded(content, dict[str, Any])
    listed = _decoded(content, _Set).keys if "keys" in found else [found]
    members: list[tuple[dict[str, object], float]] = []
    for jwk in listed:
        made = jwk.get(_MADE, 0.0)
        if not isinstance(made, int | float) or isinstance(made, bool):
            raise CapabilityError("key_malformed")
        members.append(({name: value for name, value in jwk.items() if name != _MADE}, float(made)))
    if not members:
        raise CapabilityError("key_malformed")
    return members


def _decoded(content: bytes, kind: Any) -> Any:
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise CapabilityError("key_malformed") from None
