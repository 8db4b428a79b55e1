"""Which Host and Origin are ours, and which paths are well formed. No I/O."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from octollm.errors import OctoError

LOOPBACK_NAMES = frozenset({"127.0.0.1", "localhost", "[::1]"})
MAX_PATH = 1024

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::([0-9]{1,5}))?")
_AMBIGUOUS_ENCODING = re.compile(rb"%(?:2f|5c|2e|25|7f|[01][0-9a-f])", re.IGNORECASE)
_PRINTABLE_ASCII = re.compile(rb"[!-~]+")


class AllowedHosts:
    """The names under which this door is reached: this machine's with our port, and those of the setting.

    ``allowed`` are host names, each with a port or, for any port, without. A name that is not ours in ``Host`` is
    how DNS rebinding shows.
    """

    def __init__(self, allowed_hosts: Sequence[str], cors_origins: Sequence[str] = ()) -> None:
        """``callers`` are origins whose pages may call with a key of their own: they are not ours for all that."""
        self._allowed = frozenset(allowed_hosts)
        self._cors_origins = frozenset(cors_origins)

    def allows_origin(self, origin: str, port: int) -> bool:
        """Say whether a page of ``origin`` may change something, given that it shows a credential."""
        return origin in self._cors_origins or self.is_own_origin(origin, port)

    def is_allowed_host(self, host: str, port: int, *, default_port: int = 80) -> bool:
        """Say whether ``host`` (``name[:port]``) is ours, with ``port`` the one that the request came in by."""
        match = _HOST.fullmatch(host.lower())
        if match is None:
            return False
        name, given = match[1], int(match[2]) if match[2] else default_port
        if name in LOOPBACK_NAMES and given == port:
            return True
        return name in self._allowed or f"{name}:{given}" in self._allowed

    def is_own_origin(self, origin: str, port: int) -> bool:
        """Say whether ``origin`` (RFC 6454 section 6.1) is a page of ours. ``json_null`` is nobody's."""
        scheme, separator, host = origin.partition("://")
        if not separator or scheme not in ("http", "https"):
            return False
        return self.is_allowed_host(host, port, default_port=443 if scheme == "https" else 80)

    def are_own_origins(self, origins: Iterable[str], port: int) -> bool:
        """Say whether none of ``origins`` is a page of somebody else's; where none is told, none is."""
        return all(self.is_own_origin(origin, port) for origin in origins)


def check_path(raw: bytes) -> None:
    """Refuse a path with more than one meaning: ``//``, ``.``, ``..``, encoded slashes, dots, percent or control signs.

    ``raw`` is the path as it came, before any decoding. Raises ``invalid_parameter``.
    """
    segments = raw.split(b"/")
    plain = (
        len(raw) <= MAX_PATH
        and raw.startswith(b"/")
        and _PRINTABLE_ASCII.fullmatch(raw) is not None
        and b"\\" not in raw
        and b"//" not in raw
        and _AMBIGUOUS_ENCODING.search(raw) is None
        and not any(segment in (b".", b"..") for segment in segments)
    )
    if not plain:
        raise OctoError("The path is malformed.", code="invalid_parameter")


def is_loopback(address: str) -> bool:
    """Say whether a peer's address is this machine's loopback."""
    return address == "::1" or address.startswith("127.") or address.startswith("::ffff:127.")
