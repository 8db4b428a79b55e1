"""Keys as files: one JSON Web Key, or a set (RFC 7517 section 5) whose members say when they were made (``iat``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from octollm.capability import CapabilityError, PublicKey, SigningKey
from octollm.capability.keyring import DatedKey, KeyRing, PublicKeyRing
from octollm.capability.keys import to_published_jwk

_CREATED_AT = "iat"


class _JwkSetFile(msgspec.Struct, frozen=True):
    keys: list[dict[str, Any]]


def decode_key_ring(content: bytes, name: str) -> KeyRing:
    """Return the key pairs of a file; raise ``CapabilityError`` (``key_malformed``) for any other content."""
    return KeyRing(DatedKey(SigningKey.from_jwk(jwk, name), made) for jwk, made in _parse_members(content))


def encode_key_ring(ring: KeyRing) -> bytes:
    """Return the content of a private file; one key that signs at once is a plain JWK."""
    keys = [(each.key.to_jwk(private=True), each.created_at) for each in ring]
    if len(keys) == 1 and keys[0][1] == 0:
        return msgspec.json.encode(keys[0][0])
    return msgspec.json.encode(_JwkSetFile([{**jwk, _CREATED_AT: made} for jwk, made in keys]))


def decode_public_keys(content: bytes) -> list[tuple[PublicKey, float]]:
    """Return the public keys of a file, with when each was made; raise ``CapabilityError`` (``key_malformed``)."""
    return [(PublicKey.from_jwk(jwk), made) for jwk, made in _parse_members(content)]


def encode_public_keys(keys: list[tuple[PublicKey, float]]) -> bytes:
    """Return the content of a file of public keys."""
    return msgspec.json.encode(_JwkSetFile([_public_member(key, made) for key, made in keys]))


def decode_public_rings(content: bytes) -> dict[str, PublicKeyRing]:
    """Return the public keys of a file that has those of several names."""
    found = _decode(content, dict[str, dict[str, Any]])
    return {name: PublicKeyRing(decode_public_keys(msgspec.json.encode(value))) for name, value in found.items()}


def encode_public_rings(rings: Mapping[str, KeyRing]) -> bytes:
    """Return the content of a file of the public keys of several names."""
    return msgspec.json.encode(
        {
            name: _JwkSetFile([_public_member(each.key.public, each.created_at) for each in ring])
            for name, ring in rings.items()
        }
    )


def _public_member(key: PublicKey, made: float) -> dict[str, Any]:
    member: dict[str, Any] = {**to_published_jwk(key)}
    return {**member, _CREATED_AT: made} if made else member


def _parse_members(content: bytes) -> list[tuple[dict[str, object], float]]:
    found = _decode(content, dict[str, Any])
    listed = _decode(content, _JwkSetFile).keys if "keys" in found else [found]
    members: list[tuple[dict[str, object], float]] = []
    for jwk in listed:
        made = jwk.get(_CREATED_AT, 0.0)
        if not isinstance(made, int | float) or isinstance(made, bool):
            raise CapabilityError("key_malformed")
        members.append(({name: value for name, value in jwk.items() if name != _CREATED_AT}, float(made)))
    if not members:
        raise CapabilityError("key_malformed")
    return members


def _decode(content: bytes, kind: Any) -> Any:
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise CapabilityError("key_malformed") from None
