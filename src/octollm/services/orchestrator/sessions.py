"""Browser sessions: one row each, found by a secret of which only the hash is stored."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Mapping
from typing import Any

from sqlalchemy import delete, func, select, update

from octollm.capability import Principal
from octollm.clock import Clock, IdGenerator
from octollm.contracts.auth import SESSION_LIFETIME_SECONDS, SESSION_TOKEN_PREFIX
from octollm.errors import OctoError
from octollm.services.orchestrator.accounts import hash_credential
from octollm.services.orchestrator.audit import Actor, record_audit
from octollm.services.orchestrator.revocation import RevocationStore
from octollm.storage import Database, row_to_dict
from octollm.storage.tables import sessions

MAX_SESSIONS = 100
"""Sessions of one credential; the oldest ends when another is opened."""
MAX_SESSION_TOKENS = 32
"""Access tokens of one session that are remembered, to be revoked with it: more than live at a time."""


class SessionStore:
    """Opens, finds and ends sessions. A session is ``octosess_<id>_<secret>``."""

    def __init__(self, db: Database, revocation_store: RevocationStore, clock: Clock, ids: IdGenerator) -> None:
        self._db = db
        self._revocation_store = revocation_store
        self._clock = clock
        self._ids = ids

    async def open(self, principal: Principal) -> str:
        """Return a fresh session of a principal."""
        session_id, now = self._ids.hex(), self._clock.now()
        secret = f"{SESSION_TOKEN_PREFIX}{session_id}_{secrets.token_urlsafe(32)}"
        async with self._db.transaction() as tx:
            await tx.execute(delete(sessions).where(sessions.c.expires_at < now))
            of_cred = sessions.c.cred == principal.cred
            if await tx.scalar(select(func.count()).select_from(sessions).where(of_cred)) >= MAX_SESSIONS:
                oldest = select(sessions.c.id).where(of_cred).order_by(sessions.c.created_at).limit(1)
                await tx.execute(delete(sessions).where(sessions.c.id.in_(oldest)))
            await tx.execute(
                tx.insert(sessions).values(
                    id=session_id,
                    hash=hash_credential(secret),
                    tenant=principal.tenant,
                    cred=principal.cred,
                    created_at=now,
                    expires_at=now + SESSION_LIFETIME_SECONDS,
                    tokens=[],
                )
            )
            await record_audit(tx, Actor(principal), "session.opened", session_id, now)
        return secret

    async def find_credential(self, session: str) -> tuple[str, str]:
        """Return the id of a session that is open, and the credential that it was opened for.

        Raises ``api_key_invalid`` for any other, without saying why.
        """
        row = await self._load_row(session)
        return row["id"], row["cred"]

    async def add_token(self, session_id: str, jti: str) -> None:
        """Remember an access token that a session was given."""
        async with self._db.transaction() as tx:
            row = await tx.first(select(sessions).where(sessions.c.id == session_id).with_for_update())
            if row is not None:
                tokens = [*row["tokens"], jti][-MAX_SESSION_TOKENS:]
                await tx.execute(update(sessions).where(sessions.c.id == session_id).values(tokens=tokens))

    async def end(self, session: str) -> None:
        """End a session, and what it was given; one that is over already stays so."""
        try:
            row = await self._load_row(session)
        except OctoError:
            return
        now = self._clock.now()
        async with self._db.transaction() as tx:
            await tx.execute(delete(sessions).where(sessions.c.id == row["id"]))
            for jti in row["tokens"]:
                await self._revocation_store.add(tx, "jti", jti, row["tenant"])
            actor = Actor(Principal("", row["cred"], row["tenant"]))
            await record_audit(tx, actor, "session.ended", row["id"], now)

    async def _load_row(self, session: str) -> Mapping[str, Any]:
        refused = OctoError("The session is over: log in again.", code="api_key_invalid")
        session_id = session.removeprefix(SESSION_TOKEN_PREFIX).partition("_")[0]
        if not session.startswith(SESSION_TOKEN_PREFIX) or len(session) > 200:
            raise refused
        async with self._db.read() as conn:
            found = await conn.first(select(sessions).where(sessions.c.id == session_id))
        row = None if found is None else row_to_dict(found)
        good = hmac.compare_digest("" if row is None else row["hash"], hash_credential(session))
        if row is None or not good or row["expires_at"] <= self._clock.now():
            raise refused
        return row
