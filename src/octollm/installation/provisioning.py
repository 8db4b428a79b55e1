"""Key folders of services that run apart: provision, load, rotate; and the root keys to trust."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from octollm.capability import CapabilityError, PublicKey, SigningKey
from octollm.capability.keyring import (
    MAX_KEYS,
    OVERLAP_SECONDS,
    TRUST_SECONDS,
    DatedKey,
    KeyRing,
    PublicKeyRing,
    trusted_indices,
)
from octollm.clock import IdGenerator
from octollm.config import Settings, read_secret_file
from octollm.contracts.services import SERVICES
from octollm.errors import OctoError, SettingError, map_exceptions, map_file_errors
from octollm.installation.home import Home, open_keys, write_private
from octollm.installation.keys import (
    ROOT,
    decode_key_ring,
    decode_public_keys,
    decode_public_rings,
    encode_key_ring,
    encode_public_keys,
    encode_public_rings,
    generate_local_key,
    load_home_keys,
)

KEY_NAMES = (ROOT, *SERVICES)
"""The keys that can be rotated."""
ROOT_FILE = "root.jwk"
ROOTS_FILE = "roots.jwks"
SERVICES_FILE = "services.json"
LOCAL_FILE = "local.key"
ORCHESTRATOR = "orchestrator"


@dataclass(frozen=True, slots=True)
class RootKeys:
    """The keys that only the orchestrator has: the root key, the services' public keys, the owner's API key."""

    root: KeyRing
    services: Mapping[str, PublicKeyRing]
    local: str | None


@dataclass(frozen=True, slots=True)
class ServiceKeys:
    """A service's own keys and the root keys that it trusts; ``root`` is set for the orchestrator only."""

    own: KeyRing
    roots: Mapping[str, PublicKey]
    root: RootKeys | None = None


async def load_service_keys(settings: Settings, name: str, ids: IdGenerator, now: float) -> ServiceKeys:
    """Return the keys of the built-in service ``name``, with the root keys trusted at ``now`` (epoch seconds).

    ``OCTOLLM_KEYS`` names a folder made by :func:`provision_keys`; without it the keys of the home are used, and
    created if missing. Raises ``setting_invalid`` for keys that are missing, damaged or readable by others.
    """
    if settings.keys is not None:
        return load_provisioned_keys(settings.keys, name, now)
    async with open_keys(settings.home) as home:
        keys = load_home_keys(home, ids)
    root = RootKeys(keys.root, keys.public, keys.local) if name == ORCHESTRATOR else None
    return ServiceKeys(keys.services[name], keys.roots(now), root)


