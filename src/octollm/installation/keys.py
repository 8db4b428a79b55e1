"""The keys of one installation: the root's, one for each service, and the local user's API key."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field

from octollm.capability import CapabilityError, PublicKey, SigningKey
from octollm.capability.keyring import KeyRing, PublicKeyRing
from octollm.clock import IdGenerator
from octollm.contracts.services import SERVICES
from octollm.errors import SettingError
from octollm.installation.home import Home, read_private, write_private
from octollm.installation.key_files import decode_key_ring, encode_key_ring
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
    """Read the keys of ``check_home``, making those that are not there yet.

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
