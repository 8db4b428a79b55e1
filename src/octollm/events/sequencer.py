"""The sequencer's state in SQL: its lease and fencing token, the sequence numbers it assigned, and the publish cursor. Each method is one transaction that checks the fence."""

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
"""Events without a number: none, or only ones that a running transaction holds up, or some that can get one."""


@dataclass(frozen=True, slots=True)
class SequencerLease:
    """A claim on the relay: its ``fence``, the last number given and the last one that Redis took."""

    fence: int
    last_sequenced: int
    last_published: int


class Sequencer:
    """The statements of the relay."""

    def __init__(self, db: Database, *, holder: str, lease_seconds: float) -> None:
        self._db = db
        self._holder = holder
        self._lease_seconds = lease_seconds

    async def acquire(self) -> SequencerLease | None:
        """Take the relay if nobody holds it; ``None`` while another one does."""
        async with self._db.read() as connection:
            state = await _load_state(connection)
            if state is not None and _is_held(state, await connection.now()):
                return None
        async with self._db.transaction() as tx:
            await tx.execute(tx.insert(relay_state).values(name=_STATE_ROW, lease_until=0.0).on_conflict_do_nothing())
            state = await _load_state(tx)
            assert state is not None
            now = await tx.now()
            if _is_held(state, now):
                return None
            fence = int(state["fence"]) + 1
            await tx.execute(
                update(relay_state)
                .where(relay_state.c.name == _STATE_ROW)
                .values(holder=self._holder, fence=fence, lease_until=now + self._lease_seconds)
            )
            return SequencerLease(fence, int(state["numbered"]), int(state["published"]))

    async def backlog(self) -> Backlog:
        """Return whether the log has events without a number, and whether they can get one by now."""
        async with self._db.read() as connection:
            waiting = exists().where(events.c.seq.is_(None))
            if connection.dialect == "sqlite":
                return "ready" if await connection.scalar(select(waiting)) else "none"
            row = await connection.first(
                select(waiting.label("waiting"), waiting.where(_before_commit_horizon(connection)).label("ready"))
            )
        assert row is not None
        return "ready" if row["ready"] else "held" if row["waiting"] else "none"

    async def assign(self, fence: int, limit: int) -> tuple[list[Event], int]:
        """Give numbers to up to ``limit`` events in the order of insertion and renew the lease.

        On PostgreSQL transactions overlap: an event inserted earlier may be committed later. Numbered are those whose
        transaction is older than any that still runs, so that no number is given before that of an earlier event.
        Returns those events, and the last number given so far. Raises ``fence_lost`` when another holds the relay.
        """
        async with self._db.transaction() as tx:
            last = await self._check_fence(tx, fence)
            query = (
                select(events)
                .where(events.c.seq.is_(None), _before_commit_horizon(tx))
                .order_by(events.c.row_id)
                .limit(limit)
            )
            rows = await tx.all(query)
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
        """Note that Redis took every event up to ``seq``. Raises ``fence_lost`` when another holds the relay."""
        async with self._db.transaction() as tx:
            await self._check_fence(tx, fence)
            await tx.execute(
                update(relay_state)
                .where(relay_state.c.name == _STATE_ROW, relay_state.c.published < seq)
                .values(published=seq)
            )

    async def release(self, fence: int, published: int) -> None:
        """Note how far Redis is, and let the next one take the relay at once, if it is still held under ``fence``."""
        async with self._db.transaction() as tx:
            await tx.execute(
                update(relay_state)
                .where(relay_state.c.name == _STATE_ROW, relay_state.c.fence == fence)
                .values(lease_until=0.0, published=published)
            )

    async def _check_fence(self, tx: Transaction, fence: int) -> int:
        """Return the last number given, after making sure of the fence."""
        state = await _load_state(tx)
        if state is None or state["fence"] != fence:
            raise OctoError("Another relay holds the log.", code="fence_lost")
        return int(state["numbered"])


def _before_commit_horizon(connection: DatabaseConnection) -> ColumnElement[bool]:
    """Say of an event whether every event inserted before it is committed, or never will be.

    https://www.postgresql.org/docs/current/functions-info.html#FUNCTIONS-INFO-SNAPSHOT
    """
    if connection.dialect == "sqlite":
        return true()
    snapshot = func.pg_current_snapshot()
    oldest_running = cast(cast(func.pg_snapshot_xmin(snapshot), Text()), BigInteger())
    next_one = cast(cast(func.pg_snapshot_xmax(snapshot), Text()), BigInteger())
    number = events.c.transaction_id
    # One that is yet to come was given by another server, from whose backup this database was restored.
    return or_(number.is_(None), number < oldest_running, number >= next_one)


def _is_held(state: RowMapping, now: float) -> bool:
    return float(state["lease_until"]) > now


async def _load_state(connection: DatabaseConnection) -> RowMapping | None:
    query = select(relay_state).where(relay_state.c.name == _STATE_ROW)
    if isinstance(connection, Transaction):
        query = query.with_for_update()
    return await connection.first(query)


async def _load_latest(connection: DatabaseConnection, names: set[str]) -> dict[str, int]:
    rows = await connection.all(select(channels).where(channels.c.channel.in_(names)))
    return {str(row["channel"]): int(row["seq"]) for row in rows}
