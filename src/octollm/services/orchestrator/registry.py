"""The service registry: keys, declared calls and addresses of services and arms, read from a snapshot of the database that is refreshed every two seconds."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import select
from sqlalchemy.engine import RowMapping

from octollm.capability import BUILT_IN_CALLS, Declarations, DeclaredCall, DirectoryEntry, PublicKey
from octollm.capability.enrolment import parse_declared_calls
from octollm.capability.keyring import PublicKeyRing
from octollm.clock import Clock, format_rfc3339
from octollm.concurrency import run_in_background
from octollm.contracts.api import ArmList, ArmView
from octollm.contracts.services import BUILT_IN_ARMS
from octollm.contracts.task import ArmInfo
from octollm.errors import OctoError
from octollm.storage import Database
from octollm.storage.tables import admissions, arm_instances, arm_keys, arms

REFRESH_SECONDS = 2.0
"""How long another replica's change may go unseen."""
MISS_REFRESH_INTERVAL = 0.25
"""A refresh that somebody unknown asks for comes at most so often."""
MAX_ENROLLED_ARMS = 100
"""Arms of one's own in one installation."""
MAX_INSTANCES = 32
"""Processes of one arm."""
_MAX_KEYS = 8


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """What the database said."""

    directory: Mapping[str, DirectoryEntry]
    tenants: Mapping[str, str] = field(default_factory=dict[str, str])
    """The tenant of each arm of one's own."""


class ServiceRegistry:
    """Built-in services by the keys given at start; arms of one's own by their admission and registration."""

    def __init__(self, db: Database, clock: Clock, keys: Mapping[str, PublicKey | PublicKeyRing]) -> None:
        self._db = db
        self._clock = clock
        self._keys = {name: PublicKeyRing.of(key) for name, key in keys.items()}
        self._snapshot = _Snapshot(self._built_in(clock.now()))
        self._refreshed_at = float("-inf")
        self._lock = asyncio.Lock()
        self.failure: str = ""
        """Why the picture may be old; empty while it is not."""

    def _built_in(self, now: float) -> dict[str, DirectoryEntry]:
        """Return the built-in services, with the keys that are believed now."""
        return {
            name: DirectoryEntry(jkts=tuple(ring.trusted_keys(now)), calls=_built_in_calls(name))
            for name, ring in self._keys.items()
        }

    def directory(self) -> Mapping[str, DirectoryEntry]:
        """Return every service that may speak for itself or hold a grant."""
        return self._snapshot.directory

    def declarations(self) -> Declarations:
        """Return the declared calls of every operation."""
        return {scope: calls for entry in self.directory().values() for scope, calls in entry.calls.items()}

    def thumbprint(self, service: str) -> str | None:
        """Return the thumbprint of a service's newest key."""
        entry = self.directory().get(service)
        return entry.jkts[0] if entry is not None and entry.jkts else None

    def addresses(self, service: str) -> tuple[str, ...]:
        """Return where an arm of one's own answers; nothing for another service, or when it is silent."""
        entry = self.directory().get(service)
        return entry.urls if entry is not None else ()

    def admitted_arms(self, tenant: str) -> tuple[str, ...]:
        """Return the names of the arms whose operations a user of ``tenant`` has."""
        own = (name for name, owner in self._snapshot.tenants.items() if owner == tenant)
        return (*BUILT_IN_ARMS, *own)

    async def refresh(self) -> None:
        """Take the picture again."""
        async with self._lock:
            async with self._db.read() as conn:
                admitted = await conn.all(select(admissions).order_by(admissions.c.name).limit(MAX_ENROLLED_ARMS))
                keys = await conn.all(
                    select(arm_keys).order_by(arm_keys.c.added_at.desc()).limit(10 * MAX_ENROLLED_ARMS)
                )
                rows = await conn.all(select(arms).limit(MAX_ENROLLED_ARMS + len(BUILT_IN_ARMS)))
                placed = await conn.all(_instances_query())
            now = self._clock.now()
            self._snapshot = _build_snapshot(self._built_in(now), admitted, keys, rows, placed, now)
            self._refreshed_at = self._clock.monotonic()
            self.failure = ""

    async def refresh_on_miss(self) -> None:
        """Take the picture again for somebody who is not in it: another replica may know them."""
        if self._clock.monotonic() - self._refreshed_at >= MISS_REFRESH_INTERVAL:
            await self.refresh()

    @contextlib.asynccontextmanager
    async def run(self, on_failure: Callable[[BaseException], None]) -> AsyncGenerator[None]:
        """Keep the picture fresh for as long as the context is open."""
        await self.refresh()
        async with run_in_background("registry", self._refresh_loop(), on_failure):
            yield

    async def _refresh_loop(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_SECONDS)
            try:
                await self.refresh()
            except OctoError as error:
                self.failure = error.detail

    async def list_arms(self, tenant: str) -> tuple[ArmInfo, ...]:
        """Return what the planner is told of the arms: the built-in ones, and the tenant's own that answer."""
        return tuple(
            ArmInfo(row["name"], _describe(row), tuple(row["accepts"]), tuple(row["operations"]))
            for row in await self._load_rows(tenant)
            if row["name"] in BUILT_IN_ARMS or row["state"] == "healthy"
        )

    async def list_arm_views(self, tenant: str) -> ArmList:
        """Return the arms as the users of ``tenant`` see them."""
        async with self._db.read() as conn:
            placed = await conn.all(_instances_query())
        urls = _group_urls(placed)
        return ArmList(
            tuple(
                ArmView(
                    row["name"],
                    row["description"],
                    tuple(row["operations"]),
                    tuple(row["calls"]),
                    row["url"],
                    format_rfc3339(row["registered_at"]),
                    row["state"],
                    urls.get(row["name"], ()),
                )
                for row in await self._load_rows(tenant)
            )
        )

    async def _load_rows(self, tenant: str) -> Sequence[RowMapping]:
        owned = select(admissions.c.name).where(admissions.c.tenant == tenant)
        query = (
            select(arms)
            .where(arms.c.name.in_(BUILT_IN_ARMS) | arms.c.name.in_(owned))
            .order_by(arms.c.name)
            .limit(MAX_ENROLLED_ARMS + len(BUILT_IN_ARMS))
        )
        async with self._db.read() as conn:
            return await conn.all(query)


