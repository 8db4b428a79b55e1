"""Durable subscriptions in SQL: their definitions, their lag, replay, and dead letters for operators."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal

import msgspec
from sqlalchemy import Integer, cast, delete, func, insert, select, update
from sqlalchemy.engine import RowMapping

from octollm.clock import Clock, IdGenerator, format_rfc3339
from octollm.contracts.events import Event
from octollm.contracts.subscriptions import (
    PARTITIONS,
    ConsumerView,
    DeadLetter,
    EventSelector,
    Lag,
    SubscriptionSpec,
    SubscriptionView,
    decode_spec,
    partition_of,
)
from octollm.errors import FieldError, OctoError, map_exceptions
from octollm.events.deliveries import read_head
from octollm.storage import Database, DatabaseConnection, Transaction
from octollm.storage.tables import (
    dead_letters,
    delayed_subjects,
    events,
    subscription_consumers,
    subscription_partitions,
    subscriptions,
)

MAX_SUBSCRIPTIONS = 100
"""Subscriptions of one tenant."""
Start = Literal["latest", "earliest"] | int


class SubscriptionStore:
    """The owner's side of durable subscriptions. Names are those of one tenant; any other is not found."""

    def __init__(self, db: Database, clock: Clock, ids: IdGenerator) -> None:
        self._db = db
        self._clock = clock
        self._ids = ids

    async def put(
        self, tenant: str, name: str, spec: SubscriptionSpec, *, event_tenant: str | None, start: Start = "latest"
    ) -> str:
        """Create a subscription, or change its spec; return its id. ``start`` counts only for a new one.

        ``event_tenant=None`` selects the events of every tenant and is for built-in services only. Raises
        ``invalid_body`` for a pattern that matches nothing or a start outside the log, ``quota_exhausted`` when the
        tenant has too many.
        """
        EventSelector(spec)
        async with self._db.transaction() as tx:
            existing = await tx.first(_by_name(tenant, name).with_for_update())
            if existing is not None:
                if decode_spec(existing["spec"]) != spec or existing["event_tenant"] != event_tenant:
                    await self._change(tx, str(existing["id"]), spec, event_tenant)
                return str(existing["id"])
            count = int(await tx.scalar(select(func.count()).where(subscriptions.c.tenant == tenant)))
            if count >= MAX_SUBSCRIPTIONS:
                raise OctoError(f"There are {count} subscriptions, and no more are allowed.", code="quota_exhausted")
            position = await _start_position(tx, start)
            subscription_id = self._ids.hex()
            created = await tx.first(
                tx.insert(subscriptions)
                .values(
                    id=subscription_id,
                    tenant=tenant,
                    name=name,
                    event_tenant=event_tenant,
                    spec=msgspec.to_builtins(spec),
                    created_at=self._clock.now(),
                )
                # Two replicas of one service may subscribe for the first time at the same moment.
                .on_conflict_do_nothing()
                .returning(subscriptions.c.id)
            )
            if created is None:
                found = await tx.first(_by_name(tenant, name))
                assert found is not None
                return str(found["id"])
            await tx.execute(
                insert(subscription_partitions),
                [
                    {"subscription_id": subscription_id, "partition": number, "position": position, "fence": 0}
                    for number in range(PARTITIONS)
                ],
            )
            return subscription_id

    async def _change(
        self, tx: Transaction, subscription_id: str, spec: SubscriptionSpec, event_tenant: str | None
    ) -> None:
        # Deliveries in flight were selected by the old spec. An acknowledgement of one would pass over events before
        # it that only the new spec selects, so all leases end.
        await tx.execute(
            update(subscriptions)
            .where(subscriptions.c.id == subscription_id)
            .values(spec=msgspec.to_builtins(spec), event_tenant=event_tenant, revision=subscriptions.c.revision + 1)
        )
        await _end_leases(tx, subscription_id)

    async def find(self, tenant: str, name: str) -> RowMapping:
        """Return the row of a subscription. Raises ``subscription_not_found``."""
        async with self._db.read() as connection:
            return await _find(connection, tenant, name)

    async def delete(self, tenant: str, name: str) -> None:
        """Delete a subscription with its positions and dead letters."""
        async with self._db.transaction() as tx:
            row = await _find(tx, tenant, name)
            for table in (subscription_consumers, subscription_partitions, delayed_subjects, dead_letters):
                await tx.execute(delete(table).where(table.c.subscription_id == row["id"]))
            await tx.execute(delete(subscriptions).where(subscriptions.c.id == row["id"]))

    async def list_lags(self) -> list[tuple[str, str, Lag]]:
        """Return the tenant, the name and the lag of every subscription."""
        query = select(subscriptions.c.id, subscriptions.c.tenant, subscriptions.c.name)
        async with self._db.read() as connection:
            rows = await connection.all(query.order_by(subscriptions.c.tenant, subscriptions.c.name))
            lags = await _read_lags(connection, [str(row["id"]) for row in rows])
        return [(row["tenant"], row["name"], lags[row["id"]]) for row in rows]

    async def list_views(self, tenant: str, name: str | None = None) -> list[SubscriptionView]:
        """Return a tenant's subscriptions, or the one of a name, with their lag and consumers."""
        query = select(subscriptions).where(subscriptions.c.tenant == tenant).order_by(subscriptions.c.name)
        if name is not None:
            query = query.where(subscriptions.c.name == name)
        async with self._db.read() as connection:
            rows = await connection.all(query)
            if not rows and name is not None:
                raise _not_found()
            ids = [str(row["id"]) for row in rows]
            lags = await _read_lags(connection, ids)
            groups = await _read_consumers(connection, ids)
        return [
            SubscriptionView(
                name=row["name"],
                spec=decode_spec(row["spec"]),
                created_at=format_rfc3339(row["created_at"]),
                lag=lags[row["id"]],
                consumers=groups.get(row["id"], ()),
            )
            for row in rows
        ]

    async def replay(self, tenant: str, name: str, *, after: int | None = None, time: str | None = None) -> int:
        """Go on after the position ``after``, or from the first event of ``time``; return the position.

        Every lease ends, delayed subjects are forgotten, and dead letters stay. Raises ``invalid_body`` for a time
        that is none, or a position that the log does not have.
        """
        if (after is None) == (time is None):
            raise OctoError("Give either a position (`after`) or a `time`, not both.", code="invalid_body")
        async with self._db.transaction() as tx:
            row = await _find(tx, tenant, name)
            position = await _position_of_time(tx, time) if time is not None else await _start_position(tx, after or 0)
            await _end_leases(tx, row["id"], position=position)
            await tx.execute(delete(delayed_subjects).where(delayed_subjects.c.subscription_id == row["id"]))
            await _bump_revision(tx, row["id"])
            return position

    async def lowest_position(self) -> int | None:
        """Return the position after which some subscription still needs the log; ``None`` without subscriptions.

        Events up to it are handled everywhere, or have their copy as dead letters.
        """
        async with self._db.read() as connection:
            cursor = await connection.scalar(select(func.min(subscription_partitions.c.position)))
            delayed = await connection.scalar(
                select(func.min(delayed_subjects.c.handled)).where(delayed_subjects.c.through.is_(None))
            )
        positions = [int(position) for position in (cursor, delayed) if position is not None]
        return min(positions, default=None)

    async def list_dead_letters(
        self, tenant: str, *, subscription: str = "", after: int = 0, limit: int = 50
    ) -> list[DeadLetter]:
        """Return dead letters after an id, oldest first."""
        query = (
            select(dead_letters, subscriptions.c.name)
            .join(subscriptions, subscriptions.c.id == dead_letters.c.subscription_id)
            .where(subscriptions.c.tenant == tenant, dead_letters.c.id > after)
        )
        async with self._db.read() as connection:
            if subscription:
                found = await _find(connection, tenant, subscription)
                query = query.where(subscriptions.c.id == found["id"])
            rows = await connection.all(query.order_by(dead_letters.c.id).limit(limit))
        return [_letter_from_row(row) for row in rows]

    async def retry_dead_letter(self, tenant: str, letter_id: int) -> None:
        """Deliver a dead letter again. A held subject goes on with it. Raises ``dead_letter_not_found``."""
        async with self._db.transaction() as tx:
            row = await _find_letter(tx, tenant, letter_id)
            event = msgspec.convert(row["event"], Event)
            in_log = await tx.scalar(select(events.c.seq).where(events.c.id == event.id))
            if row["state"] == "held" and in_log is not None:
                await _release_subject(tx, row["subscription_id"], event, handled=None, now=await tx.now())
                await tx.execute(delete(dead_letters).where(dead_letters.c.id == letter_id))
            else:
                # A held event that retention has deleted is delivered from here too, and its subject stays held until
                # it is handled.
                await tx.execute(
                    update(dead_letters)
                    .where(dead_letters.c.id == letter_id)
                    .values(state="retrying", due_at=await tx.now())
                )
            await _bump_revision(tx, row["subscription_id"])

    async def drop_dead_letter(self, tenant: str, letter_id: int) -> None:
        """Delete a dead letter. A held subject goes on after it. Raises ``dead_letter_not_found``."""
        async with self._db.transaction() as tx:
            row = await _find_letter(tx, tenant, letter_id)
            if row["state"] in ("held", "retrying"):
                event = msgspec.convert(row["event"], Event)
                await _release_subject(tx, row["subscription_id"], event, handled=event.seq, now=await tx.now())
                await _bump_revision(tx, row["subscription_id"])
            await tx.execute(delete(dead_letters).where(dead_letters.c.id == letter_id))


