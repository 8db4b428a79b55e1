"""The keys of one service in a process of its own: those of the home, or a folder that was provisioned for it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from octollm.capability import CapabilityError, PublicKey, SigningKey
from octollm.capability.keyring import KeyRing, PublicKeyRing
from octollm.clock import IdGenerator
from octollm.config import Settings
from octollm.contracts.services import SERVICES
from octollm.errors import OctoError, SettingError
from octollm.installation.home import open_keys, write_private
from octollm.installation.key_files import (
    decode_key_ring,
    decode_public_keys,
    decode_public_rings,
    encode_key_ring,
    encode_public_keys,
    encode_public_rings,
)
from octollm.installation.keys import generate_local_key, load_home_keys

ROOT_FILE = "root.jwk"
ROOTS_FILE = "roots.jwks"
SERVICES_FILE = "services.json"
LOCAL_FILE = "local.key"
ORCHESTRATOR = "orchestrator"


@dataclass(frozen=True, slots=True)
class RootKeys:
    """What the orchestrator alone has: the root key, the services' public keys, the first credential."""

    root: KeyRing
    services: Mapping[str, PublicKeyRing]
    local: str | None


@dataclass(frozen=True, slots=True)
class ServiceKeys:
    """A service's own key and the roots that it trusts; ``root`` is the orchestrator's."""

    own: KeyRing
    roots: Mapping[str, PublicKey]
    root: RootKeys | None = None


async def load_service_keys(settings: Settings, name: str, ids: IdGenerator, now: float) -> ServiceKeys:
    """Return the keys of the built-in service ``name``, with the roots that are believed at ``now`` (epoch seconds).

    ``OCTOLLM_KEYS`` names a folder made by :func:`provision`; without it they are those of the home, made if they
    are not there. Raises ``setting_invalid`` for keys that are missing, damaged or open to others.
    """
    if settings.keys is not None:
        return load_provisioned_keys(settings.keys, name, now)
    async with open_keys(settings.home) as home:
        keys = load_home_keys(home, ids)
    root = RootKeys(keys.root, keys.public, keys.local) if name == ORCHESTRATOR else None
    return ServiceKeys(keys.services[name], keys.roots(now), root)


def provision_keys(folder: Path, ids: IdGenerator) -> list[Path]:
    """Make a folder of keys for each built-in service below ``folder``, and return the files that were written.

    A file that is there is kept, so that it can be run again; ``orchestrator/`` alone gets the root key. Raises
    ``home_unusable`` when a file cannot be written, ``setting_invalid`` for a damaged one.
    """
    written: list[Path] = []

    def kept_or_made(path: Path, content: bytes) -> bytes:
        if path.exists():
            return path.read_bytes()
        write_private(path, content, ids)
        written.append(path)
        return content

    try:
        for name in SERVICES:
            (folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        top = folder / ORCHESTRATOR
        own = {
            name: _decode_ring(
                folder / name / f"{name}.jwk",
                kept_or_made(folder / name / f"{name}.jwk", encode_key_ring(KeyRing.of(SigningKey.generate(name)))),
                name,
            )
            for name in SERVICES
        }
        made = kept_or_made(top / ROOT_FILE, encode_key_ring(KeyRing.of(SigningKey.generate("root"))))
        root = _decode_ring(top / ROOT_FILE, made, "root")
        roots = encode_public_keys([(each.key.public, each.created_at) for each in root])
        for name in SERVICES:
            kept_or_made(folder / name / ROOTS_FILE, roots)
        kept_or_made(top / SERVICES_FILE, encode_public_rings(own))
        kept_or_made(top / LOCAL_FILE, generate_local_key().encode())
    except OSError as error:
        raise OctoError(f"{folder} cannot be written: {error.strerror}.", code="home_unusable") from error
    return written


def load_provisioned_keys(folder: Path, name: str, now: float) -> ServiceKeys:
    """Return the keys that were provisioned for ``name`` in ``folder``, with the roots that are believed at ``now``.

    Raises ``setting_invalid`` for a file that is missing, damaged, or open to every user of the machine.
    """
    own = read_key_ring(folder / f"{name}.jwk", name)
    roots = PublicKeyRing(read_roots(folder / ROOTS_FILE)).trusted_keys(now)
    if name != ORCHESTRATOR:
        return ServiceKeys(own, roots)
    root = read_key_ring(folder / ROOT_FILE, "root")
    try:
        services = decode_public_rings(_read_secret(folder / SERVICES_FILE))
    except CapabilityError as error:
        raise _damaged_error(folder / SERVICES_FILE) from error
    local = folder / LOCAL_FILE
    return ServiceKeys(
        own, roots, RootKeys(root, services, _read_secret(local).decode().strip() if local.exists() else None)
    )


def read_key_ring(path: Path, name: str) -> KeyRing:
    """Return the private keys of ``name``; raise ``setting_invalid`` for a file that is damaged or open to others."""
    return _decode_ring(path, _read_secret(path), name)


def read_roots(path: Path) -> list[tuple[PublicKey, float]]:
    """Return every key of a JWK Set (RFC 7517 section 5), with when it was made; raise ``setting_invalid``."""
    try:
        return decode_public_keys(_read_secret(path))
    except CapabilityError as error:
        raise _damaged_error(path) from error


def _read_secret(path: Path) -> bytes:
    """Read a secret of a folder that was provisioned: a container's secrets may be links, owned by root."""
    try:
        if os.name == "posix" and path.stat().st_mode & 0o007:
            raise SettingError(f"{path} holds secrets and every user may read it. Run `chmod o-rwx {path}`.")
        return path.read_bytes()
    except OSError as error:
        raise SettingError(
            f"{path} cannot be read ({error.strerror}). OCTOLLM_KEYS must be the folder that `octollm keys provision`"
            " made for this service."
        ) from error


def _decode_ring(path: Path, content: bytes, name: str) -> KeyRing:
    try:
        return decode_key_ring(content, name)
    except CapabilityError as error:
        raise _damaged_error(path) from error


def _damaged_error(path: Path) -> SettingError:
    return SettingError(
        f"{path} is not what `octollm keys provision` wrote. Restore it from your backup, or delete it and provision"
        " again, which ends what the old key signed."
    )
