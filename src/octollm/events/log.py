"""The durable event log.

Events are validated against the catalogue and written in the transaction of the change that they describe. The
sequencer assigns their global position (``seq``) after the commit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import msgspec
from sqlalchemy import select
from sqlalchemy.engine import RowMapping

from octollm.clock import Clock, IdGenerator, format_rfc3339
from octollm.contracts.events import EVENT_CATALOGUE, Event, EventType, channel_of
from octollm.errors import FieldError, OctoError, map_exceptions
from octollm.storage import Database, DatabaseConnection, Transaction
from octollm.storage.tables import events, subjects

MAX_EVENT_BYTES = 256 * 1024
"""Bytes of an event's ``data`` as JSON."""
MAX_READ = 1000
"""Events returned by one read."""
TASK_PREFIX = "task/"


def task_subject(task_id: str) -> str:
    """Return the subject of a task's events and of its steps' events."""
    return f"{TASK_PREFIX}{task_id}"


def validate_event(event_type: str, data: Mapping[str, object]) -> EventType:
    """Return the declaration of ``event_type``.

    Raises ``invalid_body`` when the type is not declared, a required member of ``data`` is missing, or ``data`` is
    too large or not JSON.
    """
    kind = EVENT_CATALOGUE.get(event_type)
    if kind is None:
        raise OctoError(f"The event {event_type!r} is not declared in the catalogue.", code="invalid_body")
    missing = [name for name in kind.required if name not in data]
    if missing:
        raise OctoError(
            f"The event {event_type!r} lacks {', '.join(missing)}.",
            code="invalid_body",
            field_errors=[FieldError(f"/data/{name}", "is missing") for name in missing],
        )
    with map_exceptions(
        OctoError(f"The data of the event {event_type!r} is not JSON.", code="invalid_body"),
        TypeError,
        ValueError,
        msgspec.MsgspecError,
    ):
        size = len(msgspec.json.encode(data))
    if size > MAX_EVENT_BYTES:
        raise OctoError(
            f"The data of the event {event_type!r} has {size} bytes; {MAX_EVENT_BYTES} are allowed.",
            code="invalid_body",
        )
    return kind


