"""The dead-letter store of durable subscriptions in SQL: failed deliveries, their retries, and the subjects that wait.

Each write is one transaction that checks the lease of the partition by its fencing token.

A partition has one cursor, its position. An event that failed must not stop the other subjects of its partition, so
its subject is delayed: a row of ``delayed_subjects`` takes over the subject's events, the cursor passes them, and they
are read from the log by subject once the retry is due. The row ends at a position of the log up to which it has
handled everything; later events of the subject are the cursor's again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
from sqlalchemy import delete, exists, func, select, update
from sqlalchemy.engine import RowMapping

from octollm.contracts.events import Event
from octollm.contracts.subscriptions import AckId, EventSelector, SubscriptionSpec
from octollm.events.leases import check_lease
from octollm.events.rows import event_from_row
from octollm.resilience import Backoff
from octollm.storage import Database, DatabaseConnection, Transaction
from octollm.storage.tables import (
    dead_letters,
    delayed_subjects,
    events,
    relay_state,
    subscription_partitions,
)

MAX_DELAYED_SUBJECTS = 1000
"""Delayed subjects of one subscription, give or take those that fail at the same moment. Past it a failed event stops
its partition instead of its subject alone."""
MAX_DEAD_LETTERS = 10_000
"""Dead letters of one subscription. Past it a poison event holds its subject, so that nothing is dropped."""
MAX_REASON = 500
_SUBJECT_PAGE = 50


@dataclass(frozen=True, slots=True)
class DelayedSubject:
    """A subject whose events are not the cursor's: ``handled`` is the position of its last event that is handled.

    ``through`` is ``None`` while it waits for a retry, ``due_in`` seconds from now, or is ``held``. Afterwards it is
    the position from which on the subject's events are the cursor's again.
    """

    tenant: str
    subject: str
    partition: int
    handled: int
    through: int | None
    attempts: int
    due_in: float
    held: bool


@dataclass(frozen=True, slots=True)
class FailureOutcome:
    """What became of a failed event: its subject is ``delayed``, it is a ``dead`` letter or its subject is ``held``.

    ``state`` is that of its subject, if the subject's events are not the cursor's. ``blocked``: nothing was written,
    because too many subjects are delayed; its partition waits for ``seconds``. ``known``: it was recorded before.
    """

    kind: Literal["delayed", "dead", "held", "blocked", "known"]
    state: DelayedSubject | None = None
    seconds: float = 0.0


class DeliveryStore:
    """The consumer's side of durable subscriptions."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def load_delayed(self, subscription_id: str, held: Iterable[int]) -> list[DelayedSubject]:
        """Return the delayed subjects of partitions."""
        async with self._db.read() as connection:
            return await self.load_delayed_in(connection, subscription_id, held)

    async def load_delayed_in(
        self, connection: DatabaseConnection, subscription_id: str, held: Iterable[int]
    ) -> list[DelayedSubject]:
        """Do what :meth:`load_delayed` does, in the caller's transaction."""
        rows = await connection.all(
            select(delayed_subjects).where(
                delayed_subjects.c.subscription_id == subscription_id, delayed_subjects.c.partition.in_(list(held))
            )
        )
        now = await connection.now() if rows else 0.0
        return [_delayed_from_row(row, now) for row in rows]

    async def read_subject(self, delayed: DelayedSubject, selector: EventSelector) -> Event | None:
        """Return the next event of a delayed subject, or ``None`` when there is none at present."""
        async with self._db.read() as connection:
            return await self.next_of_subject_in(connection, delayed, selector)

    async def next_of_subject_in(
        self,
        connection: DatabaseConnection,
        delayed: DelayedSubject,
        selector: EventSelector,
        through: int | None = None,
    ) -> Event | None:
        """Do what :meth:`read_subject` does, up to the position ``through``, in the caller's transaction."""
        return await _next_of_subject(
            connection, delayed.tenant, delayed.subject, delayed.handled, selector, through=through
        )

    async def due_letters(self, subscription_id: str, held: Iterable[int], limit: int) -> list[tuple[int, Event, int]]:
        """Return dead letters of partitions that somebody wants to be retried: id, event and attempts so far."""
        async with self._db.read() as connection:
            return await self.due_letters_in(connection, subscription_id, held, limit)

    async def due_letters_in(
        self, connection: DatabaseConnection, subscription_id: str, held: Iterable[int], limit: int
    ) -> list[tuple[int, Event, int]]:
        """Do what :meth:`due_letters` does, in the caller's transaction."""
        rows = await connection.all(
            select(dead_letters)
            .where(
                dead_letters.c.subscription_id == subscription_id,
                dead_letters.c.state == "retrying",
                dead_letters.c.partition.in_(list(held)),
            )
            .order_by(dead_letters.c.id)
            .limit(limit)
        )
        return [(int(row["id"]), msgspec.convert(row["event"], Event), int(row["attempts"])) for row in rows]

    async def resolve(
        self, subscription_id: str, consumer: str, ack: AckId, subject: tuple[str, str], selector: EventSelector
    ) -> DelayedSubject | None:
        """Record that a delivery of a delayed subject or of a dead letter was handled; return the subject's new state.

        ``subject`` is the tenant and the subject of the event. Raises ``lease_lost``.
        """
        async with self._db.transaction() as tx:
            await check_lease(tx, subscription_id, consumer, ack)
            return await self.resolve_in(tx, subscription_id, ack, subject, selector)

    async def resolve_in(
        self, tx: Transaction, subscription_id: str, ack: AckId, subject: tuple[str, str], selector: EventSelector
    ) -> DelayedSubject | None:
        """Do what :meth:`resolve` does, in a transaction that has checked the lease."""
        if ack.kind == "letter":
            deleted = await tx.execute(_delete_letter(subscription_id, ack.after))
            if not deleted.rowcount or not await _is_held_at(tx, subscription_id, *subject, ack.seq):
                return None
        return await self._advance_subject(tx, subscription_id, ack, *subject, selector)

    async def fail(
        self,
        subscription_id: str,
        consumer: str,
        ack: AckId,
        event: Event,
        *,
        spec: SubscriptionSpec,
        selector: EventSelector,
        reason: str,
        retry_after: float | None = None,
        final: bool = False,
        deaths: int = 0,
    ) -> FailureOutcome:
        """Record that a delivery failed, and decide what becomes of its event. Raises ``lease_lost``.

        ``deaths`` counts the attempts at which the consumer ended and nothing was recorded.
        """
        async with self._db.transaction() as tx:
            await check_lease(tx, subscription_id, consumer, ack)
            return await self.fail_in(
                tx,
                subscription_id,
                ack,
                event,
                spec=spec,
                selector=selector,
                reason=reason,
                retry_after=retry_after,
                final=final,
                deaths=deaths,
            )

    async def fail_in(
        self,
        tx: Transaction,
        subscription_id: str,
        ack: AckId,
        event: Event,
        *,
        spec: SubscriptionSpec,
        selector: EventSelector,
        reason: str,
        retry_after: float | None,
        final: bool,
        deaths: int = 0,
    ) -> FailureOutcome:
        """Do what :meth:`fail` does, in a transaction that has checked the lease."""
        now = await tx.now()
        reason = reason[:MAX_REASON]
        if ack.kind == "letter":
            held = await _is_held_at(tx, subscription_id, event.tenant, event.subject, event.seq)
            state = "held" if held else "dead"
            await tx.execute(
                update(dead_letters)
                .where(dead_letters.c.id == ack.after, dead_letters.c.state == "retrying")
                .values(state=state, attempts=dead_letters.c.attempts + (deaths or 1), reason=reason)
            )
            return FailureOutcome(state)
        attempts = deaths or 1
        if ack.kind == "subject":
            row = await _lock_subject(tx, subscription_id, event.tenant, event.subject)
            # A repeated report of a failure that is recorded already changes nothing.
            if row is None or row["handled"] >= event.seq or row["through"] is not None:
                return FailureOutcome("known", None if row is None else _delayed_from_row(row, now))
            attempts += int(row["attempts"])
        values: dict[str, Any] = {"handled": event.seq - 1, "through": None, "attempts": attempts, "reason": reason}
        if final or attempts >= spec.max_attempts:
            letters = await _count(tx, dead_letters.c.subscription_id, subscription_id)
            hold = spec.on_poison == "hold" or letters >= MAX_DEAD_LETTERS
            if letters < MAX_DEAD_LETTERS:
                await _write_letter(tx, subscription_id, ack, event, attempts, reason, "held" if hold else "dead", now)
            state = None
            if hold:
                state = await _write_subject(
                    tx, subscription_id, ack, event, values | {"held": True, "due_at": now}, now
                )
            elif ack.kind == "subject":
                state = await self._advance_subject(tx, subscription_id, ack, event.tenant, event.subject, selector)
            outcome = FailureOutcome("held" if hold else "dead", state)
        else:
            if ack.kind == "log" and await _count(tx, delayed_subjects.c.subscription_id, subscription_id) >= (
                MAX_DELAYED_SUBJECTS
            ):
                return FailureOutcome("blocked", seconds=spec.retry_first)
            pause = retry_after or Backoff(spec.retry_first, spec.retry_limit).pause(attempts)
            values |= {"held": False, "due_at": now + pause, "pause": pause}
            outcome = FailureOutcome("delayed", await _write_subject(tx, subscription_id, ack, event, values, now))
        if ack.kind == "log":
            await _set_position(tx, subscription_id, ack.partition, event.seq)
        return outcome

    async def _advance_subject(
        self,
        tx: Transaction,
        subscription_id: str,
        ack: AckId,
        tenant: str,
        subject: str,
        selector: EventSelector,
    ) -> DelayedSubject | None:
        """Mark a subject's event as handled. Without a next one the subject's later events are the cursor's again."""
        row = await _lock_subject(tx, subscription_id, tenant, subject)
        if row is None:
            return None
        if row["handled"] > ack.seq:
            return _delayed_from_row(row, await tx.now())
        # The end of the log is read first: whatever is appended afterwards is the cursor's.
        head = await read_head(tx)
        following = await _next_of_subject(tx, tenant, subject, ack.seq, selector, through=head)
        now = await tx.now()
        changed = await tx.first(
            update(delayed_subjects)
            .where(*_subject_key(subscription_id, tenant, subject))
            .values(handled=ack.seq, attempts=0, held=False, due_at=now, reason="", through=None if following else head)
            .returning(delayed_subjects)
        )
        assert changed is not None
        return _delayed_from_row(changed, now)

    async def forget_finished(self, subscription_id: str) -> None:
        """Delete the rows of subjects whose cursor has passed the position at which they ended."""
        where = (
            delayed_subjects.c.subscription_id == subscription_id,
            delayed_subjects.c.through.is_not(None),
            exists().where(
                subscription_partitions.c.subscription_id == delayed_subjects.c.subscription_id,
                subscription_partitions.c.partition == delayed_subjects.c.partition,
                subscription_partitions.c.position >= delayed_subjects.c.through,
            ),
        )
        async with self._db.transaction(single=True) as tx:
            await tx.execute(delete(delayed_subjects).where(*where))


