"""The public root keys that this machine knows, for whoever checks what the root signed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from octollm.capability import PublicKey
from octollm.config import Settings
from octollm.errors import SettingError
from octollm.installation.home import Home
from octollm.installation.own_keys import ROOT_FILE, ROOTS_FILE, read_jwks, read_signing_key


def known_roots(settings: Settings, file: Path | None = None) -> Mapping[str, PublicKey]:
    """Return the root keys of ``file`` (a JWK Set), of ``OCTOLLM_KEYS``, or of the home, whichever is first.

    Raises ``setting_invalid`` where there are none, with what to do.
    """
    if file is not None:
        return read_jwks(file)
    if settings.keys is not None and (settings.keys / ROOTS_FILE).exists():
        return read_jwks(settings.keys / ROOTS_FILE)
    root = Home(settings.home).keys / ROOT_FILE
    if root.exists():
        key = read_signing_key(root, "root")
        return {key.thumbprint: key.public}
    raise SettingError(
        "No root key is known on this machine. Save the installation's from a place that you trust, such as the file"
        " roots.jwks that `octollm keys provision` wrote, and name it with --roots."
    )
