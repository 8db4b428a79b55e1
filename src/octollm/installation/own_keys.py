"""The keys of one service in a process of its own: those of the home, or a folder that was provisioned for it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from octollm.capability import CapabilityError, PublicKey, SigningKey
from octollm.capability.keys import jwks_of
from octollm.clock import Ids
from octollm.config import Settings
from octollm.contracts.services import SERVICES
from octollm.errors import OctoError, SettingError
from octollm.installation.home import open_keys, write_private
from octollm.installation.keys import load_keys, new_local_key

ROOT_FILE = "root.jwk"
ROOTS_FILE = "roots.jwks"
SERVICES_FILE = "services.json"
LOCAL_FILE = "local.key"
ORCHESTRATOR = "orchestrator"


@dataclass(frozen=True, slots=True)
class RootKeys:
    """What the orchestrator alone has: the root key, the services' public keys, the first credential."""

    root: SigningKey
    services: Mapping[str, PublicKey]
    local: str | None


@dataclass(frozen=True, slots=True)
class OwnKeys:
    """A service's own key and the roots that it trusts; ``root`` is the orchestrator's."""

    own: SigningKey
    roots: Mapping[str, PublicKey]
    root: RootKeys | None = None


async def own_keys(settings: Settings, name: str, ids: Ids) -> OwnKeys:
    """Return the keys of the built-in service ``name``.

    ``OCTOLLM_KEYS`` names a folder made by :func:`provision`; without it they are those of the home, made if they
    are not there. Raises ``setting_invalid`` for keys that are missing, damaged or open to others.
    """
    if settings.keys is not None:
        return read_folder(settings.keys, name)
    async with open_keys(settings.home) as home:
        keys = load_keys(home, ids)
    root = RootKeys(keys.root, keys.public, keys.local) if name == ORCHESTRATOR else None
    return OwnKeys(keys.services[name], keys.roots, root)


def provision(folder: Path, ids: Ids) -> list[Path]:
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
            name: _signing_key(
                folder / name / f"{name}.jwk",
                kept_or_made(folder / name / f"{name}.jwk", _private_text(SigningKey.generate(name))),
                name,
            )
            for name in SERVICES
        }
        root = _signing_key(
            top / ROOT_FILE, kept_or_made(top / ROOT_FILE, _private_text(SigningKey.generate("root"))), "root"
        )
        roots = msgspec.json.encode(jwks_of({root.thumbprint: root.public}))
        for name in SERVICES:
            kept_or_made(folder / name / ROOTS_FILE, roots)
        kept_or_made(top / SERVICES_FILE, msgspec.json.encode({name: key.public.to_jwk() for name, key in own.items()}))
        kept_or_made(top / LOCAL_FILE, new_local_key().encode())
    except OSError as error:
        raise OctoError(f"{folder} cannot be written: {error.strerror}.", code="home_unusable") from error
    return written


def read_folder(folder: Path, name: str) -> OwnKeys:
    """Return the keys that were provisioned for ``name`` in ``folder``.

    Raises ``setting_invalid`` for a file that is missing, damaged, or open to every user of the machine.
    """
    own = read_signing_key(folder / f"{name}.jwk", name)
    roots = read_jwks(folder / ROOTS_FILE)
    if name != ORCHESTRATOR:
        return OwnKeys(own, roots)
    root = read_signing_key(folder / ROOT_FILE, "root")
    services = {
        service: _public_key(folder / SERVICES_FILE, jwk)
        for service, jwk in _decoded(folder / SERVICES_FILE, _read(folder / SERVICES_FILE), dict[str, Any]).items()
    }
    local = folder / LOCAL_FILE
    return OwnKeys(own, roots, RootKeys(root, services, _read(local).decode().strip() if local.exists() else None))


def read_signing_key(path: Path, name: str) -> SigningKey:
    """Return the private key of ``name``; raise ``setting_invalid`` for a file that is damaged or open to others."""
    return _signing_key(path, _read(path), name)


def read_jwks(path: Path) -> Mapping[str, PublicKey]:
    """Return the public keys of a JWK Set (RFC 7517 section 5) by thumbprint; raise ``setting_invalid``."""
    listed = _decoded(path, _read(path), dict[str, list[dict[str, Any]]]).get("keys", [])
    keys = [_public_key(path, jwk) for jwk in listed]
    if not keys:
        raise SettingError(f"{path} has no key. Provision the keys again: octollm keys provision")
    return {key.thumbprint: key for key in keys}


def _read(path: Path) -> bytes:
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


def _private_text(key: SigningKey) -> bytes:
    return msgspec.json.encode(key.to_jwk(private=True))


def _signing_key(path: Path, content: bytes, name: str) -> SigningKey:
    try:
        return SigningKey.from_jwk(_decoded(path, content, dict[str, object]), name)
    except CapabilityError as error:
        raise _damaged(path) from error


def _public_key(path: Path, jwk: Mapping[str, object]) -> PublicKey:
    try:
        return PublicKey.from_jwk(jwk)
    except CapabilityError as error:
        raise _damaged(path) from error


def _decoded(path: Path, content: bytes, kind: Any) -> Any:
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _damaged(path) from error


def _damaged(path: Path) -> SettingError:
    return SettingError(
        f"{path} is not what `octollm keys provision` wrote. Restore it from your backup, or delete it and provision"
        " again, which ends what the old key signed."
    )