def _instances_query() -> Any:
    return (
        select(arm_instances.c.name, arm_instances.c.url)
        .order_by(arm_instances.c.name, arm_instances.c.registered_at)
        .limit((MAX_ENROLLED_ARMS + len(BUILT_IN_ARMS)) * MAX_INSTANCES)
    )


def _build_snapshot(
    built_in: Mapping[str, DirectoryEntry],
    admitted: Sequence[RowMapping],
    keys: Sequence[RowMapping],
    rows: Sequence[RowMapping],
    placed: Sequence[RowMapping],
    now: float,
) -> _Snapshot:
    registered = {row["name"]: row for row in rows}
    urls = _group_urls(placed)
    prints: dict[str, list[str]] = {}
    for key in keys:
        if key["until"] is None or key["until"] > now:
            prints.setdefault(key["name"], []).append(key["jkt"])
    directory = dict(built_in)
    for row in admitted:
        name = row["name"]
        if name in built_in or name not in prints:
            continue
        calls = _admitted_calls(name, registered[name], frozenset(row["calls"])) if name in registered else {}
        directory[name] = DirectoryEntry(tuple(prints[name][:_MAX_KEYS]), calls, urls.get(name, ()))
    return _Snapshot(directory, {row["name"]: row["tenant"] for row in admitted if row["name"] in directory})


def _admitted_calls(name: str, row: RowMapping, admitted: frozenset[str]) -> dict[str, tuple[DeclaredCall, ...]]:
    """Return the calls of each operation; a call that is no longer admitted is left out."""
    calls = tuple(call for call in parse_declared_calls(row["calls"]) if call.scope in admitted)
    return {f"{name}:{operation}": calls for operation in row["operations"]}


def _group_urls(placed: Sequence[RowMapping]) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for row in placed:
        found[row["name"]] = tuple(dict.fromkeys((*found.get(row["name"], ()), row["url"])))
    return found


def _describe(row: RowMapping) -> str:
    """Return what an arm does, with what its operations do where it is not the same."""
    sentences: dict[str, str] = row["about"] or {}
    about = " ".join(text for text in sentences.values() if text not in row["description"])
    return f"{row['description']} {about}".strip()[:1000]


def _built_in_calls(service: str) -> dict[str, tuple[DeclaredCall, ...]]:
    return {scope: calls for scope, calls in BUILT_IN_CALLS.items() if scope.split(":", 1)[0] == service}
