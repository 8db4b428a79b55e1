"""The services and arms that are known: their keys, what they declare, and where they answer."""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import select

from octollm.capability import BUILT_IN_CALLS, Call, Declarations, DirectoryEntry, PublicKey
from octollm.clock import Clock, iso
from octollm.contracts.api import ArmList, ArmRegistration, ArmView
from octollm.contracts.services import BUILT_IN_ARMS
from octollm.contracts.task import ArmInfo
from octollm.errors import OctoError
from octollm.events import EventLog
from octollm.storage import Database
from octollm.storage.tables import arms

SYSTEM_TENANT = "system"


class Registry:
    """Built-in services by the keys given at start; arms by their registration."""

    def __init__(self, db: Database, log: EventLog, clock: Clock, keys: Mapping[str, PublicKey]) -> None:
        self._db = db
        self._log = log
        self._clock = clock
        self._entries = {
            name: DirectoryEntry(jkts=(key.thumbprint,), calls=_calls_of(name)) for name, key in keys.items()
        }

    def directory(self) -> Mapping[str, DirectoryEntry]:
        """Return every service that may speak for itself or hold a grant."""
        return self._entries

    def declarations(self) -> Declarations:
        """Return the declared calls of every operation."""
        return {scope: calls for entry in self._entries.values() for scope, calls in entry.calls.items()}

    def thumbprint(self, service: str) -> str | None:
        """Return the thumbprint of a service's key."""
        entry = self._entries.get(service)
        return entry.jkts[0] if entry is not None else None

    async def register(self, name: str, arm: ArmRegistration) -> None:
        """Note that an arm is up, and tell it. Raises ``scope_missing`` for a service that is no arm."""
        if name not in BUILT_IN_ARMS:
            raise OctoError(f"{name} is not an arm that may register here.", code="scope_missing")
        async with self._db.transaction() as tx:
            now = self._clock.now()
            values = {
                "description": arm.description,
                "operations": list(arm.operations),
                "calls": list(arm.calls),
                "accepts": list(arm.accepts),
                "url": arm.url,
                "jkt": self._entries[name].jkts[0],
                "state": "healthy",
                "registered_at": now,
                "seen_at": now,
            }
            await tx.execute(
                tx.insert(arms)
                .values(name=name, **values)
                .on_conflict_do_update(index_elements=[arms.c.name], set_=values)
            )
            await self._log.append(
                tx,
                "arm.registered",
                subject=f"arm/{name}",
                tenant=SYSTEM_TENANT,
                source="orchestrator",
                data={"arm": name, "operations": list(arm.operations)},
            )

    async def arms(self) -> tuple[ArmInfo, ...]:
        """Return what the planner is told of the arms."""
        async with self._db.read() as conn:
            rows = await conn.all(select(arms).order_by(arms.c.name).limit(200))
        return tuple(
            ArmInfo(row["name"], row["description"], tuple(row["accepts"]), tuple(row["operations"])) for row in rows
        )

    async def views(self) -> ArmList:
        """Return the arms as their users see them."""
        async with self._db.read() as conn:
            rows = await conn.all(select(arms).order_by(arms.c.name).limit(200))
        return ArmList(
            tuple(
                ArmView(
                    row["name"],
                    row["description"],
                    tuple(row["operations"]),
                    tuple(row["calls"]),
                    row["url"],
                    iso(row["registered_at"]),
                )
                for row in rows
            )
        )


def _calls_of(service: str) -> dict[str, tuple[Call, ...]]:
    return {scope: calls for scope, calls in BUILT_IN_CALLS.items() if scope.split(":", 1)[0] == service}
