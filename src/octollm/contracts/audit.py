"""The audit log on the wire: rows sealed into a chain for each tenant, and where the chain stands."""

from __future__ import annotations

from typing import Any

import msgspec


class AuditRow(msgspec.Struct, frozen=True):
    """One thing that somebody may be asked about.

    ``seq`` counts a tenant's rows from 1 without a gap; ``at`` is in epoch seconds. ``hash`` covers the row and the
    hash before it (:func:`octollm.capability.audit_chain.row_hash`); ``checkpoint`` is the root's signature over
    where the chain stood then, on the last row of those that were sealed together.
    """

    seq: int
    tenant: str
    at: float
    action: str
    sub: str
    cred: str
    service: str
    target: str
    detail: dict[str, Any] | None
    request_id: str
    correlation_id: str
    hash: str
    checkpoint: str | None = None


class AuditHead(msgspec.Struct, frozen=True):
    """Where a tenant's chain stands. An empty chain has ``seq`` 0 and no checkpoint."""

    tenant: str
    seq: int = 0
    hash: str = ""
    checkpoint: str = ""


class AuditPage(msgspec.Struct, frozen=True):
    """Rows after a position, oldest first, and where the chain stood when they were read."""

    rows: tuple[AuditRow, ...]
    head: AuditHead