async def read_head(connection: DatabaseConnection) -> int:
    """Return the position of the last event in the log."""
    return int(await connection.scalar(select(func.max(relay_state.c.numbered))) or 0)


def _subject_key(subscription_id: str, tenant: str, subject: str) -> tuple[Any, ...]:
    return (
        delayed_subjects.c.subscription_id == subscription_id,
        delayed_subjects.c.tenant == tenant,
        delayed_subjects.c.subject == subject,
    )


async def _lock_subject(tx: Transaction, subscription_id: str, tenant: str, subject: str) -> RowMapping | None:
    return await tx.first(
        select(delayed_subjects).where(*_subject_key(subscription_id, tenant, subject)).with_for_update()
    )


async def _is_held_at(tx: Transaction, subscription_id: str, tenant: str, subject: str, seq: int) -> bool:
    """Return whether a subject is held because of its event at ``seq``."""
    row = await _lock_subject(tx, subscription_id, tenant, subject)
    return row is not None and bool(row["held"]) and row["handled"] < seq


async def _write_subject(
    tx: Transaction, subscription_id: str, ack: AckId, event: Event, values: dict[str, Any], now: float
) -> DelayedSubject:
    insert = tx.insert(delayed_subjects).values(
        subscription_id=subscription_id,
        tenant=event.tenant,
        subject=event.subject,
        partition=ack.partition,
        **values,
    )
    row = await tx.first(
        insert.on_conflict_do_update(
            index_elements=[
                delayed_subjects.c.subscription_id,
                delayed_subjects.c.tenant,
                delayed_subjects.c.subject,
            ],
            set_=values,
        ).returning(delayed_subjects)
    )
    assert row is not None
    return _delayed_from_row(row, now)


