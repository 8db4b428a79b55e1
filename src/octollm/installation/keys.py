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
from octollm.contracts.services import SERVICES
from octollm.errors import SettingError
from octollm.installation.home import Home, read_private, write_private
from octollm.services.orchestrator.accounts import KEY_PREFIX, LOCAL_KEY_ID

ROOT = "root"


@dataclass(frozen=True, slots=True)
class HomeKeys:
    """The keys of a home. ``local`` opens the public door for the home's owner; it is shown nowhere."""

    root: KeyRing
    services: Mapping[str, KeyRing]
    local: str = field(repr=False)

    def roots(self, now: float) -> Mapping[str, PublicKey]:
        """Return the root keys that are believed at ``now`` (epoch seconds), by thumbprint."""
        return self.root.trusted_keys(now)

    @property
    def public(self) -> Mapping[str, PublicKeyRing]:
        """Return the services' public keys by name."""
        return {name: ring.public for name, ring in self.services.items()}


def load_home_keys(home: Home, ids: IdGenerator) -> HomeKeys:
    """Read the keys of ``home``, making those that are not there yet.

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
    """Return a fresh credential for the first user of an installation, as a line of text."""
    return f"{KEY_PREFIX}{LOCAL_KEY_ID}_{secrets.token_urlsafe(32)}\n"


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