def provision_keys(folder: Path, ids: IdGenerator) -> list[Path]:
    """Make a folder of keys for each built-in service below ``folder``; return the files written.

    Existing files are kept, so that it can be run again. Only ``orchestrator/`` gets the root key. Raises
    ``home_unusable`` when a file cannot be written, ``setting_invalid`` for a damaged one.
    """
    written_files: list[Path] = []

    def load_or_write(path: Path, content: bytes) -> bytes:
        if path.exists():
            return path.read_bytes()
        write_private(path, content, ids)
        written_files.append(path)
        return content

    with map_file_errors(folder, "written", code="home_unusable"):
        for name in SERVICES:
            (folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        top = folder / ORCHESTRATOR
        own = {
            name: _decode_ring(
                folder / name / f"{name}.jwk",
                load_or_write(folder / name / f"{name}.jwk", encode_key_ring(KeyRing.of(SigningKey.generate(name)))),
                name,
            )
            for name in SERVICES
        }
        made = load_or_write(top / ROOT_FILE, encode_key_ring(KeyRing.of(SigningKey.generate(ROOT))))
        root = _decode_ring(top / ROOT_FILE, made, ROOT)
        roots = encode_public_keys([(each.key.public, each.created_at) for each in root])
        for name in SERVICES:
            load_or_write(folder / name / ROOTS_FILE, roots)
        load_or_write(top / SERVICES_FILE, encode_public_rings(own))
        load_or_write(top / LOCAL_FILE, generate_local_key().encode())
    return written_files


def load_provisioned_keys(folder: Path, name: str, now: float) -> ServiceKeys:
    """Return the keys provisioned for ``name`` in ``folder``, with the root keys trusted at ``now``.

    Raises ``setting_invalid`` for a file that is missing, damaged, or readable by every user of the machine.
    """
    own = read_key_ring(folder / f"{name}.jwk", name)
    roots = PublicKeyRing(read_roots(folder / ROOTS_FILE)).trusted_keys(now)
    if name != ORCHESTRATOR:
        return ServiceKeys(own, roots)
    root = read_key_ring(folder / ROOT_FILE, ROOT)
    try:
        services = decode_public_rings(_read_secret(folder / SERVICES_FILE))
    except CapabilityError as error:
        raise _damaged_error(folder / SERVICES_FILE) from error
    local = folder / LOCAL_FILE
    return ServiceKeys(
        own, roots, RootKeys(root, services, _read_secret(local).decode().strip() if local.exists() else None)
    )


def read_key_ring(path: Path, name: str) -> KeyRing:
    """Read the private keys of ``name``. Raises ``setting_invalid`` for a file that is damaged or world-readable."""
    return _decode_ring(path, _read_secret(path), name)


def read_roots(path: Path) -> list[tuple[PublicKey, float]]:
    """Read a JWK Set (RFC 7517 section 5): each key with its creation time. Raises ``setting_invalid``."""
    try:
        return decode_public_keys(_read_secret(path))
    except CapabilityError as error:
        raise _damaged_error(path) from error


def _read_secret(path: Path) -> bytes:
    # Less strict than check_private(): the secrets of a container may be links, owned by root and readable by a group.
    with map_exceptions(
        lambda error: SettingError(
            f"{path} cannot be read ({error.strerror}). OCTOLLM_KEYS must be the folder that `octollm keys provision`"
            " made for this service."
        ),
        OSError,
    ):
        return read_secret_file(path)


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


def load_trusted_roots(settings: Settings, file: Path | None = None) -> Mapping[str, PublicKey]:
    """Return the root keys of ``file`` (a JWK Set), else of ``OCTOLLM_KEYS``, else of the home.

    Retired keys are included: audit checkpoints of their time are signed by them. Raises ``setting_invalid`` when there
    is none of the three.
    """
    if file is not None:
        return _by_thumbprint(read_roots(file))
    if settings.keys is not None and (settings.keys / ROOTS_FILE).exists():
        return _by_thumbprint(read_roots(settings.keys / ROOTS_FILE))
    root = Home(settings.home).keys / ROOT_FILE
    if root.exists():
        return _by_thumbprint((each.key.public, each.created_at) for each in read_key_ring(root, ROOT))
    raise SettingError(
        "No root key is known on this machine. Copy the installation's root keys from a trusted place, such as the file"
        " roots.jwks that `octollm keys provision` wrote, and name it with --roots."
    )


def _by_thumbprint(keys: Iterable[tuple[PublicKey, float]]) -> Mapping[str, PublicKey]:
    return {key.thumbprint: key for key, _made in keys}


@dataclass(frozen=True, slots=True)
class KeyRotationResult:
    """The key ``fresh`` signs from ``signs_at`` on; the key ``before`` is trusted until ``until`` (epoch seconds)."""

    name: str
    fresh: str
    before: str
    signs_at: float
    until: float
    files: tuple[Path, ...]


def rotate_signing_key(
    folder: Path, name: str, ids: IdGenerator, now: float, *, is_compromised: bool = False
) -> KeyRotationResult:
    """Make a new key for ``name`` (a built-in service, or ``root``) in the keys of a home or in provisioned folders.

    With ``is_compromised`` the new key signs immediately and the old one is no longer trusted. Raises
    ``setting_invalid`` for keys that are missing.
    """
    if name not in KEY_NAMES:
        raise SettingError(f"There is no key of {name}. There are {', '.join(KEY_NAMES)}.")
    provisioned = (folder / ORCHESTRATOR).is_dir()
    owner = ORCHESTRATOR if name == ROOT else name
    path = (folder / owner if provisioned else folder) / (ROOT_FILE if name == ROOT else f"{name}.jwk")
    old = read_key_ring(path, name)
    before = old.signing_key(now)
    # A backdated key is past its overlap, so it signs at once.
    made = now - OVERLAP_SECONDS - TRUST_SECONDS if is_compromised else now
    fresh = SigningKey.generate(name)
    ring = KeyRing([*([] if is_compromised else _believed_keys(old, now)), DatedKey(fresh, made)])
    files: dict[Path, bytes] = {}
    if provisioned and name == ROOT:
        for service in SERVICES:
            roots_file = folder / service / ROOTS_FILE
            files[roots_file] = encode_public_keys(_with_new_root(read_roots(roots_file), fresh.public, made))
    elif provisioned:
        files[folder / ORCHESTRATOR / SERVICES_FILE] = encode_public_rings(_load_service_rings(folder) | {name: ring})
    files[path] = encode_key_ring(ring)
    # The verifiers' files come first: nobody signs with a key that the others do not know yet.
    for file, content in files.items():
        write_private(file, content, ids)
    until = now if is_compromised else made + OVERLAP_SECONDS + TRUST_SECONDS
    return KeyRotationResult(
        name, fresh.thumbprint, before.thumbprint, max(now, made + OVERLAP_SECONDS), until, tuple(files)
    )


def _believed_keys(ring: KeyRing, now: float) -> list[DatedKey]:
    dated = list(ring)
    trusted = [dated[index] for index in trusted_indices([key.created_at for key in dated], now)]
    if len(trusted) >= MAX_KEYS:
        raise OctoError(f"The key was changed {MAX_KEYS - 1} times within a day.", code="state_conflict")
    return trusted


def _with_new_root(
    roots: list[tuple[PublicKey, float]], fresh: PublicKey, made: float
) -> list[tuple[PublicKey, float]]:
    """Add a new public root key. Old ones stay: audit checkpoints of their time name them."""
    older = [(key, min(at, made - 1)) for key, at in roots]
    return [*older[-(MAX_KEYS - 1) :], (fresh, made)]


def _load_service_rings(folder: Path) -> dict[str, KeyRing]:
    return {name: read_key_ring(folder / name / f"{name}.jwk", name) for name in SERVICES}