async def _write_letter(
    tx: Transaction,
    subscription_id: str,
    ack: AckId,
    event: Event,
    attempts: int,
    reason: str,
    state: str,
    now: float,
) -> None:
    values: dict[str, Any] = {"state": state, "attempts": attempts, "reason": reason, "created_at": now, "due_at": now}
    insert = tx.insert(dead_letters).values(
        subscription_id=subscription_id,
        partition=ack.partition,
        seq=event.seq,
        event=msgspec.structs.asdict(event),
        **values,
    )
    # A replay may deliver an event again that is a dead letter already.
    await tx.execute(
        insert.on_conflict_do_update(index_elements=[dead_letters.c.subscription_id, dead_letters.c.seq], set_=values)
    )


def _delete_letter(subscription_id: str, letter_id: int) -> Any:
    return delete(dead_letters).where(
        dead_letters.c.subscription_id == subscription_id,
        dead_letters.c.id == letter_id,
        dead_letters.c.state == "retrying",
    )


async def _set_position(tx: Transaction, subscription_id: str, partition: int, position: int) -> None:
    await tx.execute(
        update(subscription_partitions)
        .where(
            subscription_partitions.c.subscription_id == subscription_id,
            subscription_partitions.c.partition == partition,
            subscription_partitions.c.position < position,
        )
        .values(position=position)
    )


