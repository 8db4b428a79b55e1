"""Instances of arms: registration, heartbeat, deregistration, and a sweep that drops silent ones."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from sqlalchemy import delete, exists, func, select, update

from octollm.capability.enrolment import check_operation_name, parse_declared_calls, scopes_of
from octollm.concurrency import run_in_background
from octollm.contracts.api import ArmRegistration
from octollm.contracts.services import BUILT_IN_ARMS
from octollm.errors import OctoError
from octollm.events import EventLog
from octollm.services.orchestrator.audit import SYSTEM_TENANT
from octollm.services.orchestrator.registry import MAX_INSTANCES, ServiceRegistry
from octollm.storage import Database, Transaction
from octollm.storage.tables import admissions, arm_instances, arms

HEARTBEAT_TIMEOUT_SECONDS = 20.0
"""An instance that says nothing for so long is dropped: three heartbeats, and time for a slow one."""
SWEEP_SECONDS = 5.0
MAX_TEXT = 1000
"""Characters of a description."""
MAX_OPERATIONS = 32
MAX_ACCEPTS = 32
_MAX_INSTANCE = 64
_MAX_URL = 255
_PRINTABLE_ASCII = re.compile(r"[!-~]+")


class InstanceRegistry:
    """Writes who is there. Every replica may: what each does is the same, and done once."""

    def __init__(self, db: Database, log: EventLog, registry: ServiceRegistry) -> None:
        self._db = db
        self._log = log
        self._registry = registry

    async def register(self, name: str, arm: ArmRegistration) -> None:
        """Note that a process of the arm ``name`` is up, and tell it.

        Raises ``scope_missing`` for a service that is no arm, ``authority_missing`` for calls that the arm's join
        secret did not admit, and ``invalid_body`` for a registration that is wrong.
        """
        _validate_registration(arm)
        async with self._db.transaction() as tx:
            tenant = await self._authorize_registration(tx, name, arm)
            now = await tx.now()
            before = await tx.first(select(arms.c.state).where(arms.c.name == name).with_for_update())
            values = {
                "description": arm.description,
                "operations": list(arm.operations),
                "calls": list(arm.calls),
                "accepts": list(arm.accepts),
                "about": dict(arm.about),
                "url": arm.url,
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
            fresh = await _upsert_instance(tx, name, arm, now)
            if fresh:
                data = {"operations": list(arm.operations), "url": arm.url, "instance": arm.instance}
                await self._append_event(tx, "arm.registered", name, tenant, data)
            if before is not None and before["state"] != "healthy":
                await self._append_event(tx, "arm.healthy", name, tenant)
        await self._registry.refresh()

    async def heartbeat(self, name: str, instance: str) -> None:
        """Note that a process is still there; raise ``not_found`` when it has to register again."""
        async with self._db.transaction() as tx:
            done = await tx.execute(
                update(arm_instances).where(_match_instance(name, instance)).values(seen_at=await tx.now())
            )
        if done.rowcount != 1:
            raise OctoError(f"This instance of {name} is not registered; register it again.", code="not_found")

    async def deregister(self, name: str, instance: str) -> None:
        """Forget a process that ends in order; one that is not known is forgotten already."""
        async with self._db.transaction() as tx:
            await tx.execute(delete(arm_instances).where(_match_instance(name, instance)))
            await self._mark_unhealthy(tx)
        await self._registry.refresh()

    async def sweep(self) -> int:
        """Drop processes that fell silent, and tell of arms that have none left; return how many were dropped."""
        async with self._db.read() as conn:
            oldest = await conn.scalar(select(func.min(arm_instances.c.seen_at)))
            if oldest is None or oldest >= await conn.now() - HEARTBEAT_TIMEOUT_SECONDS:
                return 0
        async with self._db.transaction() as tx:
            silent = arm_instances.c.seen_at < await tx.now() - HEARTBEAT_TIMEOUT_SECONDS
            dropped = await tx.execute(delete(arm_instances).where(silent))
            await self._mark_unhealthy(tx)
        await self._registry.refresh()
        return dropped.rowcount

    @contextlib.asynccontextmanager
    async def run(self, on_failure: Callable[[BaseException], None]) -> AsyncGenerator[None]:
        """Sweep for as long as the context is open.

        Not before arms had the time to be heard: while no orchestrator ran, nobody could send a heartbeat.
        """
        async with run_in_background("arms", self._sweep_loop(), on_failure):
            yield

    async def _sweep_loop(self) -> None:
        await asyncio.sleep(HEARTBEAT_TIMEOUT_SECONDS)
        while True:
            with contextlib.suppress(OctoError):  # without a database, which /ready says, there is a next time
                await self.sweep()
            await asyncio.sleep(SWEEP_SECONDS)

    async def _authorize_registration(self, tx: Transaction, name: str, arm: ArmRegistration) -> str:
        """Return whose arm it is; refuse what may not register, and calls that were not admitted."""
        if name in BUILT_IN_ARMS:
            return SYSTEM_TENANT
        row = await tx.first(select(admissions).where(admissions.c.name == name).with_for_update())
        if row is None:
            raise OctoError(f"{name} is not an arm that may register here.", code="scope_missing")
        too_much = sorted(set(scopes_of(parse_declared_calls(arm.calls))) - set(row["calls"]))
        if too_much:
            raise OctoError(
                f"{name} declares {', '.join(too_much)}, which its join secret did not admit. Declare less, or have it"
                " join again with a secret for these calls.",
                code="authority_missing",
            )
        return str(row["tenant"])

    async def _mark_unhealthy(self, tx: Transaction) -> None:
        """Mark arms without a process as unhealthy, and tell of each once."""
        gone = arms.c.state == "healthy", ~exists().where(arm_instances.c.name == arms.c.name)
        owner = select(admissions.c.tenant).where(admissions.c.name == arms.c.name).scalar_subquery()
        for row in await tx.all(select(arms.c.name, owner.label("tenant")).where(*gone).limit(200)):
            done = await tx.execute(update(arms).where(arms.c.name == row["name"], *gone).values(state="unhealthy"))
            if done.rowcount == 1:
                await self._append_event(tx, "arm.unhealthy", row["name"], row["tenant"] or SYSTEM_TENANT)

    async def _append_event(
        self, tx: Transaction, event: str, name: str, tenant: str, more: Mapping[str, object] | None = None
    ) -> None:
        await self._log.append(
            tx, event, subject=f"arm/{name}", tenant=tenant, source="orchestrator", data={"arm": name, **(more or {})}
        )


async def _upsert_instance(tx: Transaction, name: str, arm: ArmRegistration, now: float) -> bool:
    """Note where a process answers; return whether it was not known. An address belongs to whoever is there now."""
    await tx.execute(
        delete(arm_instances).where(
            arm_instances.c.name == name,
            arm_instances.c.url == arm.url,
            arm_instances.c.instance != arm.instance,
        )
    )
    known = await tx.scalar(select(func.count()).where(_match_instance(name, arm.instance)).select_from(arm_instances))
    if known:
        await tx.execute(
            update(arm_instances).where(_match_instance(name, arm.instance)).values(url=arm.url, seen_at=now)
        )
        return False
    placed = await tx.scalar(select(func.count()).select_from(arm_instances).where(arm_instances.c.name == name))
    if placed >= MAX_INSTANCES:
        raise OctoError(f"{name} has {MAX_INSTANCES} processes already, the most there may be.", code="state_conflict")
    await tx.execute(
        tx.insert(arm_instances).values(name=name, instance=arm.instance, url=arm.url, registered_at=now, seen_at=now)
    )
    return True


def _match_instance(name: str, instance: str) -> Any:
    return (arm_instances.c.name == name) & (arm_instances.c.instance == instance)


def _validate_registration(arm: ArmRegistration) -> None:
    texts = (arm.description, *arm.about.values(), *arm.accepts)
    if any(len(text) > MAX_TEXT for text in texts):
        raise OctoError(f"A description has at most {MAX_TEXT} characters.", code="invalid_body")
    if not 0 < len(arm.operations) <= MAX_OPERATIONS or len(arm.accepts) > MAX_ACCEPTS:
        raise OctoError(
            f"An arm has from 1 to {MAX_OPERATIONS} operations and accepts at most {MAX_ACCEPTS} kinds.",
            code="invalid_body",
        )
    if not set(arm.about) <= set(arm.operations):
        raise OctoError("`about` tells of operations that the arm does not have.", code="invalid_body")
    for operation in arm.operations:
        check_operation_name(operation)
    parse_declared_calls(arm.calls)
    if len(arm.instance) > _MAX_INSTANCE:
        raise OctoError(f"An instance is named by at most {_MAX_INSTANCE} characters.", code="invalid_body")
    _validate_url(arm.url)


def _validate_url(url: str) -> None:
    """Return when ``url`` is the address of a service: scheme, host and port, nothing else."""
    wrong = OctoError(
        "An arm's url is http:// or https://, a host and a port, as others reach it: set OCTOLLM_ADVERTISE_URL.",
        code="invalid_body",
    )
    if len(url) > _MAX_URL or not _PRINTABLE_ASCII.fullmatch(url):
        raise wrong
    try:
        parts = urlsplit(url)
        host, _port = parts.hostname, parts.port
    except ValueError:
        raise wrong from None
    if parts.scheme not in ("http", "https") or not host or "@" in parts.netloc:
        raise wrong
    if url != f"{parts.scheme}://{parts.netloc}":
        raise wrong
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return
    address = getattr(address, "ipv4_mapped", None) or address
    if address.is_link_local or address.is_multicast or address.is_unspecified:
        # Link-local addresses are where clouds answer for their machines' own credentials.
        raise wrong
