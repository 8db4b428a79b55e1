"""The sequencer's state in SQL: its lease, its fencing token, the sequence numbers and the publish cursor.

Each method is one transaction that checks the fencing token, so a former holder changes nothing after a take-over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec
from sqlalchemy import BigInteger, ColumnElement, Text, bindparam, cast, exists, func, or_, select, true, update
from sqlalchemy.engine import RowMapping

from octollm.contracts.events import Event
from octollm.errors import OctoError
from octollm.events.log import event_from_row
from octollm.storage import Database, DatabaseConnection, Transaction
from octollm.storage.tables import channels, events, relay_state

_STATE_ROW = "events"
Backlog = Literal["none", "held", "ready"]
"""Events without a sequence number: none; only such as a running transaction blocks; or some ready for one."""


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

    async def acquire(self) -> SequencerLease | None:
        """Acquire the lease; return ``None`` while another replica holds it."""
        # A plain read first: standby replicas poll often and must not lock the row.
        async with self._db.read() as connection:
            state = await _load_state(connection)
            if state is not None and _is_held(state, await connection.now()):
                return None
        async with self._db.transaction() as tx:
            await tx.execute(tx.insert(relay_state).values(name=_STATE_ROW, lease_until=0.0).on_conflict_do_nothing())
            state = await _load_state(tx)
            assert state is not None
            now = await tx.now()
            # Checked again under the row lock: another replica may have acquired the lease since the read.
            if _is_held(state, now):
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

    async def backlog(self) -> Backlog:
        """Return whether events wait for a sequence number, and whether some are ready for it."""
        async with self._db.read() as connection:
            unsequenced = exists().where(events.c.seq.is_(None))
            # SQLite has one writer at a time, so no event waits for an older transaction.
            if connection.dialect == "sqlite":
                return "ready" if await connection.scalar(select(unsequenced)) else "none"
            row = await connection.first(
                select(
                    unsequenced.label("unsequenced"),
                    unsequenced.where(_before_commit_horizon(connection)).label("ready"),
                )
            )
        assert row is not None
        return "ready" if row["ready"] else "held" if row["unsequenced"] else "none"

    async def assign(self, fence: int, limit: int) -> tuple[list[Event], int]:
        """Assign sequence numbers to up to ``limit`` events in insertion order, and renew the lease.

        Returns those events and the last number assigned so far. Raises ``fence_lost`` when another replica holds the
        lease.

        PostgreSQL transactions overlap, so an event inserted earlier may be committed later. Only events whose
        transaction is older than every running one get a number; no event can then appear behind a published one.
        """
        async with self._db.transaction() as tx:
            # The fence check locks the state row until the commit, so numbers are assigned by one transaction at a time
            # and have no gaps, even if two replicas believe that they hold the lease.
            last = await self._check_fence(tx, fence)
            query = (
                select(events)
                .where(events.c.seq.is_(None), _before_commit_horizon(tx))
                .order_by(events.c.row_id)
                .limit(limit)
            )
            rows = await tx.all(query)
            # `prev` of each event is the number before it on its channel, by which subscribers detect gaps.
            latest = await _load_latest(tx, {str(row["channel"]) for row in rows}) if rows else {}
            numbers: list[dict[str, int]] = []
            for row in rows:
                last += 1
                channel = str(row["channel"])
                numbers.append({"row": row["row_id"], "next_seq": last, "next_prev": latest.get(channel, 0)})
                latest[channel] = last
            if numbers:
                await tx.execute(
                    update(events)
                    .where(events.c.row_id == bindparam("row"))
                    .values(seq=bindparam("next_seq"), prev=bindparam("next_prev")),
                    numbers,
                )
                insert = tx.insert(channels)
                await tx.execute(
                    insert.on_conflict_do_update(
                        index_elements=[channels.c.channel], set_={"seq": insert.excluded.seq}
                    ),
                    [{"channel": channel, "seq": seq} for channel, seq in latest.items()],
                )
            await tx.execute(
                update(relay_state)
                .where(relay_state.c.name == _STATE_ROW)
                .values(numbered=last, lease_until=await tx.now() + self._lease_seconds)
            )
        return [
            msgspec.structs.replace(event_from_row(row), seq=number["next_seq"], prev=number["next_prev"])
            for row, number in zip(rows, numbers, strict=True)
        ], last

    async def mark_published(self, fence: int, seq: int) -> None:
        """Save the publish cursor ``seq``; it never moves back. Raises ``fence_lost`` when another holds the lease."""
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

    async def _check_fence(self, tx: Transaction, fence: int) -> int:
        """Return the last assigned number; raise ``fence_lost`` for a stale fencing token."""
        state = await _load_state(tx)
        if state is None or state["fence"] != fence:
            raise OctoError("Another replica holds the sequencer's lease.", code="fence_lost")
        return int(state["numbered"])


def _before_commit_horizon(connection: DatabaseConnection) -> ColumnElement[bool]:
    """Return the condition that every event inserted before this one is committed or was rolled back.

    https://www.postgresql.org/docs/current/functions-info.html#FUNCTIONS-INFO-SNAPSHOT
    """
    if connection.dialect == "sqlite":
        return true()
    snapshot = func.pg_current_snapshot()
    oldest_running = cast(cast(func.pg_snapshot_xmin(snapshot), Text()), BigInteger())
    next_id = cast(cast(func.pg_snapshot_xmax(snapshot), Text()), BigInteger())
    transaction_id = events.c.transaction_id
    # An id from the future was assigned by the server whose dump was restored here: a new server counts from the
    # beginning, and without this condition such events would wait for years.
    return or_(transaction_id.is_(None), transaction_id < oldest_running, transaction_id >= next_id)


def _is_held(state: RowMapping, now: float) -> bool:
    return float(state["lease_until"]) > now


async def _load_state(connection: DatabaseConnection) -> RowMapping | None:
    query = select(relay_state).where(relay_state.c.name == _STATE_ROW)
    # A transaction checks the fence on this row and holds it until the commit; a plain read need not wait for that.
    if isinstance(connection, Transaction):
        query = query.with_for_update()
    return await connection.first(query)


async def _load_latest(connection: DatabaseConnection, names: set[str]) -> dict[str, int]:
    rows = await connection.all(select(channels).where(channels.c.channel.in_(names)))
    return {str(row["channel"]): int(row["seq"]) for row in rows}
