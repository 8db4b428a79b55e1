"""What is revoked, as the orchestrator tells every service."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

MAX_REVOCATION_BATCH = 500
"""Revocations of one line of the stream."""

_RevocationText = Annotated[str, Meta(max_length=512)]


class RevocationView(msgspec.Struct, frozen=True):
    """Refuses chains of ``tenant`` with a matching link issued at or before ``at`` (epoch seconds).

    For the kinds ``jti``, ``task`` and ``run``, whose values never come back, the time does not matter.
    """

    kind: Literal["jti", "task", "run", "sub", "cred", "aud"]
    value: _RevocationText
    at: float
    tenant: _RevocationText


class RevocationRequest(msgspec.Struct, frozen=True):
    """What to revoke of one's tenant: a token by its ``jti``, or what a principal or a service was lent until now."""

    kind: Literal["jti", "sub", "aud"]
    value: Annotated[str, Meta(min_length=1, max_length=255)]


class RevocationList(msgspec.Struct, frozen=True):
    """All revocations that still matter. What was issued at or before ``floor`` is refused whatever it names."""

    revocations: tuple[RevocationView, ...]
    floor: float | None = None


class RevocationUpdate(msgspec.Struct, frozen=True, omit_defaults=True):
    """A line of the stream. First come all that are in force, the last of them ``whole``; then each as it is made.

    A line without any says that there is nothing new, and that the orchestrator itself knows what is.
    """

    revocations: Annotated[tuple[RevocationView, ...], Meta(max_length=MAX_REVOCATION_BATCH)] = ()
    floor: float | None = None
    whole: bool = False
