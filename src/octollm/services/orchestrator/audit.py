"""The audit trail: a row for each thing that somebody may be asked about, in the transaction that did it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from octollm.capability import Principal
from octollm.rpc.call import IncomingCall
from octollm.storage import Transaction
from octollm.storage.tables import audit

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
