"""The rows of the event log: how events are written, and how they are read back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, cast

import msgspec

from octollm.contracts.events import Event, channel_of
from octollm.storage import Rows, Transaction
from octollm.storage.tables import events, subjects

EVENT_COLUMNS = (
    "event_type, timestamp, source, data, id, tenant, subject, events.seq, events.prev, version, correlation_id,"
    " traceparent"
)
"""The columns of an event with a position, in the order of its members."""


def insert_columns(new: Sequence[Event], encoded: Sequence[str]) -> tuple[list[str], ...]:
    """Return the parameters of :data:`INSERT_EVENTS`: an array for each column."""
    rows = [
        (
            event.id,
            event.event_type,
            channel_of(event.event_type),
            event.tenant,
            event.subject,
            event.timestamp,
            event.source,
            data,
            event.correlation_id,
            event.traceparent,
        )
        for event, data in zip(new, encoded, strict=True)
    ]
    return tuple(list(column) for column in zip(*rows, strict=True))


# The rows of `locked` come before the first event: an event's `row_id` is given after its subject was locked. So the
# order of `row_id` is that of the versions. Subjects are locked in ascending order.
INSERT_EVENTS = """
WITH drafts AS (
    SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[],
        $8::text[], $9::text[], $10::text[]) WITH ORDINALITY AS draft (id, event_type, channel, tenant, subject,
        timestamp, source, data, correlation_id, traceparent, place)
), locked AS (
    INSERT INTO subjects (tenant, subject, version)
    SELECT tenant, subject, count(*) FROM drafts GROUP BY tenant, subject ORDER BY tenant, subject
    ON CONFLICT (tenant, subject) DO UPDATE SET version = subjects.version + excluded.version
    RETURNING tenant, subject, version
)
INSERT INTO events (id, event_type, channel, tenant, subject, timestamp, source, data, correlation_id, traceparent,
    version)
SELECT id, event_type, channel, tenant, subject, timestamp, source, data::jsonb, correlation_id, traceparent,
    locked.version - count(*) OVER (PARTITION BY tenant, subject)
        + row_number() OVER (PARTITION BY tenant, subject ORDER BY place)
FROM drafts JOIN locked USING (tenant, subject) ORDER BY place
RETURNING id, version
"""


NEW_EVENT_COLUMNS = (
    *("id", "event_type", "channel", "tenant", "subject", "timestamp", "source", "data", "correlation_id"),
    *("traceparent", "version"),
)
NEXT_VERSION = """
INSERT INTO subjects (tenant, subject, version) VALUES ($1, $2, 1)
ON CONFLICT (tenant, subject) DO UPDATE SET version = subjects.version + 1 RETURNING version
"""


async def insert_on_sqlite(tx: Transaction, new: Sequence[Event]) -> dict[str, int]:
    """Write events, in two statements whatever their number; return their versions by id."""
    counts = Counter((event.tenant, event.subject) for event in new)
    insert = tx.insert(subjects)
    # Inserts or increments and locks, where a read followed by a write would need a lock of its own.
    insert = insert.on_conflict_do_update(
        index_elements=[subjects.c.tenant, subjects.c.subject],
        set_={"version": subjects.c.version + insert.excluded.version},
    )
    found = await tx.execute(
        insert.returning(subjects.c.tenant, subjects.c.subject, subjects.c.version),
        [{"tenant": tenant, "subject": subject, "version": count} for (tenant, subject), count in counts.items()],
    )
    last: dict[tuple[str, str], int] = {}
    for row in found.mappings():
        subject = (str(row["tenant"]), str(row["subject"]))
        last[subject] = int(row["version"]) - counts[subject]
    rows: list[dict[str, Any]] = []
    for event in new:
        last[event.tenant, event.subject] += 1
        given = {"version": last[event.tenant, event.subject], "seq": None, "prev": None}
        rows.append(msgspec.structs.asdict(event) | given | {"channel": channel_of(event.event_type)})
    await tx.execute(tx.insert(events), rows)
    return {row["id"]: row["version"] for row in rows}


def events_from_rows(rows: Rows) -> list[Event]:
    """Return the events of rows that begin with :data:`EVENT_COLUMNS`, without those of an outer join that are NULL."""
    found: list[Event] = []
    for row in cast("Sequence[Sequence[Any]]", rows):
        # By place, which takes half the time of names.
        event_type, timestamp, source, data, *others = row[:12]
        if event_type is not None:
            # A statement of SQLAlchemy decodes JSON, one at the driver returns it as text.
            found.append(
                Event(
                    event_type, timestamp, source, msgspec.json.decode(data) if isinstance(data, str) else data, *others
                )
            )
    return found


def event_from_row(row: Mapping[Any, Any]) -> Event:
    """Return the event of a row of the log."""
    data = row["data"]
    return Event(
        event_type=row["event_type"],
        timestamp=row["timestamp"],
        source=row["source"],
        # A statement of the direct pool returns JSON as text.
        data=msgspec.json.decode(data) if isinstance(data, str) else data,
        id=row["id"],
        tenant=row["tenant"],
        subject=row["subject"],
        seq=row["seq"] or 0,
        prev=row["prev"] or 0,
        version=row["version"],
        correlation_id=row["correlation_id"],
        traceparent=row["traceparent"],
    )
