"""What was revoked, and since when."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

from octollm.capability.problems import CapabilityError
from octollm.capability.tokens import MAX_ACCESS_SECONDS, SKEW_SECONDS, Claims

RevocationKind = Literal["jti", "task", "sub", "cred", "aud"]
"""What a revocation names: a token, a task, a principal, a credential, or the service that was lent authority."""
KINDS: tuple[RevocationKind, ...] = get_args(RevocationKind)

_KEPT_SECONDS = MAX_ACCESS_SECONDS + 2 * SKEW_SECONDS
"""After this long every token that a revocation names has expired on every clock."""


class Revocations:
    """A bounded set of revocations: (kind, value, at) refuses any chain with a matching link issued by ``at``.

    Times are seconds since the epoch. A ``jti`` names one token, so it is refused whatever its issuer's clock said.
    Past ``max_entries`` the oldest entry is let go, and instead everything issued up to its time is refused: a full
    set refuses too much, never too little.
    """

    def __init__(self, *, max_entries: int = 100_000) -> None:
        self._at: dict[tuple[str, str], float] = {}
        self._max_entries = max_entries
        self._floor = float("-inf")
        self.version = 0

    def add(self, kind: RevocationKind, value: str, at: float) -> None:
        """Refuse from now on what has ``value`` and was issued at or before ``at``; repeating it is harmless.

        Raises ``CapabilityError`` (``misuse``) for an unknown kind.
        """
        if kind not in KINDS:
            raise CapabilityError("misuse", f"A revocation is of {', '.join(KINDS)}.")
        key = (kind, value)
        before = self._at.pop(key, None)
        self._at[key] = at if before is None else max(before, at)
        if len(self._at) > self._max_entries:
            oldest = min(self._at, key=self._at.__getitem__)
            self._floor = max(self._floor, self._at.pop(oldest))
        self.version += 1

    def refuses(self, links: Iterable[Claims]) -> bool:
        """Return whether any of ``links``, the claims of one chain, was revoked."""
        return any(self._refuses(claims) for claims in links)

    def prune(self, now: float) -> None:
        """Forget what concerns only tokens that have expired by ``now``."""
        for key in [key for key, at in self._at.items() if at + _KEPT_SECONDS < now]:
            del self._at[key]

    def _refuses(self, claims: Claims) -> bool:
        if claims.iat <= self._floor:
            return True
        if ("jti", claims.jti) in self._at:
            return True
        for kind, value in (("task", claims.task), ("sub", claims.sub), ("cred", claims.cred), ("aud", claims.aud)):
            if value is not None and claims.iat <= self._at.get((kind, value), float("-inf")):
                return True
        return False

    def __len__(self) -> int:
        return len(self._at)
