"""The sequencer's state in SQL: its lease, its fencing token, the sequence numbers and the publish cursor.

Each method is one transaction that checks the fencing token, so a former holder changes nothing after a take-over.

Numbers are assigned after the commit, by one transaction at a time, and in one statement with the count of those
assigned. So a reader that sees the count N sees all events up to N, and an event that is committed later gets a higher
number, whatever transactions run meanwhile. An event's cause precedes it: a transaction that saw another's commit
inserted its events later, and every snapshot that has its events has the other's too.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import exists, select, text, update
from sqlalchemy.engine import RowMapping

from octollm.contracts.events import Event, channel_of
from octollm.errors import OctoError
from octollm.events.rows import EVENT_COLUMNS, events_from_rows
from octollm.storage import Database, DatabaseConnection, Rows, Transaction, is_lease_over
from octollm.storage.errors import translate_errors
from octollm.storage.tables import channels, events, relay_state

_STATE_ROW = "events"
# `prev` of each event is the number before it on its channel, by which subscribers detect gaps.
_LINKED = """linked AS (
    SELECT placed.row_id, placed.channel, placed.seq,
        coalesce(lag(placed.seq) OVER (PARTITION BY placed.channel ORDER BY placed.seq), channels.seq, 0) AS prev
    FROM placed LEFT JOIN channels ON channels.channel = placed.channel
)"""
_UPDATE = f"""UPDATE events SET seq = linked.seq, prev = linked.prev FROM linked WHERE events.row_id = linked.row_id
    RETURNING {EVENT_COLUMNS}"""  # noqa: S608
# In a transaction that has locked the state row.
_ASSIGN_BY_STATEMENT = text(
    f"""
