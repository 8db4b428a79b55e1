"""Idempotency keys: the same call is done once and answered alike every time.

A key is unique per tenant, subject, service, operation and key. What a claim may find is a type each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from octollm.errors import OctoError

LEASE_SECONDS = 5.0
MAX_KEY = 200
RETENTION_SECONDS = 24 * 3600.0
NEVER_STORED = frozenset({401, 403, 408, 413, 429})
"""Statuses that say nothing of the operation itself; nor do those of 500 and more."""


class IdempotencyKey(msgspec.Struct, frozen=True, order=True):
    """What a key is unique within."""

    tenant: str
    subject: str
    service: str
    operation: str
    key: str


@dataclass(frozen=True, slots=True)
class Claimed:
    """The call is the caller's to do. ``run`` fences its completion."""

    epoch: int


class StoredResponse(msgspec.Struct, frozen=True):
    """The answer of a call: its status, its body, and those of its headers that belong to the body."""

    status: int
    body: bytes
    headers: Mapping[str, str] = {}


@dataclass(frozen=True, slots=True)
class AlreadyCompleted:
    """The call was done: this is its answer."""

    response: StoredResponse


@dataclass(frozen=True, slots=True)
class InFlight:
    """Another holder is doing it."""


@dataclass(frozen=True, slots=True)
class KeyConflict:
    """The key was used with another body."""


@dataclass(frozen=True, slots=True)
class OutcomeUnknown:
    """A ``once`` call whose holder vanished: it may have taken effect."""


class NewClaim(msgspec.Struct, frozen=True):
    """A claim to be made, for work on a task where there is one."""

    key: IdempotencyKey
    body_digest: str
    idempotent: bool
    task_id: str | None


class ClaimCompletion(msgspec.Struct, frozen=True):
    """The answer of a claimed call, to be stored."""

    key: IdempotencyKey
    epoch: int
    response: StoredResponse


ClaimOutcome = Claimed | AlreadyCompleted | InFlight | KeyConflict | OutcomeUnknown


class IdempotencyStore(Protocol):
    """Where keys are kept."""

    async def claim(self, key: IdempotencyKey, body_digest: str, *, idempotent: bool, bearer: str) -> ClaimOutcome:
        """Take the key, or say what stands in the way. ``bearer`` is the caller's authority."""
        ...

    async def renew(self, claims: Sequence[tuple[IdempotencyKey, int]]) -> None:
        """Prolong the leases, of 5 seconds, of claims by key and run."""
        ...

    async def complete(self, key: IdempotencyKey, epoch: int, response: StoredResponse) -> None:
        """Store the answer of a claimed call."""
        ...

    async def release(self, key: IdempotencyKey, epoch: int) -> None:
        """Give a claim back: the call was not done."""
        ...


def check_key(text: str | None) -> str | None:
    """Return a well-formed ``Idempotency-Key``; raise ``invalid_header`` for another."""
    if text is None:
        return None
    if not (0 < len(text) <= MAX_KEY and text.isascii() and text.isprintable()):
        raise OctoError(f"Idempotency-Key must be 1 to {MAX_KEY} printable characters.", code="invalid_header")
    return text


def body_digest(method: str, path: str, query: str, body: bytes) -> str:
    """Return the digest that tells whether two calls with one key are the same call."""
    digest = hashlib.sha256(f"{method} {path}?{query}\n".encode())
    digest.update(body)
    return digest.hexdigest()


class NestedKeys:
    """Keys of the calls made while one call is served, so that a repeat of the parent repeats them.

    A key is SHA-256 over (parent key, service, operation, body digest, ordinal among equals).
    """

    def __init__(self, parent: str) -> None:
        self._parent = parent
        self._seen: dict[tuple[str, str, str], int] = {}

    def next(self, service: str, operation: str, body: bytes) -> str:
        """Return the key of the next call."""
        digest = hashlib.sha256(body).hexdigest()
        place = (service, operation, digest)
        ordinal = self._seen.get(place, 0)
        self._seen[place] = ordinal + 1
        text = "\n".join((self._parent, service, operation, digest, str(ordinal)))
        return hashlib.sha256(text.encode()).hexdigest()
