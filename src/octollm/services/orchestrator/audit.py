"""Audit log: rows written in the transaction of what they record, then sealed.

The sealer chains each tenant's rows by hash and signs checkpoints with the root key, so that a row changed, dropped or
inserted later is detected. Retention cuts the oldest rows off at a checkpoint and moves them to the archive.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import msgspec
from sqlalchemy import delete, select, update

from octollm import __version__
from octollm.capability import DirectoryEntry, Principal, SigningKey
from octollm.capability.audit_chain import row_hash, sign_checkpoint
from octollm.capability.keyring import KeyRing
from octollm.clock import Clock
from octollm.concurrency import BackgroundLoop, LoopLogger
from octollm.config import SETTING_SPECS, Settings
from octollm.contracts.observability import AuditHead, AuditPage, AuditRow
from octollm.errors import OctoError
from octollm.events import EventDraft, EventLog
from octollm.masking import MASK, mask_text
from octollm.rpc.call import IncomingCall
from octollm.services.orchestrator.archive import StoreObject, audit_object
from octollm.storage import Database, Transaction, row_to_dict
from octollm.storage.programs import SqlStatement, insert_statement
from octollm.storage.tables import audit, audit_heads

SYSTEM_TENANT = "system"
"""The owner of rows and events that belong to no tenant."""


@dataclass(frozen=True, slots=True)
class Actor:
    """The principal that acts, and the request in which it does."""

    principal: Principal
    request_id: str = ""
    correlation_id: str = ""
    service: str = ""


def actor_from_call(call: IncomingCall) -> Actor:
    """Return the actor of a call."""
    return Actor(call.authority.principal, call.request_id, call.correlation_id)


async def record_audit(
    tx: Transaction,
    actor: Actor,
    action: str,
    target: str,
    at: float,
    detail: Mapping[str, object] | None = None,
) -> None:
    """Write a row: ``action`` on ``target`` at ``at`` in epoch seconds. ``detail`` must hold no secrets."""
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


_COLUMNS = ("tenant", "at", "action", "sub", "cred", "service", "target", "detail", "request_id", "correlation_id")


def audit_statement(
    actor: Actor, action: str, target: str, at: float, detail: Mapping[str, object] | None = None
) -> SqlStatement:
    """Return the write of :func:`record_audit`, for a program."""
    principal = actor.principal
    encoded = None if detail is None else msgspec.json.encode(detail).decode()
    values = (principal.tenant, at, action, principal.sub, principal.cred, actor.service, target, encoded)
    return SqlStatement(insert_statement("audit", _COLUMNS), (*values, actor.request_id, actor.correlation_id))


SEAL_SECONDS = 1.0
SEAL_BATCH = 500
"""Rows sealed in one transaction."""
SEAL_LOCK_ROW = ""
"""The row of ``audit_heads`` that the sealing replica locks; no tenant has this name."""


class AuditSealer:
    """Seals rows in insertion order, each with its event. Replicas take turns: while one seals, the others skip it."""

    def __init__(
        self, db: Database, events: EventLog, root: SigningKey | KeyRing, clock: Clock, log: LoopLogger | None = None
    ) -> None:
        self._db = db
        self._events = events
        self._ring = KeyRing.of(root)
        self._clock = clock
        self._loop = BackgroundLoop(
            "audit sealing",
            self._seal_all,
            interval=SEAL_SECONDS,
            initial_delay=SEAL_SECONDS,
            restart=True,
            log=log,
        )
        self.check_health = self._loop.check_health

    @contextlib.asynccontextmanager
    async def run(self) -> AsyncGenerator[None]:
        """Seal for as long as the context is open, and once more on leaving."""
        try:
            async with self._loop:
                yield
        finally:
            with contextlib.suppress(OctoError):
                await self.seal()

    async def seal(self) -> int:
        """Seal up to :data:`SEAL_BATCH` rows and return their number."""
        # A plain read first: every replica looks each second and must not begin a write for nothing.
        async with self._db.read() as conn:
            if await conn.scalar(select(audit.c.position).where(audit.c.seq.is_(None)).limit(1)) is None:
                return 0
        async with self._db.transaction() as tx:
            # One lock for all tenants: two sealers at once could extend a chain from the same head.
            lock_row = select(audit_heads.c.tenant).where(audit_heads.c.tenant == SEAL_LOCK_ROW)
            if await tx.scalar(lock_row) is None:
                await tx.execute(
                    tx.insert(audit_heads).values(tenant=SEAL_LOCK_ROW, seq=0, hash="").on_conflict_do_nothing()
                )
            if await tx.scalar(lock_row.with_for_update(skip_locked=True)) is None:
                return 0
            unsealed = select(audit).where(audit.c.seq.is_(None)).order_by(audit.c.position).limit(SEAL_BATCH)
            rows = [row_to_dict(row) for row in await tx.all(unsealed)]
            by_tenant: dict[str, list[dict[str, Any]]] = {}
            for row in rows:
                by_tenant.setdefault(row["tenant"], []).append(row)
            recorded: list[EventDraft] = []
            for tenant, tenant_rows in sorted(by_tenant.items()):
                recorded += await self._extend_chain(tx, tenant, tenant_rows)
            # Last and by tenant, since the events lock one subject for each (lock order in `database.py`).
            await self._events.append_all(tx, recorded)
            return len(rows)

    async def _extend_chain(self, tx: Transaction, tenant: str, rows: list[dict[str, Any]]) -> list[EventDraft]:
        """Seal a tenant's rows, and return the events that tell of them."""
        recorded: list[EventDraft] = []
        head = await tx.first(select(audit_heads).where(audit_heads.c.tenant == tenant))
        seq, digest = (0, "") if head is None else (int(head["seq"]), str(head["hash"]))
        for row in rows:
            seq += 1
            digest = row_hash(digest, audit_row_from(row, seq=seq, digest=""))
            # Signing is slow; one checkpoint at the end covers the whole batch.
            is_last = row is rows[-1]
            now = self._clock.now()
            signed = sign_checkpoint(self._ring.signing_key(now), tenant, seq, digest, now) if is_last else None
            await tx.execute(
                update(audit).where(audit.c.position == row["position"]).values(seq=seq, hash=digest, checkpoint=signed)
            )
            recorded.append(_recorded_event(tenant, row, seq))
            if signed is not None:
                end = {"seq": seq, "hash": digest, "checkpoint": signed}
                await tx.execute(
                    tx.insert(audit_heads)
                    .values(tenant=tenant, **end)
                    .on_conflict_do_update(index_elements=[audit_heads.c.tenant], set_=end)
                )
        return recorded

    async def _seal_all(self) -> None:
        while await self.seal() == SEAL_BATCH:
            pass