WITH placed AS (
    SELECT row_id, channel, CAST(:numbered AS BIGINT) + row_number() OVER (ORDER BY row_id) AS seq
    FROM (SELECT row_id, channel FROM events WHERE seq IS NULL ORDER BY row_id LIMIT CAST(:size AS BIGINT)) AS batch
), {_LINKED} {_UPDATE}
"""  # noqa: S608  its parts are constants
)
# In one round trip. The state row is compared with the number that the caller expects (`$2`): when another statement
# assigned numbers since this one's snapshot, PostgreSQL finds the changed row, nothing matches and nothing is written.
_ASSIGN_TEMPLATE = f"""
WITH state AS (
    SELECT numbered FROM relay_state WHERE name = 'events' AND fence = $1 AND numbered = $2 FOR UPDATE {{wait}}
), batch AS (
    SELECT row_id, channel FROM events WHERE seq IS NULL ORDER BY row_id LIMIT $3
), placed AS (
    SELECT row_id, channel, $2 + row_number() OVER (ORDER BY row_id) AS seq FROM batch, state
), {_LINKED}, assigned AS (
    {_UPDATE}
), latest AS (
    INSERT INTO channels (channel, seq) SELECT channel, max(seq) FROM linked GROUP BY channel ORDER BY channel
    ON CONFLICT (channel) DO UPDATE SET seq = excluded.seq
), renewed AS (
    UPDATE relay_state SET numbered = $2 + (SELECT count(*) FROM linked),
        lease_until = extract(epoch FROM clock_timestamp())::float8 + $4::float8
    FROM state WHERE name = 'events'
    RETURNING relay_state.numbered
)
SELECT assigned.*, renewed.numbered FROM renewed LEFT JOIN assigned ON true ORDER BY seq
"""  # noqa: S608  its parts are constants
_ASSIGN = _ASSIGN_TEMPLATE.format(wait="")
# In a transaction that holds other locks: it never waits for this one.
_ASSIGN_UNLESS_LOCKED = _ASSIGN_TEMPLATE.format(wait="SKIP LOCKED")
_SAVEPOINT = "SAVEPOINT numbering"
# As on the connections for lookups by key, since the statement is planned while the log is small. A process that is
# suspended before its commit must not keep the others from numbering for longer than its lease.
_PREPARE = """
SET LOCAL enable_seqscan = off; SET LOCAL enable_hashjoin = off; SET LOCAL enable_mergejoin = off;
SET LOCAL idle_in_transaction_session_timeout = '{seconds:g}s'
"""
_MARK = """
UPDATE relay_state SET published = greatest(published, $2) WHERE name = 'events' AND fence = $1 RETURNING fence
"""


@dataclass(frozen=True, slots=True)
class SequencerLease:
    """A lease on the log: its fencing token, the last assigned sequence number and the last published one."""

    fence: int
    last_sequenced: int
    last_published: int


class Sequencer:
    """Acquires the lease, assigns sequence numbers and stores the publish cursor."""

    def __init__(self, db: Database, *, holder: str, lease_seconds: float) -> None:
        self._db = db
        self._holder = holder
        self._lease_seconds = lease_seconds
        self._expected: tuple[int, int] | None = None  # a fence, and the last number assigned under it

    async def acquire(self) -> SequencerLease | None:
        """Acquire the lease; return ``None`` while another replica holds it."""
        # A plain read first: standby replicas poll often and must not lock the row.
        async with self._db.read() as connection:
            state = await _load_state(connection)
            if state is not None and self._is_held(state, await connection.now()):
                return None
        async with self._db.transaction() as tx:
            await tx.execute(tx.insert(relay_state).values(name=_STATE_ROW, lease_until=0.0).on_conflict_do_nothing())
            state = await _load_state(tx)
            assert state is not None
            now = await tx.now()
            # Checked again under the row lock: another replica may have acquired the lease since the read.
            if self._is_held(state, now):
                return None
            # Each new holder gets a higher fence. A former holder that was only slow (a long pause, a partition) fails
            # the check in `_check_fence` and can assign no number that its successor assigns too.
            fence = int(state["fence"]) + 1
            await tx.execute(
                update(relay_state)
                .where(relay_state.c.name == _STATE_ROW)
                .values(holder=self._holder, fence=fence, lease_until=now + self._lease_seconds)
            )
            return SequencerLease(fence, int(state["numbered"]), int(state["published"]))

    async def has_backlog(self) -> bool:
        """Return whether events wait for a sequence number."""
        async with self._db.read() as connection:
            return bool(await connection.scalar(select(exists().where(events.c.seq.is_(None)))))

    async def assign(self, fence: int, limit: int) -> tuple[list[Event], int]:
        """Assign sequence numbers to up to ``limit`` events in insertion order, and renew the lease.

        Returns those events and the last number assigned so far. Raises ``fence_lost`` when another replica holds the
        lease.
        """
        if self._db.direct_pool is not None and self._expected is not None and self._expected[0] == fence:
            fetched = await self._db.direct_pool.fetch(
                _ASSIGN, fence, self._expected[1], limit, float(self._lease_seconds)
            )
            # No row at all: the fence or the expected number is not current. The transaction below finds out which.
            if fetched:
                batch, last = _parse_assigned(fetched)
                self._expected = (fence, last)
                return batch, last
        async with self._db.transaction() as tx:
            batch, last = await self._assign_by_statements(tx, fence, limit)
        self._expected = (fence, last)
        return batch, last

    async def assign_in(self, tx: Transaction, fence: int, limit: int) -> tuple[list[Event], int] | None:
        """Do what :meth:`assign` does as the last part of a transaction that wrote events, which :meth:`confirm` ends.

        Its events then have their numbers as soon as they are committed. Returns ``None``, with nothing changed, when
        it would have to wait for another transaction or does not know the last number.
        """
        if self._expected is None or self._expected[0] != fence:
            return None
        # What the transaction wrote must not fail with this: the events can get their numbers later.
        is_postgres = tx.dialect == "postgresql"
        await tx.run_script(
            f"{_SAVEPOINT}; {_PREPARE.format(seconds=self._lease_seconds)}" if is_postgres else _SAVEPOINT
        )
        try:
            if not is_postgres:
                with translate_errors():
                    return await self._assign_by_statements(tx, fence, limit)
            rows = await tx.fetch(_ASSIGN_UNLESS_LOCKED, fence, self._expected[1], limit, float(self._lease_seconds))
            return _parse_assigned(rows) if rows else None
        except OctoError:
            await tx.run_script(f"ROLLBACK TO {_SAVEPOINT}")
            return None

    def confirm(self, fence: int, last: int | None) -> None:
        """Record the last number that :meth:`assign_in` assigned, or that it is not known whether it did."""
        if self._expected is not None and self._expected[0] == fence:
            self._expected = (fence, last) if last is not None else None

    async def _assign_by_statements(self, tx: Transaction, fence: int, limit: int) -> tuple[list[Event], int]:
        # The fence check locks the state row until the commit, so numbers are assigned by one transaction at a time
        # and have no gaps, even if two replicas believe that they hold the lease.
        last = await self._check_fence(tx, fence)
        result = await tx.execute(_ASSIGN_BY_STATEMENT.bindparams(numbered=last, size=limit))
        batch = sorted(events_from_rows(result.all()), key=lambda event: event.seq)
        if batch:
            last = batch[-1].seq
            latest = {channel_of(event.event_type): event.seq for event in batch}
            insert = tx.insert(channels)
            await tx.execute(
                insert.on_conflict_do_update(index_elements=[channels.c.channel], set_={"seq": insert.excluded.seq}),
                [{"channel": channel, "seq": seq} for channel, seq in sorted(latest.items())],
            )
        await tx.execute(
            update(relay_state)
            .where(relay_state.c.name == _STATE_ROW)
            .values(numbered=last, lease_until=await tx.now() + self._lease_seconds)
        )
        return batch, last

    async def mark_published(self, fence: int, seq: int) -> None:
        """Save the publish cursor ``seq``; it never moves back. Raises ``fence_lost`` when another holds the lease."""
        if self._db.direct_pool is not None:
            if not await self._db.direct_pool.fetch(_MARK, fence, seq):
                raise _fence_lost()
            return
        async with self._db.transaction() as tx:
            await self._check_fence(tx, fence)
            await tx.execute(
                update(relay_state)
                .where(relay_state.c.name == _STATE_ROW, relay_state.c.published < seq)
                .values(published=seq)
            )

    async def release(self, fence: int, published: int) -> None:
        """Save the publish cursor and end the lease at once, if it is still held under ``fence``."""
        async with self._db.transaction() as tx:
            await tx.execute(
                update(relay_state)
                .where(relay_state.c.name == _STATE_ROW, relay_state.c.fence == fence)
                .values(lease_until=0.0, published=published)
            )

    def _is_held(self, state: RowMapping, now: float) -> bool:
        return not is_lease_over(float(state["lease_until"]), now, self._lease_seconds)

    async def _check_fence(self, tx: Transaction, fence: int) -> int:
        """Return the last assigned number; raise ``fence_lost`` for a stale fencing token."""
        state = await _load_state(tx)
        if state is None or state["fence"] != fence:
            raise _fence_lost()
        return int(state["numbered"])


def _fence_lost() -> OctoError:
    return OctoError("Another replica holds the sequencer's lease.", code="fence_lost")


def _parse_assigned(rows: Rows) -> tuple[list[Event], int]:
    # Without events there is one row, with the count alone.
    return events_from_rows(rows), int(str(rows[0][12]))


async def _load_state(connection: DatabaseConnection) -> RowMapping | None:
    query = select(relay_state).where(relay_state.c.name == _STATE_ROW)
    # A transaction checks the fence on this row and holds it until the commit; a plain read need not wait for that.
    if isinstance(connection, Transaction):
        query = query.with_for_update()
    return await connection.first(query)