async def _count(tx: Transaction, column: Any, subscription_id: str) -> int:
    return int(await tx.scalar(select(func.count()).where(column == subscription_id)))


async def _next_of_subject(
    connection: DatabaseConnection,
    tenant: str,
    subject: str,
    after: int,
    selector: EventSelector,
    *,
    through: int | None = None,
) -> Event | None:
    """Return the first selected event of a subject after a position."""
    while True:
        query = select(events).where(events.c.tenant == tenant, events.c.subject == subject, events.c.seq > after)
        if through is not None:
            query = query.where(events.c.seq <= through)
        rows = await connection.all(query.order_by(events.c.seq).limit(_SUBJECT_PAGE))
        for row in rows:
            event = event_from_row(row)
            if selector.matches(event):
                return event
        if len(rows) < _SUBJECT_PAGE:
            return None
        after = int(rows[-1]["seq"])


def _delayed_from_row(row: RowMapping, now: float) -> DelayedSubject:
    due_in = max(0.0, float(row["due_at"]) - now)
    if row["pause"] is not None:
        # The clock may have been set back since.
        due_in = min(due_in, float(row["pause"]))
    return DelayedSubject(
        tenant=row["tenant"],
        subject=row["subject"],
        partition=row["partition"],
        handled=row["handled"],
        through=row["through"],
        attempts=row["attempts"],
        due_in=due_in,
        held=bool(row["held"]),
    )