def _by_name(tenant: str, name: str) -> Any:
    return select(subscriptions).where(subscriptions.c.tenant == tenant, subscriptions.c.name == name)


def _not_found() -> OctoError:
    return OctoError("There is no such subscription.", code="subscription_not_found")


async def _find(connection: DatabaseConnection, tenant: str, name: str) -> RowMapping:
    query = _by_name(tenant, name)
    # In a transaction the row is locked first, as consumers do, which keeps the order of locks.
    row = await connection.first(query.with_for_update() if isinstance(connection, Transaction) else query)
    if row is None:
        raise _not_found()
    return row


async def _bump_revision(tx: Transaction, subscription_id: str) -> None:
    """Make consumers load what changed at their next renewal."""
    await tx.execute(
        update(subscriptions).where(subscriptions.c.id == subscription_id).values(revision=subscriptions.c.revision + 1)
    )


async def _end_leases(tx: Transaction, subscription_id: str, *, position: int | None = None) -> None:
    values: dict[str, Any] = {"consumer": None, "fence": subscription_partitions.c.fence + 1}
    if position is not None:
        values |= {"position": position, "suspects": None}
    await tx.execute(
        update(subscription_partitions)
        .where(subscription_partitions.c.subscription_id == subscription_id)
        .values(values)
    )


