"""Instances of arms: registration, heartbeat, deregistration, and a sweep that drops silent ones.

Every replica may do each of these; a change and its event are one transaction, so that each happens once.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from sqlalchemy import ColumnElement, delete, exists, func, select, update

from octollm.capability.enrolment import check_operation_name, parse_declared_calls, scopes_of
from octollm.concurrency import BackgroundLoop, LoopLogger
from octollm.contracts.enrolment import ArmRegistration
from octollm.contracts.services import BUILT_IN_ARMS
from octollm.errors import OctoError
from octollm.events import EventLog
from octollm.services.orchestrator.audit import SYSTEM_TENANT
from octollm.services.orchestrator.registry import MAX_ENROLLED_ARMS, MAX_INSTANCES, ServiceRegistry
from octollm.storage import Database, Transaction
from octollm.storage.tables import admissions, arm_instances, arms

HEARTBEAT_TIMEOUT_SECONDS = 20.0
"""Seconds without a heartbeat after which an instance is dropped: three heartbeats and some slack."""
SWEEP_SECONDS = 5.0
MAX_TEXT = 1000
"""Characters of a description, an `about` text or an accepted kind."""
MAX_OPERATIONS = 32
MAX_ACCEPTS = 32
_MAX_INSTANCE = 64
_MAX_URL = 255
_PRINTABLE_ASCII = re.compile(r"[!-~]+")


class InstanceRegistry:
    """Records which instances of arms are up."""

    def __init__(
        self, db: Database, log: EventLog, registry: ServiceRegistry, loop_log: LoopLogger | None = None
    ) -> None:
        self._db = db
        self._log = log
        self._registry = registry
        # The first sweep comes late: while no orchestrator ran, no arm could send a heartbeat.
        self.sweep_loop = BackgroundLoop(
            "arm sweep",
            self.sweep,
            interval=SWEEP_SECONDS,
            initial_delay=HEARTBEAT_TIMEOUT_SECONDS,
            restart=True,
            log=loop_log,
        )

    async def register(self, name: str, arm: ArmRegistration) -> None:
        """Register an instance of the arm ``name``; a new one appends ``arm.registered``.

        Raises ``scope_missing`` for a service that is not an arm, ``authority_missing`` for calls that the arm's
        enrolment token did not admit, and ``invalid_body`` for an invalid registration.
        """
        _validate_registration(arm)
        async with self._registry.refreshing(), self._db.transaction() as tx:
            tenant = await self._authorize_registration(tx, name, arm)
            now = await tx.now()
            # Locked: of two instances that register at once, only one ends the outage with `arm.healthy`.
            before = await tx.first(select(arms.c.state).where(arms.c.name == name).with_for_update())
            values = {
                "description": arm.description,
                "operations": list(arm.operations),
                "calls": list(arm.calls),
                "accepts": list(arm.accepts),
                "about": dict(arm.about),
                "operation_calls": {name: list(calls) for name, calls in arm.operation_calls.items()},
                "url": arm.url,
                "approval": arm.approval,
                "jkt": self._registry.thumbprint(name) or "",
                "state": "healthy",
                "registered_at": now,
                "seen_at": now,
            }
            await tx.execute(
                tx.insert(arms)
                .values(name=name, **values)
                .on_conflict_do_update(index_elements=[arms.c.name], set_=values)
            )
            if await _upsert_instance(tx, name, arm, now):
                data = {"operations": list(arm.operations), "url": arm.url, "instance": arm.instance}
                await self._append_event(tx, "arm.registered", name, tenant, data)
            if before is not None and before["state"] != "healthy":
                await self._append_event(tx, "arm.healthy", name, tenant)

    async def heartbeat(self, name: str, instance: str) -> None:
        """Record a heartbeat; raise ``not_found`` for an instance that must register again."""
        async with self._db.transaction() as tx:
            result = await tx.execute(
                update(arm_instances).where(_match_instance(name, instance)).values(seen_at=await tx.now())
            )
        if result.rowcount != 1:
            raise OctoError(f"This instance of {name} is not registered; register it again.", code="not_found")

    async def deregister(self, name: str, instance: str) -> None:
        """Remove an instance that shuts down; an unknown one is ignored."""
        async with self._registry.refreshing(), self._db.transaction() as tx:
            await _lock_arms(tx, arms.c.name == name)
            await tx.execute(delete(arm_instances).where(_match_instance(name, instance)))
            await self._mark_unhealthy(tx)

    async def sweep(self) -> int:
        """Drop silent instances, mark arms without one as unhealthy, and return the number dropped."""
        async with self._db.read() as conn:
            # A plain read first: every replica sweeps, and mostly there is nothing to drop.
            oldest = await conn.scalar(select(func.min(arm_instances.c.seen_at)))
            if oldest is None or oldest >= await conn.now() - HEARTBEAT_TIMEOUT_SECONDS:
                return 0
        async with self._registry.refreshing(), self._db.transaction() as tx:
            silent = arm_instances.c.seen_at < await tx.now() - HEARTBEAT_TIMEOUT_SECONDS
            await _lock_arms(tx, arms.c.name.in_(select(arm_instances.c.name).where(silent)))
            dropped = await tx.execute(delete(arm_instances).where(silent))
            await self._mark_unhealthy(tx)
        return dropped.rowcount

    async def _authorize_registration(self, tx: Transaction, name: str, arm: ArmRegistration) -> str:
        """Return the arm's tenant; refuse a service that is not an arm, and calls that were not admitted."""
        if name in BUILT_IN_ARMS:
            return SYSTEM_TENANT
        row = await tx.first(select(admissions).where(admissions.c.name == name).with_for_update())
        if row is None:
            raise OctoError(f"{name} is not an arm that may register here.", code="scope_missing")
        excess = sorted(set(scopes_of(parse_declared_calls(arm.calls))) - set(row["calls"]))
        if excess:
            raise OctoError(
                f"{name} declares {', '.join(excess)}, which its enrolment token did not admit. Declare fewer calls, or"
                " enrol it again with a token for these calls.",
                code="authority_missing",
            )
        return str(row["tenant"])

    async def _mark_unhealthy(self, tx: Transaction) -> None:
        """Mark arms without an instance as unhealthy, with one event for each."""
        is_gone = arms.c.state == "healthy", ~exists().where(arm_instances.c.name == arms.c.name)
        owner = select(admissions.c.tenant).where(admissions.c.name == arms.c.name).scalar_subquery()
        for row in await tx.all(select(arms.c.name, owner.label("tenant")).where(*is_gone).limit(200)):
            # The condition is repeated in the update: another replica may have done it since the select.
            mark = update(arms).where(arms.c.name == row["name"], *is_gone).values(state="unhealthy")
            if (await tx.execute(mark)).rowcount == 1:
                await self._append_event(tx, "arm.unhealthy", row["name"], row["tenant"] or SYSTEM_TENANT)

    async def _append_event(
        self, tx: Transaction, event: str, name: str, tenant: str, more: Mapping[str, object] | None = None
    ) -> None:
        await self._log.append(
            tx, event, subject=f"arm/{name}", tenant=tenant, source="orchestrator", data={"arm": name, **(more or {})}
        )


