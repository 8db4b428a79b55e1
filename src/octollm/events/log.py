"""The durable event log.

Events are validated against the catalogue and written in the transaction of the change that they describe. The
sequencer assigns their global position (``seq``) after the commit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
from sqlalchemy import func, select

from octollm.clock import Clock, IdGenerator, format_rfc3339
from octollm.contracts.events import Event, channel_of, encode_data
from octollm.errors import OctoError
from octollm.events.rows import (
    EVENT_COLUMNS,
    INSERT_EVENTS,
    NEW_EVENT_COLUMNS,
    NEXT_VERSION,
    event_from_row,
    events_from_rows,
    insert_columns,
    insert_on_sqlite,
)
from octollm.storage import Database, DatabaseConnection, Transaction
from octollm.storage.programs import Program, SqlStatement, insert_statement
from octollm.storage.tables import events, relay_state, subjects

MAX_READ = 1000
"""Events returned by one read."""
TASK_PREFIX = "task/"
NumberedListener = Callable[[Sequence[Event], int], None]


def task_subject(task_id: str) -> str:
    """Return the subject of a task's events and of its steps' events."""
    return f"{TASK_PREFIX}{task_id}"


def check_position(after: int, oldest: int, head: int, *, from_oldest: bool = True) -> None:
    """Check that everything after the position ``after`` can be read; 0 is the beginning of what there is.

    Without ``from_oldest`` 0 is a position like any other.

    ``oldest`` and ``head`` are the first and the last position that the log has; ``oldest`` is ``head`` + 1 when it has
    none. Raises ``position_unknown`` beyond the end, where a reader would wait for ever for what it believes to have
    seen, and ``position_expired`` where events in between were deleted.
    """
    if after > head:
        raise OctoError(
            f"The position {after} is not known here: the last one is {head}. It is from another installation, or a"
            " backup was restored. Read again from the beginning.",
            code="position_unknown",
        )
    if after < oldest - 1 and (after > 0 or not from_oldest):
        raise OctoError(
            f"Reading cannot be resumed after the position {after}: the oldest event is {oldest}. Read again from"
            f" {oldest - 1}.",
            code="position_expired",
        )


def encode_durable(event_type: str, data: Mapping[str, object]) -> str:
    """Return the data of an event for the log as JSON. Raises ``invalid_body``, also for one that is not durable."""
    kind, encoded = encode_data(event_type, data)
    if not kind.durable:
        raise OctoError(f"The event {event_type!r} is not durable; publish it on the bus.", code="invalid_body")
    return encoded.decode()


@dataclass(frozen=True, slots=True)
class EventDraft:
    """An event to write; the log adds its id, its time and its version."""

    event_type: str
    subject: str
    tenant: str
    source: str
    data: dict[str, object]
    correlation_id: str = ""
    traceparent: str = ""


class Publisher(Protocol):
    """What the log tells of the events that it writes: the outbox publisher."""

    async def number_in(self, tx: Transaction) -> bool:
        """Give the events of a transaction that is about to commit their positions; return whether it did."""
        ...

    def wake(self) -> None:
        """Do so after the commit, because it was not done before."""
        ...


class EventLog:
    """Writes and reads the log. Only the orchestrator owns one."""

    def __init__(self, db: Database, clock: Clock, ids: IdGenerator) -> None:
        self._db = db
        self._clock = clock
        self._ids = ids
        self._listeners: list[Callable[[], None]] = []
        self._numbered_listeners: list[NumberedListener] = []
        self._publishers: list[Publisher] = []

    def attach_publisher(self, publisher: Publisher) -> Callable[[], None]:
        """Have ``publisher`` number and publish what is written here; return the function that removes it."""
        self._publishers.append(publisher)
        return lambda: self._publishers.remove(publisher)

    def on_numbered(self, listener: NumberedListener) -> Callable[[], None]:
        """Call ``listener`` when the outbox publisher in this process has given events their position.

        It gets the events and the bytes that they have as JSON.

        Returns the function that removes it. Events that another replica numbers are announced by the
        :class:`~octollm.events.log_tail.LogTail`.
        """
        self._numbered_listeners.append(listener)
        return lambda: self._numbered_listeners.remove(listener)

    def notify_numbered(self, batch: Sequence[Event], size: int) -> None:
        """Call the listeners of :meth:`on_numbered`. Called by the outbox publisher only."""
        for listener in tuple(self._numbered_listeners):
            listener(batch, size)

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
        encoded = encode_durable(event_type, data)
        if event_id is not None:
            # A concurrent writer of the same event has the same subject, so the row lock serialises the two.
            await _lock_subject(tx, tenant, subject)
            existing = await tx.first(select(events).where(events.c.tenant == tenant, events.c.id == event_id))
            if existing is not None:
                return event_from_row(existing)
        draft = EventDraft(event_type, subject, tenant, source, data, correlation_id, traceparent)
        return (await self._write(tx, [draft], [encoded], event_id, timestamp))[0]

    async def append_all(self, tx: Transaction, drafts: Sequence[EventDraft]) -> list[Event]:
        """Write events in the caller's transaction as :meth:`append` does, in one statement (on SQLite two).

        Their order in the log, and that of their subjects' versions, is the order given.
        """
        encoded = [encode_durable(draft.event_type, draft.data) for draft in drafts]
        return await self._write(tx, drafts, encoded) if drafts else []

    def insert(self, drafts: Sequence[EventDraft]) -> Program[list[Event]]:
        """Write events as :meth:`append_all` does, within a program; :meth:`notify_program` follows its commit.

        They get their positions after the commit, many in one statement.
        """
        encoded = [encode_durable(draft.event_type, draft.data) for draft in drafts]
        new = self._new_events(drafts)
        if not new:
            return []
        versions: dict[str, int] = {}
        if self._db.dialect == "postgresql":
            rows = yield SqlStatement(INSERT_EVENTS, insert_columns(new, encoded))
            versions = {str(row["id"]): int(row["version"]) for row in rows}
        else:
            for event in new:
                (row,) = yield SqlStatement(NEXT_VERSION, (event.tenant, event.subject))
                versions[event.id] = int(row["version"])
            written = [
                (
                    *(event.id, event.event_type, channel_of(event.event_type), event.tenant, event.subject),
                    *(event.timestamp, event.source, data, event.correlation_id, event.traceparent),
                    versions[event.id],
                )
                for event, data in zip(new, encoded, strict=True)
            ]
            yield SqlStatement(insert_statement("events", NEW_EVENT_COLUMNS), written, many=True)
        return [msgspec.structs.replace(event, version=versions[event.id]) for event in new]

    def notify_program(self) -> None:
        """Have the events of a committed program numbered, and call the listeners of :meth:`on_commit`."""
        self._wake_publishers()
        self._notify_listeners()

    def _notify_listeners(self) -> None:
        for listener in tuple(self._listeners):
            listener()

    def _new_events(
        self, drafts: Sequence[EventDraft], event_id: str | None = None, timestamp: str | None = None
    ) -> list[Event]:
        now = timestamp or format_rfc3339(self._clock.now())
        return [
            Event(
                event_type=draft.event_type,
                timestamp=now,
                source=draft.source,
                data=draft.data,
                id=event_id or self._ids.hex(),
                tenant=draft.tenant,
                subject=draft.subject,
                correlation_id=draft.correlation_id,
                traceparent=draft.traceparent,
            )
            for draft in drafts
        ]

    async def _write(
        self,
        tx: Transaction,
        drafts: Sequence[EventDraft],
        encoded: Sequence[str],
        event_id: str | None = None,
        timestamp: str | None = None,
    ) -> list[Event]:
        new = self._new_events(drafts, event_id, timestamp)
        # From here on the subjects' rows are locked until the commit, so versions follow the order of commits: a second
        # writer of the same subject waits here, and a rollback gives its number back. Locks on subjects come last in
        # the lock order, which keeps this wait short and free of deadlocks.
        if tx.dialect == "postgresql":
            # As plain SQL, since an INSERT of several rows is compiled anew for each number of rows.
            written = await tx.fetch(INSERT_EVENTS, *insert_columns(new, encoded))
            versions = {str(event_id): int(str(version)) for event_id, version in written}
        else:
            versions = await insert_on_sqlite(tx, new)
        tx.before_commit(self._number)
        # Not before the commit: the readers that it wakes would not see the event yet.
        tx.after_commit(self._notify_listeners)
        return [msgspec.structs.replace(event, version=versions[event.id]) for event in new]

    async def _number(self, tx: Transaction) -> None:
        for publisher in tuple(self._publishers):
            if await publisher.number_in(tx):
                return
        tx.after_commit(self._wake_publishers)

    def _wake_publishers(self) -> None:
        for publisher in tuple(self._publishers):
            publisher.wake()

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

        ``after`` is not checked: see :meth:`read_page`.
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

    async def scan(
        self, after: int, limit: int, *, tenant: str | None, types: Collection[str]
    ) -> tuple[list[Event], int]:
        """Return up to ``limit`` events of some types after a position, and the position up to which all were read.

        That is the end of the log when there are no more such events, so a reader of rare events does not fall behind.
        Raises as :func:`check_position` does, also for 0 when the first events were deleted.
        """
        limit = min(limit, MAX_READ)
        if self._db.direct_pool is not None:
            rows = await self._db.direct_pool.fetch(_SCAN, after, limit, tenant, list(types))
            oldest, end = _bounds(*rows[0][12:])
            page = events_from_rows(rows)
        else:
            # The end is read first, in the same snapshot: the log has every event up to it.
            async with self._db.read() as snapshot:
                oldest, end = await self.read_bounds(snapshot)
                page = await self.read(after, limit, tenant=tenant, types=list(types), connection=snapshot)
        check_position(after, oldest, end, from_oldest=False)
        return page, page[-1].seq if len(page) == limit else end

    async def read_bounds(self, connection: DatabaseConnection) -> tuple[int, int]:
        """Return the first and the last position of the log; the first is the last + 1 when it has no events."""
        row = await connection.first(
            select(
                select(func.min(events.c.seq)).scalar_subquery().label("oldest"),
                select(func.max(relay_state.c.numbered)).scalar_subquery().label("head"),
            )
        )
        assert row is not None
        return _bounds(row["oldest"], row["head"])

    async def record_gap(
        self, tx: Transaction, reader: str, after: int, bounds: tuple[int, int], *, tenant: str
    ) -> None:
        """Write that the durable reader ``reader`` goes on from the oldest event, not from ``after``.

        ``bounds`` is as :meth:`read_bounds` returns it.
        """
        oldest, head = bounds
        await self.append(
            tx,
            "log.gap",
            # Not the subject of the reader's own events, which a webhook does not get.
            subject=f"log/{reader}",
            tenant=tenant,
            source="orchestrator",
            data={
                "reader": reader,
                "after": after,
                "through": oldest - 1,
                "reason": "position_unknown" if after > head else "position_expired",
            },
        )

    async def read_page(self, after: int, limit: int, *, tenant: str | None, from_oldest: bool = True) -> list[Event]:
        """Return a page as :meth:`read` does. Raises as :func:`check_position` does."""
        # In one snapshot: an event that is deleted between the check and the read would be skipped silently.
        async with self._db.read() as snapshot:
            check_position(after, *await self.read_bounds(snapshot), from_oldest=from_oldest)
            return await self.read(after, limit, tenant=tenant, connection=snapshot)

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


def _bounds(oldest: Any, head: Any) -> tuple[int, int]:
    last = int(head or 0)
    return last + 1 if oldest is None else int(oldest), last


# One statement is one snapshot: the log has every event up to its end.
_SCAN = f"""
SELECT page.*, bounds.* FROM (
    SELECT (SELECT min(seq) FROM events) AS oldest, (SELECT max(numbered) FROM relay_state) AS head
) AS bounds LEFT JOIN LATERAL (
    SELECT {EVENT_COLUMNS} FROM events
    WHERE seq > $1 AND seq <= bounds.head AND ($3::text IS NULL OR tenant = $3) AND event_type = ANY($4::text[])
    ORDER BY seq LIMIT $2
) AS page ON true ORDER BY page.seq
"""  # noqa: S608  its parts are constants


async def _lock_subject(tx: Transaction, tenant: str, subject: str) -> None:
    # A row must exist to be locked; version 0 stands for a subject without events.
    await tx.execute(tx.insert(subjects).values(tenant=tenant, subject=subject, version=0).on_conflict_do_nothing())
    where = (subjects.c.tenant == tenant, subjects.c.subject == subject)
    await tx.execute(select(subjects.c.version).where(*where).with_for_update())