async def _start_position(tx: Transaction, start: Start) -> int:
    head = await read_head(tx)
    if start == "latest":
        return head
    oldest = await tx.scalar(select(func.min(events.c.seq)))
    lowest = head if oldest is None else int(oldest) - 1
    if start == "earliest":
        return lowest
    if not lowest <= start <= head:
        detail = f"is {start}; the log has the positions {lowest + 1} to {head}"
        raise OctoError(f"The position {detail}.", code="invalid_body", field_errors=[FieldError("/after", detail)])
    return start


async def _position_of_time(tx: Transaction, time: str) -> int:
    detail = f"{time[:40]!r} is no time such as 2025-11-10T10:30:00Z"
    invalid = OctoError(f"The time {detail}.", code="invalid_body", field_errors=[FieldError("/time", detail)])
    with map_exceptions(invalid, ValueError, OverflowError):
        moment = datetime.fromisoformat(time)
        if moment.tzinfo is None:
            raise invalid
        text = format_rfc3339(moment.timestamp())
    # Timestamps of one format in UTC sort as text. The clocks of the writers differ a little, so events of about the
    # same time may be on either side.
    first = await tx.scalar(select(func.min(events.c.seq)).where(events.c.timestamp >= text))
    return int(first) - 1 if first is not None else await read_head(tx)


async def _read_lags(connection: DatabaseConnection, ids: Sequence[str]) -> dict[str, Lag]:
    if not ids:
        return {}
    head = await read_head(connection)
    now = await connection.now()
    owner = subscription_partitions.c.subscription_id
    cursors = await connection.all(
        select(owner.label("id"), func.min(subscription_partitions.c.position).label("position"))
        .where(owner.in_(ids))
        .group_by(owner)
    )
    delayed = await connection.all(
        select(
            delayed_subjects.c.subscription_id.label("id"),
            func.count().label("count"),
            func.sum(cast(delayed_subjects.c.held, Integer)).label("held"),
            func.min(delayed_subjects.c.handled).label("position"),
        )
        .where(delayed_subjects.c.subscription_id.in_(ids), delayed_subjects.c.through.is_(None))
        .group_by(delayed_subjects.c.subscription_id)
    )
    dead = await connection.all(
        select(dead_letters.c.subscription_id.label("id"), func.count().label("count"))
        .where(dead_letters.c.subscription_id.in_(ids))
        .group_by(dead_letters.c.subscription_id)
    )
    waiting = {row["id"]: row for row in delayed}
    letters = {row["id"]: int(row["count"]) for row in dead}
    lags: dict[str, Lag] = {}
    for row in cursors:
        position = int(row["position"])
        subject = waiting.get(row["id"])
        if subject is not None:
            position = min(position, int(subject["position"]))
        lags[row["id"]] = Lag(
            positions=max(0, head - position),
            seconds=await age_after(connection, position, now) if head > position else 0.0,
            delayed=int(subject["count"]) if subject is not None else 0,
            held=int(subject["held"]) if subject is not None else 0,
            dead=letters.get(row["id"], 0),
        )
    return lags


