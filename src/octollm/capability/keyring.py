"""Key rotation: which key signs now and which are still trusted. A new key signs only after an overlap; the old one is trusted until its last token has expired."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from octollm.capability.errors import CapabilityError
from octollm.capability.jose import PublicKey, SigningKey
from octollm.capability.tokens import MAX_ACCESS_SECONDS, SKEW_SECONDS

OVERLAP_SECONDS = 600.0
"""From its making, a key does not sign for so long: services hear of it meanwhile, and are started again."""
TRUST_SECONDS = MAX_ACCESS_SECONDS + 2 * SKEW_SECONDS
"""After another key began to sign, a key is believed for so long."""
MAX_KEYS = 16


@dataclass(frozen=True, slots=True)
class DatedKey:
    """A key pair, and when it was made (epoch seconds; 0 for one that signs at once)."""

    key: SigningKey
    created_at: float = 0.0


def signing_index(created_at: Sequence[float], now: float) -> int:
    """Return the index of the key that signs at ``now``, of keys by the times of their making, oldest first."""
    ready = [index for index, at in enumerate(created_at) if at + OVERLAP_SECONDS <= now]
    return ready[-1] if ready else 0


def trusted_indices(created_at: Sequence[float], now: float) -> list[int]:
    """Return the indices of the keys that are believed at ``now``: those to come, and those not long out of use."""
    return [
        index
        for index in range(len(created_at))
        if index + 1 == len(created_at) or now < created_at[index + 1] + OVERLAP_SECONDS + TRUST_SECONDS
    ]


class PublicKeyRing:
    """The public keys of one name, with when each was made, oldest first."""

    def __init__(self, keys: Iterable[tuple[PublicKey, float]]) -> None:
        """Raise ``CapabilityError`` (``key_malformed``) for no key, or too many."""
        ordered = sorted(keys, key=lambda each: each[1])
        if not 0 < len(ordered) <= MAX_KEYS:
            raise CapabilityError("key_malformed")
        self._keys = [key for key, _ in ordered]
        self._made = [made for _, made in ordered]

    @classmethod
    def of(cls, key: PublicKey | PublicKeyRing) -> PublicKeyRing:
        """Return a ring of ``key``."""
        return key if isinstance(key, PublicKeyRing) else cls([(key, 0.0)])

    def trusted_keys(self, now: float) -> dict[str, PublicKey]:
        """Return the keys that are believed at ``now``, by thumbprint; the one that signs is first."""
        first = self._keys[signing_index(self._made, now)]
        rest = (self._keys[index] for index in trusted_indices(self._made, now))
        return {key.thumbprint: key for key in (first, *rest)}


class KeyRing:
    """The key pairs of one name, oldest first. With one, that signs always."""

    def __init__(self, keys: Iterable[DatedKey]) -> None:
        """Raise ``CapabilityError`` (``key_malformed``) for no key, or too many."""
        self._keys = tuple(sorted(keys, key=lambda each: each.created_at))
        if not 0 < len(self._keys) <= MAX_KEYS:
            raise CapabilityError("key_malformed")
        self._made = [each.created_at for each in self._keys]
        self._by_name = {each.key.thumbprint: each.key for each in self._keys}
        self.public = PublicKeyRing((each.key.public, each.created_at) for each in self._keys)
        """The public halves."""

    @classmethod
    def of(cls, key: SigningKey | KeyRing | Iterable[SigningKey]) -> KeyRing:
        """Return a ring of ``key``, or of several, of which the first signs."""
        if isinstance(key, KeyRing):
            return key
        keys = (key,) if isinstance(key, SigningKey) else tuple(key)
        return cls(DatedKey(each, -float(index) * OVERLAP_SECONDS) for index, each in enumerate(keys))

    def signing_key(self, now: float) -> SigningKey:
        """Return the key that signs at ``now`` (epoch seconds)."""
        return self._keys[signing_index(self._made, now)].key

    def find(self, thumbprint: str) -> SigningKey | None:
        """Return the key of that name; one that is out of use still proves what was lent to it."""
        return self._by_name.get(thumbprint)

    def trusted_keys(self, now: float) -> dict[str, PublicKey]:
        """Return the public keys that are believed at ``now``, by thumbprint; the one that signs is first."""
        return self.public.trusted_keys(now)

    def __iter__(self) -> Iterator[DatedKey]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


class TrustedRoots(Mapping[str, PublicKey]):
    """The root keys that a service believes, by thumbprint. They change while it runs: see :meth:`replace`."""

    def __init__(self, keys: Mapping[str, PublicKey], on_change: Callable[[TrustedRoots], None] | None = None) -> None:
        """``on_change`` is told when others are believed than before."""
        self._keys = dict(keys)
        self._on_change = on_change

    def replace(self, keys: Mapping[str, PublicKey]) -> bool:
        """Believe these and no others; say whether that changes anything. No keys at all are no news."""
        if not keys or self._keys == dict(keys):
            return False
        self._keys = dict(keys)
        if self._on_change is not None:
            self._on_change(self)
        return True

    def __getitem__(self, thumbprint: str) -> PublicKey:
        return self._keys[thumbprint]

    def get(self, thumbprint: str, default: PublicKey | None = None) -> PublicKey | None:  # type: ignore[override]
        """Return a key; this is asked at every call."""
        return self._keys.get(thumbprint, default)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)
