"""Keys as JWK files (RFC 7517), and the keys of a home: the root's, each service's, the local API key."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from octollm.capability import CapabilityError, PublicKey, SigningKey
from octollm.capability.jose import to_published_jwk
from octollm.capability.keyring import DatedKey, KeyRing, PublicKeyRing
from octollm.clock import IdGenerator
from octollm.contracts.auth import API_KEY_PREFIX, LOCAL_KEY_ID
from octollm.contracts.services import SERVICES
from octollm.errors import SettingError
from octollm.installation.home import Home, read_private, write_private

ROOT = "root"
"""The name of the root key, beside those of the services."""
_CREATED_AT = "iat"
"""The member of a JWK in our files for when the key was made, in epoch seconds."""


@dataclass(frozen=True, slots=True)
class HomeKeys:
    """The keys of a home. ``local`` is the API key of the home's owner; it is printed nowhere."""

    root: KeyRing
    services: Mapping[str, KeyRing]
    local: str = field(repr=False)

    def roots(self, now: float) -> Mapping[str, PublicKey]:
        """Return the root keys that are trusted at ``now`` (epoch seconds), by thumbprint."""
        return self.root.trusted_keys(now)

    @property
    def public(self) -> Mapping[str, PublicKeyRing]:
        """The services' public keys, by name."""
        return {name: ring.public for name, ring in self.services.items()}


def load_home_keys(home: Home, ids: IdGenerator) -> HomeKeys:
    """Read the keys of ``home``, and create those that are missing.

    Raises ``setting_invalid`` for a file that others may read or that is no key.
    """
    services = {name: _load_or_create_ring(home, name, ids) for name in SERVICES}
    return HomeKeys(_load_or_create_ring(home, ROOT, ids), services, _load_or_create_local_key(home, ids))


def _load_or_create_ring(home: Home, name: str, ids: IdGenerator) -> KeyRing:
    path = home.keys / f"{name}.jwk"
    if not path.exists():
        write_private(path, encode_key_ring(KeyRing.of(SigningKey.generate(name))), ids)
    try:
        return decode_key_ring(read_private(path).encode(), name)
    except (CapabilityError, UnicodeDecodeError) as error:
        raise SettingError(
            f"{path} is not a key. Restore it from your backup; or delete it to have a new one made, which ends"
            " every token that the old one signed."
        ) from error


def _load_or_create_local_key(home: Home, ids: IdGenerator) -> str:
    path = home.local_key_file
    if not path.exists():
        write_private(path, generate_local_key().encode(), ids)
    return read_private(path)


def generate_local_key() -> str:
    """Return a new API key for the owner of an installation, as a line of text."""
    return f"{API_KEY_PREFIX}{LOCAL_KEY_ID}_{secrets.token_urlsafe(32)}\n"


class _JwkSetFile(msgspec.Struct, frozen=True):
    keys: list[dict[str, Any]]


def decode_key_ring(content: bytes, name: str) -> KeyRing:
    """Decode the key pairs of a private file. Raises ``CapabilityError`` (``key_malformed``)."""
    return KeyRing(DatedKey(SigningKey.from_jwk(jwk, name), created_at) for jwk, created_at in _parse_members(content))


def encode_key_ring(ring: KeyRing) -> bytes:
    """Encode a private file: a JWK Set, or a plain JWK for one key without a creation time."""
    keys = [(each.key.to_jwk(private=True), each.created_at) for each in ring]
    if len(keys) == 1 and keys[0][1] == 0:
        return msgspec.json.encode(keys[0][0])
    return msgspec.json.encode(_JwkSetFile([{**jwk, _CREATED_AT: created_at} for jwk, created_at in keys]))


def decode_public_keys(content: bytes) -> list[tuple[PublicKey, float]]:
    """Decode the public keys of a file, with their creation times. Raises ``CapabilityError`` (``key_malformed``)."""
    return [(PublicKey.from_jwk(jwk), created_at) for jwk, created_at in _parse_members(content)]


def encode_public_keys(keys: list[tuple[PublicKey, float]]) -> bytes:
    """Encode a file of public keys with their creation times."""
    return msgspec.json.encode(_JwkSetFile([_public_member(key, created_at) for key, created_at in keys]))


def decode_public_rings(content: bytes) -> dict[str, PublicKeyRing]:
    """Decode a file with the public keys of several names. Raises ``CapabilityError`` (``key_malformed``)."""
    sets = _decode(content, dict[str, dict[str, Any]])
    return {name: PublicKeyRing(decode_public_keys(msgspec.json.encode(value))) for name, value in sets.items()}


def encode_public_rings(rings: Mapping[str, KeyRing]) -> bytes:
    """Encode a file with the public keys of several names."""
    return msgspec.json.encode(
        {
            name: _JwkSetFile([_public_member(each.key.public, each.created_at) for each in ring])
            for name, ring in rings.items()
        }
    )


def _public_member(key: PublicKey, created_at: float) -> dict[str, Any]:
    member: dict[str, Any] = {**to_published_jwk(key)}
    return {**member, _CREATED_AT: created_at} if created_at else member


def _parse_members(content: bytes) -> list[tuple[dict[str, object], float]]:
    document = _decode(content, dict[str, Any])
    keys = _decode(content, _JwkSetFile).keys if "keys" in document else [document]
    members: list[tuple[dict[str, object], float]] = []
    for jwk in keys:
        created_at = jwk.get(_CREATED_AT, 0.0)
        if not isinstance(created_at, int | float) or isinstance(created_at, bool):
            raise CapabilityError("key_malformed")
        members.append(({name: value for name, value in jwk.items() if name != _CREATED_AT}, float(created_at)))
    if not members:
        raise CapabilityError("key_malformed")
    return members


def _decode(content: bytes, kind: Any) -> Any:
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise CapabilityError("key_malformed") from None
