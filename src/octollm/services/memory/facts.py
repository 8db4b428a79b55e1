"""Facts of a tenant: a JSON value by its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from sqlalchemy import delete, select, update

from octollm.clock import Clock, format_rfc3339
from octollm.contracts.operations import Fact, FactIn
from octollm.errors import OctoError
from octollm.storage import Database
from octollm.storage.tables import facts


class FactStore:
    """The facts of all tenants; every question names the tenant that it is asked for."""

    def __init__(self, db: Database, clock: Clock) -> None:
        self._db = db
        self._clock = clock

    async def put(
        self, tenant: str, name: str, fact: FactIn, *, expected_version: int | None = None
    ) -> tuple[Fact, bool]:
        """Set a fact; return it, and whether it is new. The same value again changes nothing.

        With ``expected_version`` the current version must be that one (0: none yet). Raises ``state_conflict``
        otherwise, and ``invalid_body`` for a value of null.
        """
        value = msgspec.json.decode(fact.value)
        if value is None:
            raise OctoError("A fact needs a value; DELETE takes it away.", code="invalid_body")
        where = (facts.c.tenant == tenant, facts.c.key == name)
        now = self._clock.now()
        async with self._db.transaction() as tx:
            row = await tx.first(select(facts).where(*where).with_for_update())
            if row is None and expected_version in (None, 0):
                values = {"value": value, "source": fact.source, "version": 1, "created_at": now, "updated_at": now}
                insert = tx.insert(facts).values(tenant=tenant, key=name, **values)
                if (await tx.execute(insert.on_conflict_do_nothing())).rowcount == 1:
                    return Fact(name, value, fact.source, 1, format_rfc3339(now), format_rfc3339(now)), True
                # Another set it first: the insertion waited for its commit.
                row = await tx.first(select(facts).where(*where).with_for_update())
            found = 0 if row is None else int(row["version"])
            if expected_version is not None and expected_version != found:
                raise OctoError(f"The fact is at version {found}, not {expected_version}.", code="state_conflict")
            if row is None:
                raise OctoError("The fact was deleted at this moment. Try again.", code="overloaded", retry_after=1.0)
            if _is_same_json(row["value"], value) and row["source"] == fact.source:
                return _build_fact(row), False
            changed = {"value": value, "source": fact.source, "version": found + 1, "updated_at": now}
            await tx.execute(update(facts).where(*where).values(**changed))
        return Fact(name, value, fact.source, found + 1, format_rfc3339(row["created_at"]), format_rfc3339(now)), False

    async def get(self, tenant: str, name: str) -> Fact:
        """Return a fact; raise ``not_found``."""
        async with self._db.read() as conn:
            row = await conn.first(select(facts).where(facts.c.tenant == tenant, facts.c.key == name))
        if row is None:
            raise _fact_not_found()
        return _build_fact(row)

    async def delete(self, tenant: str, name: str) -> None:
        """Forget a fact; raise ``not_found``."""
        async with self._db.transaction() as tx:
            gone = await tx.execute(delete(facts).where(facts.c.tenant == tenant, facts.c.key == name))
        if gone.rowcount == 0:
            raise _fact_not_found()


def _is_same_json(one: object, other: object) -> bool:
    # In Python 1 equals true; in JSON they are two values.
    # An object's members have no order, and PostgreSQL keeps none.
    return msgspec.json.encode(one, order="sorted") == msgspec.json.encode(other, order="sorted")


def _build_fact(row: Mapping[Any, Any]) -> Fact:
    return Fact(
        row["key"],
        row["value"],
        row["source"],
        row["version"],
        format_rfc3339(row["created_at"]),
        format_rfc3339(row["updated_at"]),
    )


def _fact_not_found() -> OctoError:
    return OctoError("There is no fact of that name.", code="not_found")
