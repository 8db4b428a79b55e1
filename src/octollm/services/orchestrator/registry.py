"""Service registry: keys, declared calls and addresses of services and arms.

Reads come from an in-memory snapshot of the database. It is refreshed every two seconds, after each change by this
replica, and when an unknown caller appears.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import select
from sqlalchemy.engine import RowMapping

from octollm.capability import BUILT_IN_CALLS, Declarations, DeclaredCall, DirectoryEntry, PublicKey
from octollm.capability.enrolment import parse_declared_calls
from octollm.capability.keyring import PublicKeyRing
from octollm.clock import Clock, format_rfc3339
from octollm.concurrency import BackgroundLoop, LoopLogger
from octollm.contracts.enrolment import ArmList, ArmView
from octollm.contracts.service_operations import SERVICE_OPERATIONS
from octollm.contracts.services import BUILT_IN_ARMS
from octollm.contracts.task import ArmInfo
from octollm.storage import Database
from octollm.storage.tables import admissions, arm_instances, arm_keys, arms

SERVICE_SCOPES = frozenset(declared.scope for declared in SERVICE_OPERATIONS if declared.scope)

REFRESH_SECONDS = 2.0
"""Seconds until a change by another replica is visible here."""
MISS_REFRESH_INTERVAL = 0.25
"""Minimum seconds between two refreshes that unknown callers cause: anybody can make up a name."""
MAX_ENROLLED_ARMS = 100
"""Enrolled arms of one installation."""
MAX_INSTANCES = 32
"""Instances of one arm."""
_MAX_KEYS = 8


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """The registry's tables at one moment."""

    directory: Mapping[str, DirectoryEntry]
    tenants: Mapping[str, str] = field(default_factory=dict[str, str])
    """The tenant of each enrolled arm."""
    arms: Sequence[RowMapping] = ()
    """Registered arms, by name."""
    urls: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    """Addresses of each arm's instances, the oldest registration first."""
    declarations: Declarations = field(init=False)
    """The declared calls of every operation."""

    def __post_init__(self) -> None:
        declared = {scope: calls for entry in self.directory.values() for scope, calls in entry.calls.items()}
        object.__setattr__(self, "declarations", declared)

    def arms_of(self, tenant: str) -> Iterator[RowMapping]:
        """Yield the registered arms that the users of ``tenant`` see: the built-in ones and its own."""
        return (row for row in self.arms if row["name"] in BUILT_IN_ARMS or self.tenants.get(row["name"]) == tenant)


