"""Key rotation: which key signs now and which are still trusted.

A new key signs only after an overlap; the old one is trusted until its last token has expired.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from octollm.capability.errors import CapabilityError
from octollm.capability.jose import PublicKey, SigningKey
from octollm.capability.tokens import MAX_ACCESS_SECONDS, SKEW_SECONDS

OVERLAP_SECONDS = 600.0
"""How long a new key is published before it signs, so that every service trusts it by then."""
TRUST_SECONDS = MAX_ACCESS_SECONDS + 2 * SKEW_SECONDS
"""How long a key is trusted after its successor began to sign."""
MAX_KEYS = 16
_NONCE_BYTES = 12


@dataclass(frozen=True, slots=True)
class DatedKey:
    """A key pair and its time of creation (epoch seconds; 0 for one that signs at once)."""

    key: SigningKey
    created_at: float = 0.0


def signing_index(created_at: Sequence[float], now: float) -> int:
    """Return the index of the key that signs at ``now``, given the keys' times of creation, oldest first."""
    ready = [index for index, at in enumerate(created_at) if at + OVERLAP_SECONDS <= now]
    # Without a key that is old enough the oldest signs, so a new installation can sign at once.
    return ready[-1] if ready else 0


def trusted_indices(created_at: Sequence[float], now: float) -> list[int]:
    """Return the indices of the keys that are trusted at ``now``: future ones, and recently replaced ones."""
    return [
        index
        for index in range(len(created_at))
        # A key signs until the overlap of its successor ends; its last token then lives for TRUST_SECONDS at most.
        if index + 1 == len(created_at) or now < created_at[index + 1] + OVERLAP_SECONDS + TRUST_SECONDS
    ]


class PublicKeyRing:
    """The public keys of one name with their times of creation, oldest first."""

    def __init__(self, keys: Iterable[tuple[PublicKey, float]]) -> None:
        """Raise ``CapabilityError`` (``key_malformed``) for no key, or too many."""
        ordered = sorted(keys, key=lambda each: each[1])
        if not 0 < len(ordered) <= MAX_KEYS:
            raise CapabilityError("key_malformed")
        self._keys = [key for key, _ in ordered]
        self._created_at = [created_at for _, created_at in ordered]

    @classmethod
    def of(cls, key: PublicKey | PublicKeyRing) -> PublicKeyRing:
        """Return a ring of ``key``."""
        return key if isinstance(key, PublicKeyRing) else cls([(key, 0.0)])

    def trusted_keys(self, now: float) -> dict[str, PublicKey]:
        """Return the keys that are trusted at ``now``, by thumbprint; the signing one is first."""
        first = self._keys[signing_index(self._created_at, now)]
        rest = (self._keys[index] for index in trusted_indices(self._created_at, now))
        return {key.thumbprint: key for key in (first, *rest)}


