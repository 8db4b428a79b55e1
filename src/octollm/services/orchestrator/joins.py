"""Join secrets: made, listed, revoked. None is stored; what is noted of one is what it is derived from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sqlalchemy import select, update

from octollm.capability.joining import JoinRoot, JoinTerms, check_arm_name, declared_calls, scopes_of
from octollm.clock import Clock, Ids, iso
from octollm.contracts.joining import JoinList, JoinView, NewJoin, NewJoinRequest
from octollm.errors import Fault, OctoError
from octollm.services.orchestrator.audit import Actor, record
from octollm.storage import Database, plain
from octollm.storage.tables import joins

MAX_JOIN_SECONDS = 30 * 86_400
"""The longest life of a join secret."""


class Joins:
    """The join secrets of all tenants."""

    def __init__(self, db: Database, root: JoinRoot, clock: Clock, ids: Ids) -> None:
        self._db = db
        self._root = root
        self._clock = clock
        self._ids = ids

    async def create(self, wanted: NewJoinRequest, actor: Actor) -> NewJoin:
        """Make a secret that admits one name in the actor's tenant; it is shown once.

        Raises ``invalid_body`` for a name, calls or a life that cannot be.
        """
        check_arm_name(wanted.name)
        calls = scopes_of(declared_calls(wanted.calls))
        if not 1 <= wanted.lifetime_seconds <= MAX_JOIN_SECONDS:
            detail = f"A join secret lives from 1 to {MAX_JOIN_SECONDS} seconds (30 days)."
            raise OctoError(detail, code="invalid_body", faults=(Fault("/lifetime_seconds", detail),))
        now = self._clock.now()
        terms = JoinTerms(self._ids.hex(), wanted.name, calls, math.ceil(now) + wanted.lifetime_seconds)
        row: dict[str, Any] = {
            "id": terms.id,
            "tenant": actor.principal.tenant,
            "name": terms.name,
            "calls": list(calls),
            "sub": actor.principal.sub,
            "created_at": now,
            "expires_at": float(terms.expires),
            "revoked_at": None,
            "used_at": None,
        }
        async with self._db.transaction() as tx:
            await tx.execute(tx.insert(joins).values(row))
            await record(tx, actor, "join.made", terms.id, now, {"name": terms.name, "calls": list(calls)})
        return NewJoin(_view(row, now), self._root.secret(terms, now))

    async def list(self, tenant: str) -> JoinList:
        """Return a tenant's join secrets, without what is secret of them; at most 200."""
        query = select(joins).where(joins.c.tenant == tenant).order_by(joins.c.created_at.desc()).limit(200)
        async with self._db.read() as conn:
            rows = await conn.all(query)
        now = self._clock.now()
        return JoinList(tuple(_view(plain(row), now) for row in rows))

    async def revoke(self, join_id: str, actor: Actor) -> None:
        """Revoke a secret of the actor's tenant; raise ``not_found`` for another's. Who joined with it stays."""
        now = self._clock.now()
        async with self._db.transaction() as tx:
            done = await tx.execute(
                update(joins)
                .where(
                    joins.c.id == join_id,
                    joins.c.tenant == actor.principal.tenant,
                    joins.c.revoked_at.is_(None),
                )
                .values(revoked_at=now)
            )
            if done.rowcount != 1:
                raise OctoError("There is no such join secret, or it was revoked already.", code="not_found")
            await record(tx, actor, "join.revoked", join_id, now)


def terms_of(row: Mapping[str, Any]) -> JoinTerms:
    """Return what a row's secret is derived from."""
    return JoinTerms(row["id"], row["name"], tuple(row["calls"]), int(row["expires_at"]))


def _view(row: Mapping[str, Any], now: float) -> JoinView:
    state = "revoked" if row["revoked_at"] is not None else "expired" if row["expires_at"] <= now else "good"
    used = row["used_at"]
    return JoinView(
        row["id"],
        row["name"],
        tuple(row["calls"]),
        row["tenant"],
        iso(row["created_at"]),
        iso(row["expires_at"]),
        state,
        None if used is None else iso(used),
    )
