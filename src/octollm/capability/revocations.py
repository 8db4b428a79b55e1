"""A bounded set of revocations; when full, it refuses too much, never too little."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, cast, get_args

from octollm.capability.errors import CapabilityError
from octollm.capability.tokens import MAX_ACCESS_SECONDS, SKEW_SECONDS, TokenClaims

RevocationKind = Literal["jti", "task", "run", "sub", "cred", "aud"]
"""What a revocation names: a token, a task, one holder of a task (:func:`run_value`), a principal, a credential, or the
service to which authority was delegated."""
REVOCATION_KINDS: tuple[RevocationKind, ...] = get_args(RevocationKind)
_PERMANENT_KINDS = frozenset({"jti", "task", "run"})
"""Kinds whose value is never reused, so that the clock of a link's issuer does not matter."""

ALL_TENANTS = ""
"""The tenant of a revocation that applies to every tenant."""
RETENTION_SECONDS = MAX_ACCESS_SECONDS + 2 * SKEW_SECONDS
"""After this long every token that a revocation names has expired on every clock."""


def run_value(task: str, run: int) -> str:
    """Return the value of a revocation of all that was delegated to the holder ``run`` of ``task``."""
    return f"{task}/{run}"


class Revocations:
    """A bounded set of revocations: (tenant, kind, value, at) refuses any chain with a matching link issued by ``at``.

    Times are seconds since the epoch. Tokens, ended tasks and former holders never come back, so they are refused
    whatever their issuer's clock said. Past ``max_entries`` an old entry is dropped, and everything issued up to its
    time is refused instead.
    """

    def __init__(self, *, max_entries: int = 100_000) -> None:
        self._at: dict[tuple[str, str, str], float] = {}
        self._max_entries = max_entries
        self._floor = float("-inf")
        self.version = 0

    def add(self, kind: RevocationKind, value: str, at: float, tenant: str) -> None:
        """Refuse tokens with ``value`` in ``tenant`` that were issued by ``at``; repeating a call is harmless.

        Raises ``CapabilityError`` (``misuse``) for an unknown kind.
        """
        if kind not in REVOCATION_KINDS:
            raise CapabilityError("misuse", f"A revocation is of {', '.join(REVOCATION_KINDS)}.")
        key = (tenant, kind, value)
        before = self._at.get(key)
        if before is not None and before >= at:
            return
        self._at[key] = at
        if len(self._at) > self._max_entries:
            # The first entry is about the oldest; raising the floor keeps refusing what it refused.
            dropped = next(iter(self._at))
            # These kinds refused tokens whatever their issuer's clock said: the floor has to allow for that clock.
            margin = SKEW_SECONDS if dropped[1] in _PERMANENT_KINDS else 0.0
            self._floor = max(self._floor, self._at.pop(dropped) + margin)
        # A new version has every cached verdict checked against the list once more.
        self.version += 1

    @property
    def floor(self) -> float | None:
        """The time up to which every token is refused; ``None`` while the set was never full."""
        return self._floor if self._floor > float("-inf") else None

    def raise_floor(self, at: float) -> None:
        """Refuse every token issued by ``at``, the floor of another set that was full."""
        if at > self._floor:
            self._floor = at
            self.version += 1

    def entries(self) -> list[tuple[RevocationKind, str, float, str]]:
        """Return the kind, value, time and tenant of each entry, the arguments of :meth:`add`."""
        return [(cast("RevocationKind", kind), value, at, tenant) for (tenant, kind, value), at in self._at.items()]

    def is_revoked(self, links: Iterable[TokenClaims]) -> bool:
        """Return whether any of ``links``, the claims of one chain, is revoked."""
        return any(self._refuses(claims) for claims in links)

    def prune(self, now: float) -> None:
        """Drop entries whose tokens have all expired by ``now``."""
        for key in [key for key, at in self._at.items() if at + RETENTION_SECONDS < now]:
            del self._at[key]

    def _refuses(self, claims: TokenClaims) -> bool:
        if claims.iat <= self._floor:
            return True
        if not self._at:
            return False
        for kind, value in _revocable_values(claims):
            for tenant in (claims.tenant, ALL_TENANTS):
                at = self._at.get((tenant, kind, value))
                if at is not None and (kind in _PERMANENT_KINDS or claims.iat <= at):
                    return True
        return False

    def __len__(self) -> int:
        return len(self._at)


def _revocable_values(claims: TokenClaims) -> list[tuple[str, str]]:
    """Return the kinds and values by which a link may be revoked."""
    values = [("jti", claims.jti), ("sub", claims.sub), ("cred", claims.cred), ("aud", claims.aud)]
    if claims.task is not None:
        values.append(("task", claims.task))
        if claims.run is not None:
            values.append(("run", run_value(claims.task, claims.run)))
    return values