class KeyRing:
    """The key pairs of one name, oldest first. A lone key always signs."""

    def __init__(self, keys: Iterable[DatedKey]) -> None:
        """Raise ``CapabilityError`` (``key_malformed``) for no key, or too many."""
        self._keys = tuple(sorted(keys, key=lambda each: each.created_at))
        if not 0 < len(self._keys) <= MAX_KEYS:
            raise CapabilityError("key_malformed")
        self._created_at = [each.created_at for each in self._keys]
        self._by_thumbprint = {each.key.thumbprint: each.key for each in self._keys}
        self.public = PublicKeyRing((each.key.public, each.created_at) for each in self._keys)
        """The public halves."""

    @classmethod
    def of(cls, key: SigningKey | KeyRing | Iterable[SigningKey]) -> KeyRing:
        """Return a ring of one key, or of several of which the first signs."""
        if isinstance(key, KeyRing):
            return key
        keys = (key,) if isinstance(key, SigningKey) else tuple(key)
        # Dated an overlap apart, so that the first is the newest and signs at once.
        return cls(DatedKey(each, -float(index) * OVERLAP_SECONDS) for index, each in enumerate(keys))

    def signing_key(self, now: float) -> SigningKey:
        """Return the key that signs at ``now`` (epoch seconds)."""
        return self._keys[signing_index(self._created_at, now)].key

    def find(self, thumbprint: str) -> SigningKey | None:
        """Return the key with that thumbprint; a replaced key still serves the grants that name it."""
        return self._by_thumbprint.get(thumbprint)

    def trusted_keys(self, now: float) -> dict[str, PublicKey]:
        """Return the public keys that are trusted at ``now``, by thumbprint; the signing one is first."""
        return self.public.trusted_keys(now)

    def derive_keys(self, purpose: str, now: float, *, retired: bool = False) -> list[bytes]:
        """Return a symmetric key of 32 bytes for each trusted key pair, that of the signing one first.

        With ``retired`` those of key pairs that are no longer trusted follow. The keys are derived by HKDF (RFC 5869),
        so they tell nothing of the private keys or of other purposes.
        """
        names = [*self.trusted_keys(now), *(self._by_thumbprint if retired else ())]
        pairs = [self.find(thumbprint) for thumbprint in dict.fromkeys(names)]
        return [
            HKDF(SHA256(), 32, None, purpose.encode()).derive(pair.private.private_bytes_raw())
            for pair in pairs
            if pair is not None
        ]

    def __iter__(self) -> Iterator[DatedKey]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


class SecretCipher:
    """Encrypts secrets that are stored (AES-256-GCM), so that reading the store reveals none.

    ``load_keys`` returns keys of 32 bytes: the first encrypts, each may decrypt. ``context`` names where a secret is
    stored and is authenticated too: a ciphertext that was moved elsewhere does not decrypt.
    """

    def __init__(self, load_keys: Callable[[], Sequence[bytes]]) -> None:
        self._load_keys = load_keys

    def encrypt(self, secret: bytes, context: bytes) -> bytes:
        """Return the nonce followed by the ciphertext."""
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + AESGCM(self._load_keys()[0]).encrypt(nonce, secret, context)

    def decrypt(self, sealed: bytes, context: bytes) -> bytes | None:
        """Return the secret; ``None`` when no present key decrypts it."""
        opened = (_decrypt(key, sealed, context) for key in self._load_keys())
        return next((secret for secret in opened if secret is not None), None)

    def is_current(self, sealed: bytes, context: bytes) -> bool:
        """Return whether the key that encrypts now also decrypts ``sealed``, or no key does."""
        first, *others = (_decrypt(key, sealed, context) for key in self._load_keys())
        return first is not None or all(each is None for each in others)


def _decrypt(key: bytes, sealed: bytes, context: bytes) -> bytes | None:
    with contextlib.suppress(InvalidTag, ValueError):  # a ValueError: too short to hold a nonce
        return AESGCM(key).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], context)
    return None


class TrustedRoots(Mapping[str, PublicKey]):
    """The root keys that a service trusts, by thumbprint. They change while it runs: see :meth:`replace`."""

    def __init__(self, keys: Mapping[str, PublicKey], on_change: Callable[[TrustedRoots], None] | None = None) -> None:
        """``on_change`` is called when the trusted keys change."""
        self._keys = dict(keys)
        self._on_change = on_change

    def replace(self, keys: Mapping[str, PublicKey]) -> bool:
        """Trust these keys and no others; return whether that changes anything. An empty mapping is ignored."""
        # Without any root no later directory could be verified: the service would never trust a key again.
        if not keys or self._keys == dict(keys):
            return False
        self._keys = dict(keys)
        if self._on_change is not None:
            self._on_change(self)
        return True

    def __getitem__(self, thumbprint: str) -> PublicKey:
        return self._keys[thumbprint]

    def get(self, thumbprint: str, default: PublicKey | None = None) -> PublicKey | None:  # type: ignore[override]
        """Return a key, without the detour of ``Mapping.get``: every call looks one up."""
        return self._keys.get(thumbprint, default)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)