class EventLog:
    """Writes and reads the log. Only the orchestrator owns one."""

    def __init__(self, db: Database, clock: Clock, ids: IdGenerator) -> None:
        self._db = db
        self._clock = clock
        self._ids = ids
        self._listeners: list[Callable[[], None]] = []

    def on_commit(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Call ``listener`` after each commit of an event in this process; return the function that removes it."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    async def append(
        self,
        tx: Transaction,
        event_type: str,
        *,
        subject: str,
        tenant: str,
        source: str,
        data: dict[str, object],
        correlation_id: str = "",
        traceparent: str = "",
        event_id: str | None = None,
        timestamp: str | None = None,
    ) -> Event:
        """Write an event in the caller's transaction and return it, with its ``version`` and without ``seq``.

        ``version`` is one more than that of the subject's last event; the subject's row stays locked until the
        transaction ends, so versions have no gaps. ``event_id`` and ``timestamp`` (RFC 3339) identify an event that
        another service created: an id that the tenant's log already has is not written again, and the stored event is
        returned. The sequencer assigns ``seq`` after the commit.

        Raises ``invalid_body`` for an event that is not declared, not durable or lacks a member; ``state_conflict``
        for the id of another tenant's event.
        """
        kind = validate_event(event_type, data)
        if not kind.durable:
            raise OctoError(f"The event {event_type!r} is not durable; publish it on the bus.", code="invalid_body")
        if event_id is not None:
            # A concurrent writer of the same event has the same subject, so the row lock serialises the two.
            await _lock_subject(tx, tenant, subject)
            existing = await tx.first(select(events).where(events.c.tenant == tenant, events.c.id == event_id))
            if existing is not None:
                return event_from_row(existing)
        # From here on the subject's row is locked until the commit, so versions follow the order of commits: a second
        # writer of the same subject waits here, and a rollback gives its number back. Locks on subjects come last in
        # the lock order, which keeps this wait short and free of deadlocks.
        version = await _next_version(tx, tenant, subject)
        event = Event(
            event_type=event_type,
            timestamp=timestamp or format_rfc3339(self._clock.now()),
            source=source,
            data=data,
            id=event_id or self._ids.hex(),
            tenant=tenant,
            subject=subject,
            version=version,
            correlation_id=correlation_id,
            traceparent=traceparent,
        )
        values = msgspec.structs.asdict(event) | {"seq": None, "prev": None, "channel": channel_of(event_type)}
        await tx.execute(tx.insert(events).values(values))
        # Not before the commit: the readers that it wakes would not see the event yet.
        tx.after_commit(self._notify_listeners)
        return event

    def _notify_listeners(self) -> None:
        for listener in tuple(self._listeners):
            listener()

    async def read(
        self,
        after: int,
        limit: int = MAX_READ,
        *,
        tenant: str | None,
        subject: str | None = None,
        types: Sequence[str] | None = None,
        connection: DatabaseConnection | None = None,
    ) -> list[Event]:
        """Return up to ``limit`` (at most 1000) events after the position ``after``, in order of ``seq``.

        ``tenant=None`` reads every tenant's events and is for built-in services only. Events without a sequence
        number are left out. With ``connection`` the read is part of that snapshot or transaction.
        """
        query = select(events).where(events.c.seq > after)
        if tenant is not None:
            query = query.where(events.c.tenant == tenant)
        if subject is not None:
            query = query.where(events.c.subject == subject)
        if types is not None:
            query = query.where(events.c.event_type.in_(types))
        query = query.order_by(events.c.seq).limit(min(limit, MAX_READ))
        if connection is not None:
            return [event_from_row(row) for row in await connection.all(query)]
        async with self._db.read() as snapshot:
            return [event_from_row(row) for row in await snapshot.all(query)]

    async def read_subject(
        self,
        subject: str,
        after_version: int = 0,
        limit: int = MAX_READ,
        *,
        tenant: str,
        connection: DatabaseConnection | None = None,
    ) -> list[Event]:
        """Return up to ``limit`` (at most 1000) events of one subject after a version, in order of ``version``.

        They are visible as soon as they are committed; ``seq`` is 0 until the sequencer has assigned one.
        """
        query = (
            select(events)
            .where(events.c.tenant == tenant, events.c.subject == subject, events.c.version > after_version)
            .order_by(events.c.version)
            .limit(min(limit, MAX_READ))
        )
        if connection is not None:
            return [event_from_row(row) for row in await connection.all(query)]
        async with self._db.read() as snapshot:
            return [event_from_row(row) for row in await snapshot.all(query)]


async def _lock_subject(tx: Transaction, tenant: str, subject: str) -> None:
    # A row must exist to be locked; version 0 stands for a subject without events.
    await tx.execute(tx.insert(subjects).values(tenant=tenant, subject=subject, version=0).on_conflict_do_nothing())
    where = (subjects.c.tenant == tenant, subjects.c.subject == subject)
    await tx.execute(select(subjects.c.version).where(*where).with_for_update())


async def _next_version(tx: Transaction, tenant: str, subject: str) -> int:
    # One statement inserts or increments and locks, where a read followed by a write would need a lock of its own.
    statement = tx.insert(subjects).values(tenant=tenant, subject=subject, version=1)
    statement = statement.on_conflict_do_update(
        index_elements=[subjects.c.tenant, subjects.c.subject], set_={"version": subjects.c.version + 1}
    )
    return int(await tx.scalar(statement.returning(subjects.c.version)))


def event_from_row(row: RowMapping) -> Event:
    """Return the event of a row of the log."""
    return Event(
        event_type=row["event_type"],
        timestamp=row["timestamp"],
        source=row["source"],
        data=row["data"],
        id=row["id"],
        tenant=row["tenant"],
        subject=row["subject"],
        seq=row["seq"] or 0,
        prev=row["prev"] or 0,
        version=row["version"],
        correlation_id=row["correlation_id"],
        traceparent=row["traceparent"],
    )
