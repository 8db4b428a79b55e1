"""The keys of one installation: the root's, one for each service, and the local user's API key."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from octollm.capability import CapabilityError, PublicKey, SigningKey
from octollm.clock import Ids
from octollm.contracts.services import SERVICES
from octollm.errors import SettingError
from octollm.installation.home import Home, read_private, write_private
from octollm.services.orchestrator.accounts import KEY_PREFIX, LOCAL_KEY_ID

_ROOT = "root"


@dataclass(frozen=True, slots=True)
class HomeKeys:
    """The keys of a home. ``local`` opens the public door for the home's owner; it is shown nowhere."""

    root: SigningKey
    services: Mapping[str, SigningKey]
    local: str = field(repr=False)

    @property
    def roots(self) -> Mapping[str, PublicKey]:
        """Return the pinned root keys by thumbprint."""
        return {self.root.thumbprint: self.root.public}

    @property
    def public(self) -> Mapping[str, PublicKey]:
        """Return the services' public keys by name."""
        return {name: key.public for name, key in self.services.items()}


def load_keys(home: Home, ids: Ids) -> HomeKeys:
    """Read the keys of ``home``, making those that are not there yet.

    Raises ``setting_invalid`` for a file that others may read or that is no key.
    """
    services = {name: _signing_key(home, name, ids) for name in SERVICES}
    return HomeKeys(_signing_key(home, _ROOT, ids), services, _local_key(home, ids))


def _signing_key(home: Home, name: str, ids: Ids) -> SigningKey:
    path = home.keys / f"{name}.jwk"
    if not path.exists():
        write_private(path, msgspec.json.encode(SigningKey.generate(name).to_jwk(private=True)), ids)
    try:
        return SigningKey.from_jwk(msgspec.json.decode(read_private(path), type=dict[str, object]), name)
    except (CapabilityError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SettingError(
            f"{path} is not a key. Restore it from your backup; or delete it to have a new one made, which ends"
            " every token that the old one signed."
        ) from error


def _local_key(home: Home, ids: Ids) -> str:
    path = home.local_key_file
    if not path.exists():
        write_private(path, new_local_key().encode(), ids)
    return read_private(path)


def new_local_key() -> str:
    """Return a fresh credential for the first user of an installation, as a line of text."""
    return f"{KEY_PREFIX}{LOCAL_KEY_ID}_{secrets.token_urlsafe(32)}\n"