async def _lock_arms(tx: Transaction, condition: ColumnElement[bool]) -> None:
    """Lock the rows of arms before those of their instances, as a registration does."""
    # The opposite order would deadlock with an instance that registers at the same moment.
    most = MAX_ENROLLED_ARMS + len(BUILT_IN_ARMS)
    await tx.all(select(arms.c.name).where(condition).order_by(arms.c.name).limit(most).with_for_update())


async def _upsert_instance(tx: Transaction, name: str, arm: ArmRegistration, now: float) -> bool:
    """Store an instance's address and return whether the instance is new."""
    # An address belongs to the instance that registered it last: a restarted process has a new instance id.
    await tx.execute(
        delete(arm_instances).where(
            arm_instances.c.name == name,
            arm_instances.c.url == arm.url,
            arm_instances.c.instance != arm.instance,
        )
    )
    instance_count = await tx.scalar(
        select(func.count()).where(_match_instance(name, arm.instance)).select_from(arm_instances)
    )
    if instance_count:
        await tx.execute(
            update(arm_instances).where(_match_instance(name, arm.instance)).values(url=arm.url, seen_at=now)
        )
        return False
    count = await tx.scalar(select(func.count()).select_from(arm_instances).where(arm_instances.c.name == name))
    if count >= MAX_INSTANCES:
        raise OctoError(f"{name} has {MAX_INSTANCES} instances, which is the maximum.", code="state_conflict")
    await tx.execute(
        tx.insert(arm_instances).values(name=name, instance=arm.instance, url=arm.url, registered_at=now, seen_at=now)
    )
    return True


def _match_instance(name: str, instance: str) -> Any:
    return (arm_instances.c.name == name) & (arm_instances.c.instance == instance)


def _validate_registration(arm: ArmRegistration) -> None:
    texts = (arm.description, arm.approval, *arm.about.values(), *arm.accepts)
    if any(len(text) > MAX_TEXT for text in texts):
        raise OctoError(f"A description may have at most {MAX_TEXT} characters.", code="invalid_body")
    if not 0 < len(arm.operations) <= MAX_OPERATIONS or len(arm.accepts) > MAX_ACCEPTS:
        raise OctoError(
            f"An arm has 1 to {MAX_OPERATIONS} operations and accepts at most {MAX_ACCEPTS} kinds.",
            code="invalid_body",
        )
    if not set(arm.about) <= set(arm.operations):
        raise OctoError("`about` describes operations that the arm does not have.", code="invalid_body")
    for operation in arm.operations:
        check_operation_name(operation)
    declared = set(scopes_of(parse_declared_calls(arm.calls)))
    if not set(arm.operation_calls) <= set(arm.operations):
        raise OctoError("`operation_calls` names operations that the arm does not have.", code="invalid_body")
    for operation, calls in arm.operation_calls.items():
        # What was admitted is checked for the arm as a whole, so an operation may declare no more than that.
        if beyond := sorted(set(scopes_of(parse_declared_calls(calls))) - declared):
            raise OctoError(
                f"The operation {operation} declares {', '.join(beyond)}, which `calls` of the arm does not have.",
                code="invalid_body",
            )
    if len(arm.instance) > _MAX_INSTANCE:
        raise OctoError(f"An instance id may have at most {_MAX_INSTANCE} characters.", code="invalid_body")
    _validate_url(arm.url)


def _validate_url(url: str) -> None:
    """Raise ``invalid_body`` unless ``url`` is a scheme, a host and a port, and nothing else."""
    invalid = OctoError(
        "An arm's URL is http:// or https://, a host and a port that others can reach: set OCTOLLM_ADVERTISE_URL.",
        code="invalid_body",
    )
    if len(url) > _MAX_URL or not _PRINTABLE_ASCII.fullmatch(url):
        raise invalid
    try:
        parts = urlsplit(url)
        host, _port = parts.hostname, parts.port
    except ValueError:
        raise invalid from None
    if parts.scheme not in ("http", "https") or not host or "@" in parts.netloc:
        raise invalid
    if url != f"{parts.scheme}://{parts.netloc}":
        raise invalid
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return
    address = getattr(address, "ipv4_mapped", None) or address
    if address.is_link_local or address.is_multicast or address.is_unspecified:
        # Cloud metadata services answer on link-local addresses and hand out the machine's credentials.
        raise invalid
