"""Secrets of webhooks in the database: encrypted under a key that the orchestrator derives from its root key.

Only the orchestrator has the root key, so whoever reads the database or a backup learns no secret. A secret is
rotated with an overlap, during which the former one is valid as well.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from sqlalchemy import Table, select, update

from octollm.capability.keyring import KeyRing, SecretCipher
from octollm.clock import Clock
from octollm.storage import Database

PURPOSE = "octollm webhook secrets v1"
MAX_SECRETS = 4
"""Secrets of one webhook at a time. A further rotation ends the oldest."""
MAX_ROWS = 100_000
"""Rows that one round of encrypting anew looks at."""


class StoredSecret(msgspec.Struct, frozen=True, omit_defaults=True):
    """A secret as it is stored. ``until`` (epoch seconds) is when it ends; ``None`` for the present one."""

    sealed: str
    until: float | None = None


class SecretStore:
    """Encrypts and decrypts the secrets of rows. A secret is bound to the id of its row."""

    def __init__(self, ring: KeyRing, clock: Clock) -> None:
        # Retired root keys decrypt too: they are in the ring until the next rotation, and the orchestrator encrypts
        # anew with the present one long before.
        self._cipher = SecretCipher(lambda: ring.derive_keys(PURPOSE, clock.now(), retired=True))
        self._clock = clock

    def seal(self, row_id: str, secret: str) -> list[dict[str, Any]]:
        """Return the column of a new row."""
        return _to_column([self._encrypt(row_id, secret, None)])

    def rotate(self, row_id: str, column: Iterable[Mapping[str, Any]], secret: str, overlap: float) -> list[Any]:
        """Return the column with a new secret; the present one ends after ``overlap`` seconds."""
        until = self._clock.now() + overlap
        former = [
            msgspec.structs.replace(each, until=until if each.until is None else min(each.until, until))
            for each in self._valid(column)
        ]
        kept = [each for each in former if each.until is not None and each.until > self._clock.now()]
        return _to_column([self._encrypt(row_id, secret, None), *kept[: MAX_SECRETS - 1]])

    def reseal(self, row_id: str, column: Iterable[Mapping[str, Any]]) -> list[Any]:
        """Return the column encrypted under the present root key, without secrets that have ended or cannot be read."""
        opened = [(each, self._decrypt(row_id, each)) for each in self._valid(column)]
        return _to_column([self._encrypt(row_id, secret, each.until) for each, secret in opened if secret is not None])

    def is_current(self, row_id: str, column: Iterable[Mapping[str, Any]]) -> bool:
        """Return whether every valid secret is encrypted under the present root key, or lost for good."""
        sealed = [base64.b64decode(each.sealed) for each in self._valid(column)]
        return all(self._cipher.is_current(each, row_id.encode()) for each in sealed)

    def open(self, row_id: str, column: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
        """Return the valid secrets, the present one first.

        It is empty when the root key that encrypted them is gone: the webhook then needs a new secret.
        """
        opened = [self._decrypt(row_id, each) for each in self._valid(column)]
        return tuple(secret for secret in opened if secret is not None)

    def count(self, column: Iterable[Mapping[str, Any]]) -> int:
        """Return how many secrets are valid now."""
        return len(self._valid(column))

    def _valid(self, column: Iterable[Mapping[str, Any]]) -> Sequence[StoredSecret]:
        stored = [msgspec.convert(each, StoredSecret) for each in column]
        return [each for each in stored if each.until is None or each.until > self._clock.now()]

    def _encrypt(self, row_id: str, secret: str, until: float | None) -> StoredSecret:
        sealed = self._cipher.encrypt(secret.encode(), row_id.encode())
        return StoredSecret(base64.b64encode(sealed).decode(), until)

    def _decrypt(self, row_id: str, stored: StoredSecret) -> str | None:
        secret = self._cipher.decrypt(base64.b64decode(stored.sealed), row_id.encode())
        return None if secret is None else secret.decode()


def _to_column(secrets: Iterable[StoredSecret]) -> list[Any]:
    return [msgspec.to_builtins(each) for each in secrets]


async def reseal_rows(db: Database, table: Table, store: SecretStore) -> None:
    """Encrypt the secrets of a table's rows under the present root key, where a former one did."""
    async with db.read() as conn:
        rows = await conn.all(select(table.c.id, table.c.secrets).order_by(table.c.id).limit(MAX_ROWS))
    for row_id in [row["id"] for row in rows if not store.is_current(row["id"], row["secrets"])]:
        async with db.transaction() as tx:
            column = await tx.scalar(select(table.c.secrets).where(table.c.id == row_id).with_for_update())
            if column is not None:
                column = store.reseal(row_id, column)
                await tx.execute(update(table).where(table.c.id == row_id).values(secrets=column))