async def age_after(connection: DatabaseConnection, position: int, now: float) -> float:
    """Return the seconds since the first event after a position."""
    text = await connection.scalar(
        select(events.c.timestamp).where(events.c.seq > position).order_by(events.c.seq).limit(1)
    )
    if text is None:
        return 0.0
    try:
        return max(0.0, now - datetime.fromisoformat(text).timestamp())
    except ValueError:  # written by another service, whose form of a timestamp is its own
        return 0.0


async def _read_consumers(connection: DatabaseConnection, ids: Sequence[str]) -> dict[str, tuple[ConsumerView, ...]]:
    if not ids:
        return {}
    now = await connection.now()
    held = select(
        subscription_partitions.c.subscription_id,
        subscription_partitions.c.consumer,
        func.count().label("partitions"),
    ).group_by(subscription_partitions.c.subscription_id, subscription_partitions.c.consumer)
    counts = held.subquery()
    rows = await connection.all(
        select(subscription_consumers, counts.c.partitions)
        .outerjoin(
            counts,
            (counts.c.subscription_id == subscription_consumers.c.subscription_id)
            & (counts.c.consumer == subscription_consumers.c.consumer),
        )
        .where(subscription_consumers.c.subscription_id.in_(ids), subscription_consumers.c.lease_until >= now)
        .order_by(subscription_consumers.c.joined_at, subscription_consumers.c.consumer)
    )
    groups: dict[str, tuple[ConsumerView, ...]] = {}
    for row in rows:
        view = ConsumerView(row["consumer"], int(row["partitions"] or 0), round(float(row["lease_until"]) - now, 3))
        groups[row["subscription_id"]] = (*groups.get(row["subscription_id"], ()), view)
    return groups


async def _find_letter(tx: Transaction, tenant: str, letter_id: int) -> RowMapping:
    # In the order of locks: the subscription, the partition, whose lock consumers take first, and the letter.
    row = await tx.first(
        select(dead_letters)
        .join(subscriptions, subscriptions.c.id == dead_letters.c.subscription_id)
        .where(subscriptions.c.tenant == tenant, dead_letters.c.id == letter_id)
    )
    if row is not None:
        await tx.execute(select(subscriptions).where(subscriptions.c.id == row["subscription_id"]).with_for_update())
        await tx.execute(
            select(subscription_partitions)
            .where(
                subscription_partitions.c.subscription_id == row["subscription_id"],
                subscription_partitions.c.partition == row["partition"],
            )
            .with_for_update()
        )
        row = await tx.first(select(dead_letters).where(dead_letters.c.id == letter_id).with_for_update())
    if row is None:
        raise OctoError("There is no such dead letter.", code="dead_letter_not_found")
    return row


async def _release_subject(
    tx: Transaction, subscription_id: str, event: Event, *, handled: int | None, now: float
) -> None:
    values: dict[str, Any] = {"held": False, "attempts": 0, "due_at": now}
    if handled is not None:
        values["handled"] = handled
    await tx.execute(
        update(delayed_subjects)
        .where(
            delayed_subjects.c.subscription_id == subscription_id,
            delayed_subjects.c.tenant == event.tenant,
            delayed_subjects.c.subject == event.subject,
            delayed_subjects.c.partition == partition_of(event.tenant, event.subject),
            # The letter may be older than what holds the subject now.
            delayed_subjects.c.held,
            delayed_subjects.c.handled < event.seq,
        )
        .values(values)
    )


def _letter_from_row(row: RowMapping) -> DeadLetter:
    return DeadLetter(
        id=row["id"],
        subscription=row["name"],
        state=row["state"],
        event=msgspec.convert(row["event"], Event),
        attempts=row["attempts"],
        reason=row["reason"],
        created_at=format_rfc3339(row["created_at"]),
    )
