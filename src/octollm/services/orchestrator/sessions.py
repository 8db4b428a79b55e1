"""Browser sessions: one row each, found by a secret of which only the hash is stored.

Access tokens issued to a session are recorded with it and revoked when it ends.
"""

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
from octollm.storage import Database, DatabaseConnection, Transaction, row_to_dict
from octollm.storage.tables import sessions

MAX_SESSIONS = 100
"""Open sessions of one credential; one more ends the oldest."""
MAX_SESSION_TOKENS = 32
"""Access tokens recorded per session: more than can be valid at the same time."""


class SessionStore:
    """Opens, finds and ends sessions. A session is ``octosess_<id>_<secret>``."""

    def __init__(self, db: Database, revocation_store: RevocationStore, clock: Clock, ids: IdGenerator) -> None:
        self._db = db
        self._revocation_store = revocation_store
        self._clock = clock
        self._ids = ids

    async def open(self, principal: Principal) -> str:
        """Open a session of a principal and return its secret."""
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
        """Return the id of an open session and the id of its credential.

        Raises ``api_key_invalid`` for any other session, without a reason.
        """
        async with self._db.read() as conn:
            row = await self._load_row(conn, session)
        return row["id"], row["cred"]

    async def add_token(self, session_id: str, jti: str) -> None:
        """Record an access token that is issued to a session; raise ``api_key_invalid`` when it has ended."""
        async with self._db.transaction() as tx:
            # Locked: two exchanges at once would each write a list without the other's token.
            row = await tx.first(select(sessions).where(sessions.c.id == session_id).with_for_update())
            if row is None:
                # It ended since its secret was checked, so nothing would revoke this token.
                raise _session_ended()
            tokens = [*row["tokens"], jti][-MAX_SESSION_TOKENS:]
            await tx.execute(update(sessions).where(sessions.c.id == session_id).values(tokens=tokens))

    async def end(self, session: str) -> None:
        """End a session and revoke its access tokens; ending it again changes nothing."""
        async with self._db.transaction() as tx:
            # Read under the lock: a token that an exchange adds meanwhile is revoked too, or is not issued.
            try:
                row = await self._load_row(tx, session)
            except OctoError as error:
                if error.code != "api_key_invalid":
                    raise
                return
            now = self._clock.now()
            await tx.execute(delete(sessions).where(sessions.c.id == row["id"]))
            for jti in row["tokens"]:
                await self._revocation_store.add(tx, "jti", jti, row["tenant"])
            actor = Actor(Principal("", row["cred"], row["tenant"]))
            await record_audit(tx, actor, "session.ended", row["id"], now)

    async def _load_row(self, conn: DatabaseConnection, session: str) -> Mapping[str, Any]:
        session_id = session.removeprefix(SESSION_TOKEN_PREFIX).partition("_")[0]
        if not session.startswith(SESSION_TOKEN_PREFIX) or len(session) > 200:
            raise _session_ended()
        query = select(sessions).where(sessions.c.id == session_id)
        result = await conn.first(query.with_for_update() if isinstance(conn, Transaction) else query)
        row = None if result is None else row_to_dict(result)
        is_match = hmac.compare_digest("" if row is None else row["hash"], hash_credential(session))
        if row is None or not is_match or row["expires_at"] <= self._clock.now():
            raise _session_ended()
        return row


def _session_ended() -> OctoError:
    return OctoError("The session has ended: log in again.", code="api_key_invalid")