class ServiceRegistry:
    """Built-in services by the keys given at start; enrolled arms by their admission and registration."""

    def __init__(
        self,
        db: Database,
        clock: Clock,
        keys: Mapping[str, PublicKey | PublicKeyRing],
        log: LoopLogger | None = None,
    ) -> None:
        self._db = db
        self._clock = clock
        self._keys = {name: PublicKeyRing.of(key) for name, key in keys.items()}
        self._snapshot = _Snapshot(self._built_in(clock.now()))
        self._read_at = float("-inf")
        self._lock = asyncio.Lock()
        self._miss_lock = asyncio.Lock()
        self.refresh_loop = BackgroundLoop(
            "registry refresh",
            self.refresh,
            interval=REFRESH_SECONDS,
            initial_delay=REFRESH_SECONDS,
            restart=True,
            log=log,
        )

    def _built_in(self, now: float) -> dict[str, DirectoryEntry]:
        """Return the built-in services, with the keys that are trusted at ``now``."""
        return {
            name: DirectoryEntry(jkts=tuple(ring.trusted_keys(now)), calls=_built_in_calls(name))
            for name, ring in self._keys.items()
        }

    def directory(self) -> Mapping[str, DirectoryEntry]:
        """Return every service that may authenticate itself or hold a grant."""
        return self._snapshot.directory

    def declarations(self) -> Declarations:
        """Return the declared calls of every operation: the same object until the registry is read again."""
        return self._snapshot.declarations

    def thumbprint(self, service: str) -> str | None:
        """Return the thumbprint of a service's newest key."""
        entry = self.directory().get(service)
        return entry.jkts[0] if entry is not None and entry.jkts else None

    def addresses(self, service: str) -> tuple[str, ...]:
        """Return the addresses of an enrolled arm's instances; none for built-in services and silent arms."""
        entry = self.directory().get(service)
        return entry.urls if entry is not None else ()

    def admitted_arms(self, tenant: str) -> tuple[str, ...]:
        """Return the names of the arms whose operations the users of ``tenant`` may call."""
        enrolled = (name for name, owner in self._snapshot.tenants.items() if owner == tenant)
        return (*BUILT_IN_ARMS, *enrolled)

    async def refresh(self) -> None:
        """Read the snapshot from the database."""
        # One refresh at a time: a slow one must not replace the snapshot of a later one.
        async with self._lock:
            # Before the read: what is committed meanwhile may be missing from it.
            read_at = self._clock.monotonic()
            async with self._db.read() as conn:
                admitted = await conn.all(select(admissions).order_by(admissions.c.name).limit(MAX_ENROLLED_ARMS))
                keys = await conn.all(
                    select(arm_keys).order_by(arm_keys.c.added_at.desc()).limit(10 * MAX_ENROLLED_ARMS)
                )
                rows = await conn.all(select(arms).order_by(arms.c.name).limit(MAX_ENROLLED_ARMS + len(BUILT_IN_ARMS)))
                instances = await conn.all(_instances_query())
            now = self._clock.now()
            self._snapshot = _build_snapshot(self._built_in(now), admitted, keys, rows, instances, now)
            self._read_at = read_at
            self.refresh_loop.report_success()

    @contextlib.asynccontextmanager
    async def refreshing(self) -> AsyncGenerator[None]:
        """Refresh after the block, which changes the registry in the database."""
        try:
            yield
            await self.refresh()
        except asyncio.CancelledError:
            # The change may be committed: the loop reads it now, not only when its next turn comes.
            self.refresh_loop.wake()
            raise

    async def refresh_on_miss(self) -> None:
        """Refresh because of an unknown caller, whom another replica may have admitted a moment ago.

        Callers that come within ``MISS_REFRESH_INTERVAL`` wait, and share a refresh.
        """
        missed_at = self._clock.monotonic()
        async with self._miss_lock:
            if self._read_at <= missed_at:
                await asyncio.sleep(min(self._read_at + MISS_REFRESH_INTERVAL - missed_at, MISS_REFRESH_INTERVAL))
            if self._read_at <= missed_at:
                await self.refresh()

    def arm_names(self, tenant: str) -> frozenset[str]:
        """Return the names of the registered arms that a task of ``tenant`` may be assigned to."""
        return frozenset(row["name"] for row in self._snapshot.arms_of(tenant))

    def operation_scopes(self, tenant: str) -> frozenset[str]:
        """Return the scopes of the operations that the work of a task of ``tenant`` may call."""
        rows = self._snapshot.arms_of(tenant)
        return SERVICE_SCOPES.union(f"{row['name']}:{operation}" for row in rows for operation in row["operations"])

    def list_arms(self, tenant: str) -> tuple[ArmInfo, ...]:
        """Return the arms that the planner may use: the built-in ones and the tenant's healthy ones."""
        return tuple(
            ArmInfo(row["name"], _describe(row), tuple(row["accepts"]), tuple(row["operations"]), row["approval"])
            for row in self._snapshot.arms_of(tenant)
            if row["name"] in BUILT_IN_ARMS or row["state"] == "healthy"
        )

    async def list_arm_views(self, tenant: str) -> ArmList:
        """Return the arms as the users of ``tenant`` see them, read anew so that a list follows its change."""
        await self.refresh()
        snapshot = self._snapshot
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
                    snapshot.urls.get(row["name"], ()),
                )
                for row in snapshot.arms_of(tenant)
            )
        )


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
    instances: Sequence[RowMapping],
    now: float,
) -> _Snapshot:
    registered = {row["name"]: row for row in rows}
    urls = _group_urls(instances)
    thumbprints: dict[str, list[str]] = {}
    for key in keys:
        if key["until"] is None or key["until"] > now:
            thumbprints.setdefault(key["name"], []).append(key["jkt"])
    directory = dict(built_in)
    for row in admitted:
        name = row["name"]
        # A built-in name is never taken over by an enrolled arm, whatever the database holds.
        if name in built_in or name not in thumbprints:
            continue
        calls = _admitted_calls(name, registered[name], frozenset(row["calls"])) if name in registered else {}
        directory[name] = DirectoryEntry(tuple(thumbprints[name][:_MAX_KEYS]), calls, urls.get(name, ()))
    tenants = {row["name"]: row["tenant"] for row in admitted if row["name"] in directory}
    return _Snapshot(directory, tenants, rows, urls)


def _admitted_calls(name: str, row: RowMapping, admitted: frozenset[str]) -> dict[str, tuple[DeclaredCall, ...]]:
    """Return the declared calls of each operation, without those that are no longer admitted."""
    arm_calls: Sequence[str] = row["calls"]
    of_operation: Mapping[str, Sequence[str]] = row["operation_calls"] or {}
    return {
        f"{name}:{operation}": tuple(
            call for call in parse_declared_calls(of_operation.get(operation, arm_calls)) if call.scope in admitted
        )
        for operation in row["operations"]
    }


def _group_urls(instances: Sequence[RowMapping]) -> dict[str, tuple[str, ...]]:
    urls: dict[str, dict[str, None]] = {}
    for row in instances:
        urls.setdefault(row["name"], {})[row["url"]] = None
    return {name: tuple(group) for name, group in urls.items()}


def _describe(row: RowMapping) -> str:
    """Return an arm's description, extended by those of its operations that it does not contain."""
    sentences: dict[str, str] = row["about"] or {}
    about = " ".join(text for text in sentences.values() if text not in row["description"])
    return f"{row['description']} {about}".strip()[:1000]


def _built_in_calls(service: str) -> dict[str, tuple[DeclaredCall, ...]]:
    return {scope: calls for scope, calls in BUILT_IN_CALLS.items() if scope.split(":", 1)[0] == service}
