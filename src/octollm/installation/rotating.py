"""Making a new key beside an old one, in a home or in folders that were provisioned."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from octollm.capability import PublicKey, SigningKey
from octollm.capability.keyring import MAX_KEYS, OVERLAP_SECONDS, TRUST_SECONDS, DatedKey, KeyRing, trusted_indices
from octollm.clock import IdGenerator
from octollm.contracts.services import SERVICES
from octollm.errors import OctoError, SettingError
from octollm.installation.home import write_private
from octollm.installation.key_files import encode_key_ring, encode_public_keys, encode_public_rings
from octollm.installation.own_keys import (
    ORCHESTRATOR,
    ROOT_FILE,
    ROOTS_FILE,
    SERVICES_FILE,
    read_key_ring,
    read_roots,
)

ROOT = "root"
KEY_NAMES = (ROOT, *SERVICES)


@dataclass(frozen=True, slots=True)
class KeyRotationResult:
    """What was done. The key ``fresh`` signs from ``signs_at`` on; the one before is believed until ``until``."""

    name: str
    fresh: str
    before: str
    signs_at: float
    until: float
    written: tuple[Path, ...]


def rotate_signing_key(
    folder: Path, name: str, ids: IdGenerator, now: float, *, is_compromised: bool = False
) -> KeyRotationResult:
    """Make a new key for ``name`` (a built-in service, or ``root``) in the keys of a home or in provisioned folders.

    Each file is written whole, and those of whoever has to believe the new key before that of who signs with it.
    ``at_once`` is for a key that somebody else may have: the new one signs immediately, and the old one is believed
    no more. Raises ``setting_invalid`` for keys that are not there.
    """
    if name not in KEY_NAMES:
        raise SettingError(f"There is no key of {name}. There are {', '.join(KEY_NAMES)}.")
    provisioned = (folder / ORCHESTRATOR).is_dir()
    owner = ORCHESTRATOR if name == ROOT else name
    path = (folder / owner if provisioned else folder) / (ROOT_FILE if name == ROOT else f"{name}.jwk")
    old = read_key_ring(path, name)
    before = old.signing_key(now)
    made = now - OVERLAP_SECONDS - TRUST_SECONDS if is_compromised else now
    fresh = SigningKey.generate(name)
    ring = KeyRing([*([] if is_compromised else _believed_keys(old, now)), DatedKey(fresh, made)])
    files: dict[Path, bytes] = {}
    if provisioned and name == ROOT:
        for service in SERVICES:
            there = folder / service / ROOTS_FILE
            files[there] = encode_public_keys(_with_new_root(read_roots(there), fresh.public, made))
    elif provisioned:
        files[folder / ORCHESTRATOR / SERVICES_FILE] = encode_public_rings(_load_service_rings(folder) | {name: ring})
    files[path] = encode_key_ring(ring)
    for there, content in files.items():
        write_private(there, content, ids)
    until = now if is_compromised else made + OVERLAP_SECONDS + TRUST_SECONDS
    return KeyRotationResult(
        name, fresh.thumbprint, before.thumbprint, max(now, made + OVERLAP_SECONDS), until, tuple(files)
    )


def _believed_keys(ring: KeyRing, now: float) -> list[DatedKey]:
    dated = list(ring)
    kept = [dated[index] for index in trusted_indices([each.created_at for each in dated], now)]
    if len(kept) >= MAX_KEYS:
        raise OctoError(f"The key was changed {MAX_KEYS - 1} times within a day.", code="state_conflict")
    return kept


def _with_new_root(
    roots: list[tuple[PublicKey, float]], fresh: PublicKey, made: float
) -> list[tuple[PublicKey, float]]:
    """Return public root keys with a new one. The old ones stay: audit checkpoints of their time bear their names."""
    older = [(key, min(at, made - 1)) for key, at in roots]
    return [*older[-(MAX_KEYS - 1) :], (fresh, made)]


def _load_service_rings(folder: Path) -> dict[str, KeyRing]:
    return {name: read_key_ring(folder / name / f"{name}.jwk", name) for name in SERVICES}
