"""The audit log: entries written in the transaction of what they record, and the sealer that chains each tenant's entries by hash and signs checkpoints with the root key."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select, update

from octollm import __version__
from octollm.capability import DirectoryEntry, Principal, SigningKey
from octollm.capability.audit_chain import row_hash, sign_checkpoint
from octollm.capability.keyring import KeyRing
from octollm.clock import Clock
from octollm.concurrency import run_in_background
from octollm.config import SETTING_SPECS, Settings
from octollm.contracts.observability import AuditHead, AuditPage, AuditRow
from octollm.errors import OctoError
from octollm.rpc.call import IncomingCall
from octollm.rpc.health import DependencyStatus
from octollm.storage import Database, Transaction, row_to_dict
from octollm.storage.tables import audit, audit_heads
from octollm.telemetry.masking import MASK, mask_text

SYSTEM_TENANT = "system"
"""Whose rows and events those are that are of no tenant."""


@dataclass(frozen=True, slots=True)
class Actor:
    """Who did it, in which request."""

    principal: Principal
    request_id: str = ""
    correlation_id: str = ""
    service: str = ""


def actor_from_call(call: IncomingCall) -> Actor:
    """Return who makes a call."""
    return Actor(call.authority.principal, call.request_id, call.correlation_id)


async def record_audit(
    tx: Transaction,
    actor: Actor,
    action: str,
    target: str,
    at: float,
    detail: Mapping[str, object] | None = None,
) -> None:
    """Write a row: ``action`` on ``target`` at epoch seconds ``at``. No secrets in ``detail``."""
    await tx.execute(
        tx.insert(audit).values(
            tenant=actor.principal.tenant,
            at=at,
            action=action,
            sub=actor.principal.sub,
            cred=actor.principal.cred,
            service=actor.service,
            target=target,
            detail=None if detail is None else dict(detail),
            request_id=actor.request_id,
            correlation_id=actor.correlation_id,
        )
    )


SEAL_SECONDS = 1.0
SEAL_BATCH = 500
"""Rows that are sealed in one transaction."""
SEAL_LOCK_ROW = ""
"""The row of ``audit_heads`` that whoever seals has locked: no tenant has that name."""


class AuditSealer:
    """Seals rows in the order of their writing. Replicas take turns: one seals, the others find nothing to do."""

    def __init__(self, db: Database, root: SigningKey | KeyRing, clock: Clock) -> None:
        self._db = db
        self._ring = KeyRing.of(root)
        self._clock = clock
        self.failure = ""
        """Why rows cannot be sealed just now; empty when they can."""

    @contextlib.asynccontextmanager
    async def run(self, on_failure: Callable[[BaseException], None]) -> AsyncGenerator[None]:
        """Seal for as long as the context is open, and once more on leaving."""

        def crashed(failure: BaseException) -> None:
            self.failure = f"The sealing stopped: {type(failure).__name__}."
            on_failure(failure)

        try:
            async with run_in_background("audit sealing", self._seal_loop(), crashed):
                yield
        finally:
            with contextlib.suppress(OctoError):
                await self.seal()

    async def check_health(self) -> DependencyStatus:
        """Say for ``/ready`` whether rows are sealed; until they are, they are kept all the same."""
        return DependencyStatus(ok=not self.failure, detail=self.failure, required=False)

    async def seal(self) -> int:
        """Seal what is written, at most :data:`SEAL_BATCH` rows; return how many."""
        async with self._db.read() as conn:
            if await conn.scalar(select(audit.c.position).where(audit.c.seq.is_(None)).limit(1)) is None:
                return 0
        async with self._db.transaction() as tx:
            turn = select(audit_heads.c.tenant).where(audit_heads.c.tenant == SEAL_LOCK_ROW)
            if await tx.scalar(turn) is None:
                await tx.execute(
                    tx.insert(audit_heads).values(tenant=SEAL_LOCK_ROW, seq=0, hash="").on_conflict_do_nothing()
                )
            if await tx.scalar(turn.with_for_update(skip_locked=True)) is None:
                return 0
            waiting = select(audit).where(audit.c.seq.is_(None)).order_by(audit.c.position).limit(SEAL_BATCH)
            rows = [row_to_dict(row) for row in await tx.all(waiting)]
            by_tenant: dict[str, list[dict[str, Any]]] = {}
            for row in rows:
                by_tenant.setdefault(row["tenant"], []).append(row)
            for tenant, own in by_tenant.items():
                await self._extend_chain(tx, tenant, own)
            return len(rows)

    async def _extend_chain(self, tx: Transaction, tenant: str, rows: list[dict[str, Any]]) -> None:
        held = await tx.first(select(audit_heads).where(audit_heads.c.tenant == tenant))
        seq, digest = (0, "") if held is None else (int(held["seq"]), str(held["hash"]))
        for row in rows:
            seq += 1
            digest = row_hash(digest, audit_row_from(row, seq=seq, digest=""))
            last = row is rows[-1]
            now = self._clock.now()
            signed = sign_checkpoint(self._ring.signing_key(now), tenant, seq, digest, now) if last else None
            await tx.execute(
                update(audit).where(audit.c.position == row["position"]).values(seq=seq, hash=digest, checkpoint=signed)
            )
            if signed is not None:
                end = {"seq": seq, "hash": digest, "checkpoint": signed}
                await tx.execute(
                    tx.insert(audit_heads)
                    .values(tenant=tenant, **end)
                    .on_conflict_do_update(index_elements=[audit_heads.c.tenant], set_=end)
                )

    async def _seal_loop(self) -> None:
        while True:
            await asyncio.sleep(SEAL_SECONDS)
            try:
                while await self.seal() == SEAL_BATCH:
                    pass
                self.failure = ""
            except OctoError as error:
                self.failure = error.detail


async def read_audit_page(db: Database, tenant: str, after: int, limit: int) -> AuditPage:
    """Return sealed rows of a tenant behind the row ``after``, and the head as it was at the same moment."""
    query = select(audit).where(audit.c.tenant == tenant, audit.c.seq > after).order_by(audit.c.seq).limit(limit)
    async with db.read() as conn:
        head = await conn.first(select(audit_heads).where(audit_heads.c.tenant == tenant))
        found = [audit_row_from(row_to_dict(row)) for row in await conn.all(query)]
    if head is None:
        return AuditPage(tuple(found), AuditHead(tenant))
    return AuditPage(tuple(found), AuditHead(tenant, int(head["seq"]), str(head["hash"]), str(head["checkpoint"])))


def audit_row_from(row: Mapping[str, Any], *, seq: int | None = None, digest: str | None = None) -> AuditRow:
    """Return a row of the table as it is told and sealed."""
    return AuditRow(
        seq=row["seq"] if seq is None else seq,
        tenant=row["tenant"],
        at=row["at"],
        action=row["action"],
        sub=row["sub"],
        cred=row["cred"],
        service=row["service"],
        target=row["target"],
        detail=row["detail"],
        request_id=row["request_id"],
        correlation_id=row["correlation_id"],
        hash=row["hash"] if digest is None else digest,
        checkpoint=row["checkpoint"],
    )


async def record_startup(
    db: Database, settings: Settings, directory: Mapping[str, DirectoryEntry], roots: list[str], clock: Clock
) -> None:
    """Write that this process starts, with what, and which keys it begins with."""
    detail = {
        "version": __version__,
        "settings": redact_settings(settings),
        "roots": roots,
        "keys": {name: list(entry.jkts) for name, entry in directory.items()},
    }
    actor = Actor(Principal("orchestrator", "orchestrator", SYSTEM_TENANT), service="orchestrator")
    async with db.transaction() as tx:
        await record_audit(tx, actor, "system.started", "orchestrator", clock.now(), detail)


def redact_settings(settings: Settings) -> dict[str, str]:
    """Return every setting by its variable; of a secret only whether it is set."""
    told: dict[str, str] = {}
    for name, spec in SETTING_SPECS.items():
        value = getattr(settings, name, None)
        if value is None or value in ("", ()):
            continue
        told[spec.variable] = MASK if spec.secret else mask_text(str(value))
    return told
