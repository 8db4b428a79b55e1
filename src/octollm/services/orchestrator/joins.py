"""Join secrets: made, listed, revoked. None is stored; what is noted of one is what it is derived from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sqlalchemy import select, update

from octollm.capability.joining import (
    EnrolmentTerms,
    EnrolmentTokenIssuer,
    check_arm_name,
    parse_declared_calls,
    scopes_of,
)
from octollm.clock import Clock, IdGenerator, format_rfc3339
from octollm.contracts.joining import EnrolmentTokenList, EnrolmentTokenRequest, EnrolmentTokenView, NewEnrolmentToken
from octollm.errors import FieldError, OctoError
from octollm.services.orchestrator.audit import Actor, record_audit
from octollm.storage import Database, row_to_dict
from octollm.storage.tables import joins

MAX_ENROLMENT_TOKEN_SECONDS = 30 * 86_400
"""The longest life of a join secret."""


class EnrolmentTokens:
    """The join secrets of all tenants."""

    def __init__(self, db: Database, root: EnrolmentTokenIssuer, clock: Clock, ids: IdGenerator) -> None:
        self._db = db
        self._root = root
        self._clock = clock
        self._ids = ids

    async def create(self, request: EnrolmentTokenRequest, actor: Actor) -> NewEnrolmentToken:
        """Make a secret that admits one name in the actor's tenant; it is shown once.

        Raises ``invalid_body`` for a name, calls or a life that cannot be.
        """
        check_arm_name(request.name)
        calls = scopes_of(parse_declared_calls(request.calls))
        if not 1 <= request.lifetime_seconds <= MAX_ENROLMENT_TOKEN_SECONDS:
            detail = f"A join secret lives from 1 to {MAX_ENROLMENT_TOKEN_SECONDS} seconds (30 days)."
            raise OctoError(detail, code="invalid_body", field_errors=(FieldError("/lifetime_seconds", detail),))
        now = self._clock.now()
        terms = EnrolmentTerms(self._ids.hex(), request.name, calls, math.ceil(now) + request.lifetime_seconds)
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
            await record_audit(tx, actor, "join.made", terms.id, now, {"name": terms.name, "calls": list(calls)})
        return NewEnrolmentToken(_token_view_from_row(row, now), self._root.derive_token(terms, now))

    async def list(self, tenant: str) -> EnrolmentTokenList:
        """Return a tenant's join secrets, without what is secret of them; at most 200."""
        query = select(joins).where(joins.c.tenant == tenant).order_by(joins.c.created_at.desc()).limit(200)
        async with self._db.read() as conn:
            rows = await conn.all(query)
        now = self._clock.now()
        return EnrolmentTokenList(tuple(_token_view_from_row(row_to_dict(row), now) for row in rows))

    async def revoke(self, token_id: str, actor: Actor) -> None:
        """Revoke a secret of the actor's tenant; raise ``not_found_result`` for another's. Who joined with it stays."""
        now = self._clock.now()
        async with self._db.transaction() as tx:
            done = await tx.execute(
                update(joins)
                .where(
                    joins.c.id == token_id,
                    joins.c.tenant == actor.principal.tenant,
                    joins.c.revoked_at.is_(None),
                )
                .values(revoked_at=now)
            )
            if done.rowcount != 1:
                raise OctoError("There is no such join secret, or it was revoked already.", code="not_found_result")
            await record_audit(tx, actor, "join.revoked", token_id, now)


def terms_from_row(row: Mapping[str, Any]) -> EnrolmentTerms:
    """Return what a row's secret is derived from."""
    return EnrolmentTerms(row["id"], row["name"], tuple(row["calls"]), int(row["expires_at"]))


def _token_view_from_row(row: Mapping[str, Any], now: float) -> EnrolmentTokenView:
    state = "revoked" if row["revoked_at"] is not None else "expired" if row["expires_at"] <= now else "good"
    used = row["used_at"]
    return EnrolmentTokenView(
        row["id"],
        row["name"],
        tuple(row["calls"]),
        row["tenant"],
        format_rfc3339(row["created_at"]),
        format_rfc3339(row["expires_at"]),
        state,
        None if used is None else format_rfc3339(used),
    )
