"""The public root keys that this machine knows, for whoever checks what the root signed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from octollm.capability import PublicKey
from octollm.config import Settings
from octollm.errors import SettingError
from octollm.installation.home import Home
from octollm.installation.own_keys import ROOT_FILE, ROOTS_FILE, read_key_ring, read_roots


def load_trusted_roots(settings: Settings, file: Path | None = None) -> Mapping[str, PublicKey]:
    """Return the root keys of ``file`` (a JWK Set), of ``OCTOLLM_KEYS``, or of the home, whichever is first.

    Those that are out of use are among them: they signed what was sealed in their time.

    Raises ``setting_invalid`` where there are none, with what to do.
    """
    if file is not None:
        return _by_thumbprint(read_roots(file))
    if settings.keys is not None and (settings.keys / ROOTS_FILE).exists():
        return _by_thumbprint(read_roots(settings.keys / ROOTS_FILE))
    root = Home(settings.home).keys / ROOT_FILE
    if root.exists():
        return _by_thumbprint((each.key.public, each.created_at) for each in read_key_ring(root, "root"))
    raise SettingError(
        "No root key is known on this machine. Save the installation's from a place that you trust, such as the file"
        " roots.jwks that `octollm keys provision` wrote, and name it with --roots."
    )


def _by_thumbprint(keys: Iterable[tuple[PublicKey, float]]) -> Mapping[str, PublicKey]:
    return {key.thumbprint: key for key, _made in keys}