def _recorded_event(tenant: str, row: Mapping[str, Any], seq: int) -> EventDraft:
    # Who did what to whom stays in the audit log: reading that needs a scope of its own.
    return EventDraft(
        "audit.recorded",
        subject=f"audit/{tenant}",
        tenant=tenant,
        source="orchestrator",
        data={"action": row["action"], "seq": seq},
        correlation_id=row["correlation_id"],
    )


CUT_BATCH = 2 * SEAL_BATCH
"""Rows archived at a time: so many have a checkpoint among them, where the log can be cut."""
TENANT_PAGE = 100


async def archive_audit(db: Database, before: float, store: StoreObject) -> int:
    """Move up to :data:`CUT_BATCH` of each tenant's oldest rows from before a time to the archive; return how many."""
    count = 0
    after = SEAL_LOCK_ROW
    while True:
        oldest = (audit.c.tenant == audit_heads.c.tenant) & (audit.c.seq == audit_heads.c.cut_seq + 1)
        query = select(audit_heads.c.tenant).join(audit, oldest).where(audit.c.at < before)
        query = query.where(audit_heads.c.tenant > after).order_by(audit_heads.c.tenant).limit(TENANT_PAGE)
        async with db.read() as conn:
            tenants = [str(row["tenant"]) for row in await conn.all(query)]
        for tenant in tenants:
            count += await _archive_tenant(db, tenant, before, store)
        if len(tenants) < TENANT_PAGE:
            return count
        after = tenants[-1]


async def _archive_tenant(db: Database, tenant: str, before: float, store: StoreObject) -> int:
    async with db.read() as conn:
        state = await conn.first(select(audit_heads).where(audit_heads.c.tenant == tenant))
        if state is None:
            return 0
        query = select(audit).where(audit.c.tenant == tenant, audit.c.seq > state["cut_seq"]).order_by(audit.c.seq)
        rows = [audit_row_from(row_to_dict(row)) for row in await conn.all(query.limit(CUT_BATCH))]
    due = list(takewhile(lambda row: row.at < before, rows))
    # The root signed the chain at these rows when they were sealed: what is left is verified from there.
    while due and due[-1].checkpoint is None:
        due.pop()
    if not due:
        return 0
    last = due[-1]
    head = AuditHead(tenant, last.seq, last.hash, last.checkpoint or "")
    # Before the deletion: a crash in between stores an object with the same first row again.
    await store(*audit_object(tenant, _cut_of(row_to_dict(state)), due, head))
    async with db.transaction() as tx:
        here = (audit_heads.c.tenant == tenant, audit_heads.c.cut_seq == state["cut_seq"])
        cut = {"cut_seq": head.seq, "cut_hash": head.hash, "cut_checkpoint": head.checkpoint}
        if (await tx.execute(update(audit_heads).where(*here).values(**cut))).rowcount == 0:
            return 0  # another replica took over retention, and was faster
        await tx.execute(delete(audit).where(audit.c.tenant == tenant, audit.c.seq <= head.seq))
    return len(due)


def _cut_of(state: Mapping[str, Any]) -> AuditHead | None:
    if not state["cut_seq"]:
        return None
    return AuditHead(str(state["tenant"]), int(state["cut_seq"]), str(state["cut_hash"]), str(state["cut_checkpoint"]))


async def read_audit_page(db: Database, tenant: str, after: int, limit: int) -> AuditPage:
    """Return a tenant's sealed rows after the row ``after``, and the chain's head in the same snapshot."""
    query = select(audit).where(audit.c.tenant == tenant, audit.c.seq > after).order_by(audit.c.seq).limit(limit)
    async with db.read() as conn:
        head = await conn.first(select(audit_heads).where(audit_heads.c.tenant == tenant))
        rows = tuple(audit_row_from(row_to_dict(row)) for row in await conn.all(query))
    if head is None:
        return AuditPage(rows, AuditHead(tenant))
    end = AuditHead(tenant, int(head["seq"]), str(head["hash"]), str(head["checkpoint"]))
    return AuditPage(rows, end, _cut_of(row_to_dict(head)))


def audit_row_from(row: Mapping[str, Any], *, seq: int | None = None, digest: str | None = None) -> AuditRow:
    """Return the audit row of a table row; ``seq`` and ``digest`` override the stored values before sealing."""
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
    """Record the start of this process, with its version, its settings and the keys that it trusts."""
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
    """Return the settings that are set, by variable, with secrets masked."""
    redacted: dict[str, str] = {}
    for name, spec in SETTING_SPECS.items():
        value = getattr(settings, name, None)
        if value is None or value in ("", ()):
            continue
        redacted[spec.variable] = MASK if spec.secret else mask_text(str(value))
    return redacted
