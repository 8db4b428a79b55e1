"""Leases on the partitions of a durable subscription, shared by the consumers of its group.

A consumer joins and renews one lease; who holds a partition, and under which fencing token, is in the partition's row.
Leases are compared with the database's clock. A consumer that lost a partition changes nothing after the take-over.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from sqlalchemy import and_, case, delete, func, select, tuple_, update
from sqlalchemy.engine import RowMapping

from octollm.contracts.subscriptions import PARTITIONS, AckId, SubscriptionSpec, decode_spec
from octollm.errors import OctoError
from octollm.events.log import EventLog
from octollm.events.suspects import claim_suspects
from octollm.group_commit import GroupCommit
from octollm.storage import Database, Transaction, is_lease_over
from octollm.storage.tables import subscription_consumers as consumers
from octollm.storage.tables import subscription_partitions as partitions
from octollm.storage.tables import subscriptions

MAX_CONSUMERS = 256
"""Consumers of one subscription; each beyond the number of partitions is a standby."""
LONGEST_LEASE_SECONDS = 30.0
"""The longest lease of a consumer: of one that pulls over HTTP."""
_SETTLE = """
UPDATE subscription_partitions AS held SET position = moved.position
FROM unnest($1::text[], $2::text[], $3::int[], $4::bigint[], $5::bigint[])
    AS moved (subscription_id, consumer, partition, fence, position)
WHERE held.subscription_id = moved.subscription_id AND held.partition = moved.partition
    AND held.consumer = moved.consumer AND held.fence = moved.fence
RETURNING held.subscription_id, held.consumer, held.partition
"""
_SAVE_SUSPECTS = """
UPDATE subscription_partitions AS held
SET suspects = found.suspects, position = greatest(held.position, found.position)
FROM unnest($1::text[], $2::int[], $3::bigint[], $4::text[], $5::bigint[], $6::text[])
    AS found (subscription_id, partition, fence, consumer, position, suspects)
WHERE held.subscription_id = found.subscription_id AND held.partition = found.partition
    AND held.consumer = found.consumer AND held.fence = found.fence
RETURNING held.subscription_id, held.partition, held.fence
"""


@dataclass(frozen=True, slots=True)
class PartitionLease:
    """A partition held by a consumer: its fencing token, and the position up to which its events are handled.

    ``suspects`` is as of :func:`~octollm.events.suspects.claim_suspects`.
    """

    partition: int
    fence: int
    position: int
    suspects: Mapping[int, int] | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class _Settlement:
    """What :meth:`LeaseStore.settle` is called with."""

    subscription_id: str
    consumer: str
    leases: Sequence[PartitionLease]


@dataclass(frozen=True, slots=True)
class _InHand:
    """What :meth:`LeaseStore.save_suspects` is called with."""

    subscription_id: str
    consumer: str
    lease: PartitionLease
    suspects: str | None


@dataclass(frozen=True, slots=True)
class _Renewal:
    """What :meth:`LeaseStore.renew` is called with."""

    subscription_id: str
    consumer: str
    lease_seconds: float


@dataclass(frozen=True, slots=True)
class Membership:
    """What a consumer holds after it joined or renewed.

    ``surplus`` are partitions beyond its share, which it gives up when their deliveries are settled. ``revision``
    rises with each change of the subscription by somebody else. ``group`` is what :meth:`LeaseStore.renew` returns
    while nothing changes.
    """

    spec: SubscriptionSpec
    revision: int
    event_tenant: str | None
    leases: Mapping[int, PartitionLease]
    surplus: frozenset[int]
    group: Hashable = None


class LeaseStore:
    """Joins groups, claims and gives up partitions, and saves their positions."""

    def __init__(self, db: Database, log: EventLog) -> None:
        self._db = db
        self._log = log
        self._settlements: GroupCommit[_Settlement, frozenset[int]] = GroupCommit(
            self._settle_all, name="positions of subscriptions"
        )
        self._in_hand: GroupCommit[_InHand, bool] = GroupCommit(self._save_all_suspects, name="events in hand")
        self._renewals: GroupCommit[_Renewal, Hashable] = GroupCommit(self._renew_all, name="leases of subscriptions")

    async def renew(self, subscription_id: str, consumer: str, lease_seconds: float) -> Hashable:
        """Renew the lease of a member; return the state of its group.

        While that is the one of the last :meth:`join`, there is nothing to join for. Renewals of a process share a
        transaction: it may have many subscriptions, whose groups seldom change. Returns ``None`` when only
        :meth:`join` can renew, or has to do something for the group.
        """
        return await self._renewals.wait(_Renewal(subscription_id, consumer, lease_seconds))

    async def _renew_all(self, items: Sequence[_Renewal]) -> list[Hashable]:
        ids = sorted({each.subscription_id for each in items})
        async with self._db.transaction() as tx:
            now = await tx.now()
            renewed: set[tuple[str, str]] = set()
            for seconds in sorted({each.lease_seconds for each in items}):
                keys = [(each.subscription_id, each.consumer) for each in items if each.lease_seconds == seconds]
                rows = await tx.all(
                    update(consumers)
                    .where(tuple_(consumers.c.subscription_id, consumers.c.consumer).in_(keys))
                    .values(lease_until=now + seconds)
                    .returning(consumers.c.subscription_id, consumers.c.consumer)
                )
                renewed |= {(row["subscription_id"], row["consumer"]) for row in rows}
            states = await self._read_states(tx, ids, now)
        return [
            states.get(each.subscription_id) if (each.subscription_id, each.consumer) in renewed else None
            for each in items
        ]

    async def _read_states(self, tx: Transaction, ids: Sequence[str], now: float) -> dict[str, Hashable]:
        """Return the state of each group: revision, members, and who holds how many partitions under which fences.

        Revisions and fences only rise and no member comes back, so two equal states have no other between them. A group
        is left out in which a lease is over, a partition is free or a position is not in the log.
        """
        oldest, head = await self._log.read_bounds(tx)
        revisions = await tx.all(
            select(subscriptions.c.id, subscriptions.c.revision).where(subscriptions.c.id.in_(ids))
        )
        over = is_lease_over(consumers.c.lease_until, now, LONGEST_LEASE_SECONDS)
        members = await tx.all(
            select(consumers.c.subscription_id, consumers.c.consumer, over.label("over")).where(
                consumers.c.subscription_id.in_(ids)
            )
        )
        held = await tx.all(
            select(
                partitions.c.subscription_id,
                partitions.c.consumer,
                func.count().label("partitions"),
                func.sum(partitions.c.fence).label("fences"),
                func.min(partitions.c.position).label("first"),
                func.max(partitions.c.position).label("last"),
            )
            .where(partitions.c.subscription_id.in_(ids))
            .group_by(partitions.c.subscription_id, partitions.c.consumer)
        )
        found: dict[str, set[Hashable]] = {row["id"]: {int(row["revision"])} for row in revisions}
        for row in members:
            found[row["subscription_id"]].add(None if row["over"] else str(row["consumer"]))
        for row in held:
            good = row["consumer"] is not None and oldest - 1 <= row["first"] and row["last"] <= head
            state = (str(row["consumer"]), int(row["partitions"]), int(row["fences"]))
            found[row["subscription_id"]].add(state if good else None)
        return {each: frozenset(state) for each, state in found.items() if None not in state}

    async def join(
        self, subscription_id: str, consumer: str, lease_seconds: float, *, give_up_surplus: bool = False
    ) -> Membership:
        """Join the group or renew the lease, and claim free partitions up to an equal share.

        With ``give_up_surplus`` partitions beyond the share are released at once. Raises ``subscription_not_found``,
        and ``quota_exhausted`` when the subscription has too many consumers.
        """
        async with self._db.transaction() as tx:
            found = await self.join_in(tx, subscription_id, consumer, lease_seconds, give_up_surplus=give_up_surplus)
            states = await self._read_states(tx, [subscription_id], await tx.now())
        return replace(found, group=states.get(subscription_id))

    async def join_in(
        self, tx: Transaction, subscription_id: str, consumer: str, lease_seconds: float, *, give_up_surplus: bool
    ) -> Membership:
        """Join in the transaction ``tx``, as :meth:`join` does.

        With ``give_up_surplus`` a consumer whose lease is over claims its partitions anew: it may have died.
        """
        # The subscription's row serialises the claims of its group, so two consumers never claim one partition.
        row = await tx.first(select(subscriptions).where(subscriptions.c.id == subscription_id).with_for_update())
        if row is None:
            raise OctoError("There is no such subscription.", code="subscription_not_found")
        now = await tx.now()
        group = consumers.c.subscription_id == subscription_id
        over = is_lease_over(consumers.c.lease_until, now, max(lease_seconds, LONGEST_LEASE_SECONDS))
        gone = over if give_up_surplus else and_(over, consumers.c.consumer != consumer)
        await tx.execute(delete(consumers).where(group, gone))
        members = [str(found["consumer"]) for found in await tx.all(select(consumers.c.consumer).where(group))]
        returned = give_up_surplus and consumer not in members
        if consumer not in members:
            if len(members) >= MAX_CONSUMERS:
                raise OctoError(
                    f"The subscription has {MAX_CONSUMERS} consumers, and no more are allowed.", code="quota_exhausted"
                )
            members.append(consumer)
        insert = tx.insert(consumers).values(
            subscription_id=subscription_id, consumer=consumer, joined_at=now, lease_until=now + lease_seconds
        )
        await tx.execute(
            insert.on_conflict_do_update(
                index_elements=[consumers.c.subscription_id, consumers.c.consumer],
                set_={"lease_until": insert.excluded.lease_until},
            )
        )
        # Without row locks, which saves waiting for consumers that save their positions: who holds a partition changes
        # only under the lock of the subscription, except that a holder may give its own ones up.
        query = select(partitions).where(partitions.c.subscription_id == subscription_id)
        query = query.order_by(partitions.c.partition)
        rows = await tx.all(query)
        if await self._skip_gap(tx, row, rows):
            rows = await tx.all(query)
        mine, to_claim, surplus = _share_partitions(rows, sorted(members), consumer, returned=returned)
        leases = {int(r["partition"]): _lease_from_row(r, r["fence"], ended=False) for r in mine}
        if to_claim:
            claimed = await tx.all(
                update(partitions)
                .where(partitions.c.subscription_id == subscription_id, partitions.c.partition.in_(to_claim))
                .values(consumer=consumer, fence=partitions.c.fence + 1)
                .returning(partitions.c.partition, partitions.c.fence, partitions.c.position, partitions.c.suspects)
            )
            # Neither released nor left: its consumer is gone.
            ended = {int(r["partition"]) for r in rows if r["consumer"] is not None}
            leases |= {
                int(r["partition"]): _lease_from_row(r, r["fence"] - 1, ended=r["partition"] in ended) for r in claimed
            }
        if surplus and give_up_surplus:
            await self._release(tx, subscription_id, consumer, surplus)
            leases = {number: lease for number, lease in leases.items() if number not in surplus}
            surplus = frozenset[int]()
        return Membership(decode_spec(row["spec"]), int(row["revision"]), row["event_tenant"], leases, surplus)

    async def _skip_gap(self, tx: Transaction, subscription: RowMapping, rows: Sequence[RowMapping]) -> bool:
        """Set partitions whose position the log does not have to its oldest event, and record the gap.

        Their leases end. Nothing else would say that events are missing: retention deleted them, or a backup with a
        shorter log was restored.
        """
        # After the positions, which move only forward and never beyond the end that is read here.
        oldest, head = await self._log.read_bounds(tx)
        if all(oldest - 1 <= row["position"] <= head for row in rows):
            return False
        lost = (partitions.c.position < oldest - 1) | (partitions.c.position > head)
        moved = await tx.all(
            update(partitions)
            .where(partitions.c.subscription_id == subscription["id"], lost)
            .values(position=oldest - 1, consumer=None, fence=partitions.c.fence + 1)
            .returning(partitions.c.partition)
        )
        numbers = {row["partition"] for row in moved}
        positions = [int(row["position"]) for row in rows if row["partition"] in numbers]
        reader = f"subscription/{subscription['name']}"
        # One event for each reason. Partitions differ by how far their consumers were.
        for of_reason in ([p for p in positions if p > head], [p for p in positions if p <= head]):
            if of_reason:
                bounds = oldest, head
                await self._log.record_gap(tx, reader, min(of_reason), bounds, tenant=subscription["tenant"])
        return bool(moved)

    async def release(self, subscription_id: str, consumer: str, held: Iterable[int]) -> None:
        """Give up partitions, so that another consumer claims them at its next renewal."""
        async with self._db.transaction(single=True) as tx:
            await self._release(tx, subscription_id, consumer, held)

    async def _release(self, tx: Transaction, subscription_id: str, consumer: str, held: Iterable[int]) -> None:
        await tx.execute(
            update(partitions)
            .where(
                partitions.c.subscription_id == subscription_id,
                partitions.c.consumer == consumer,
                partitions.c.partition.in_(list(held)),
            )
            .values(consumer=None)
        )

    async def save_suspects(
        self, subscription_id: str, consumer: str, lease: PartitionLease, suspects: str | None
    ) -> bool:
        """Save which events of a partition are in hand, and its position; return whether the consumer still holds it.

        Unlike :meth:`settle` this is on the disk afterwards. A call takes the place of an earlier one for the same
        partition that waits with it.
        """
        return await self._in_hand.wait(_InHand(subscription_id, consumer, lease, suspects))

    async def _save_all_suspects(self, items: Sequence[_InHand]) -> list[bool]:
        """Save those of many partitions in one commit: after a death every delivery waits for this."""
        keys = [(each.subscription_id, each.lease.partition, each.lease.fence) for each in items]
        last = dict(zip(keys, items, strict=True))
        if self._db.direct_pool is not None:
            values = [
                (*key, each.consumer, each.lease.position, each.suspects)
                for key, each in sorted(last.items(), key=lambda item: item[0])  # the order of locks
            ]
            rows = await self._db.direct_pool.fetch(_SAVE_SUSPECTS, *map(list, zip(*values, strict=True)))
            saved = {tuple(row) for row in rows}
        else:
            async with self._db.transaction() as tx:
                saved = {key for key, each in last.items() if await self._save_suspects(tx, each)}
        return [key in saved for key in keys]

    async def _save_suspects(self, tx: Transaction, item: _InHand) -> bool:
        lease = item.lease
        row = await tx.first(
            update(partitions)
            .where(
                partitions.c.subscription_id == item.subscription_id,
                partitions.c.partition == lease.partition,
                partitions.c.consumer == item.consumer,
                partitions.c.fence == lease.fence,
            )
            .values(suspects=item.suspects, position=func.max(partitions.c.position, lease.position))
            .returning(partitions.c.partition)
        )
        return row is not None

    async def leave(self, subscription_id: str, consumer: str) -> None:
        """Leave the group and give up every partition."""
        async with self._db.transaction() as tx:
            await tx.execute(
                delete(consumers).where(
                    consumers.c.subscription_id == subscription_id, consumers.c.consumer == consumer
                )
            )
            await self._release(tx, subscription_id, consumer, range(PARTITIONS))

    async def settle(self, subscription_id: str, consumer: str, leases: Sequence[PartitionLease]) -> frozenset[int]:
        """Save the positions of partitions; return the partitions that the consumer still holds.

        The position of a partition that it has lost is not saved: another consumer delivers from the saved one.
        """
        if not leases:
            return frozenset()
        return await self._settlements.wait(_Settlement(subscription_id, consumer, leases))

    async def _settle_all(self, items: Sequence[_Settlement]) -> list[frozenset[int]]:
        """Save the positions of several subscriptions in one commit."""
        if self._db.lazy_pool is not None:
            moved = [
                (each.subscription_id, each.consumer, lease.partition, lease.fence, lease.position)
                for each in items
                for lease in each.leases
            ]
            # Without waiting for the disk: after a crash of the server, events of the last second are delivered again.
            # What is written later, such as a partition given up, is never kept without this.
            moved.sort(key=lambda row: (row[0], row[2]))  # the order of locks
            rows = await self._db.lazy_pool.fetch(_SETTLE, *map(list, zip(*moved, strict=True)))
            found: dict[tuple[object, object], set[int]] = {}
            for subscription_id, consumer, partition in rows:
                found.setdefault((subscription_id, consumer), set()).add(int(str(partition)))
            return [frozenset(found.get((each.subscription_id, each.consumer), ())) for each in items]
        async with self._db.transaction() as tx:
            return [await self._settle(tx, each) for each in items]

    async def _settle(self, tx: Transaction, item: _Settlement) -> frozenset[int]:
        saved = await tx.all(
            update(partitions)
            .where(
                partitions.c.subscription_id == item.subscription_id,
                partitions.c.consumer == item.consumer,
                tuple_(partitions.c.partition, partitions.c.fence).in_(
                    [(lease.partition, lease.fence) for lease in item.leases]
                ),
            )
            .values(
                position=case({lease.partition: lease.position for lease in item.leases}, value=partitions.c.partition)
            )
            .returning(partitions.c.partition)
        )
        return frozenset(int(row["partition"]) for row in saved)


def _lease_from_row(row: RowMapping, last_fence: int, *, ended: bool) -> PartitionLease:
    suspects = claim_suspects(row["suspects"], last_fence, ended=ended)
    return PartitionLease(int(row["partition"]), int(row["fence"]), int(row["position"]), suspects)


def _share_partitions(
    rows: Sequence[RowMapping], members: Sequence[str], consumer: str, *, returned: bool
) -> tuple[list[RowMapping], list[int], frozenset[int]]:
    """Return the partitions of a consumer, those that it claims now, and those that are beyond its share."""
    mine = [row for row in rows if row["consumer"] == consumer and not returned]
    holders = {*members} - ({consumer} if returned else set())
    free = [int(row["partition"]) for row in rows if row["consumer"] not in holders]
    # Equal shares; the remainder goes to the first ones, so that the shares add up to all partitions.
    index = members.index(consumer)
    share = PARTITIONS // len(members) + (index < PARTITIONS % len(members))
    surplus = frozenset(int(row["partition"]) for row in mine[share:])
    return mine, free[: max(0, share - len(mine))], surplus


async def check_lease(tx: Transaction, subscription_id: str, consumer: str, ack: AckId) -> RowMapping:
    """Lock the partition of a delivery and return its row. Raises ``lease_lost`` when ``consumer`` does not hold it."""
    row = await tx.first(
        select(partitions)
        .where(partitions.c.subscription_id == subscription_id, partitions.c.partition == ack.partition)
        .with_for_update()
    )
    if row is None:
        raise OctoError("There is no such subscription.", code="subscription_not_found")
    if row["consumer"] != consumer or row["fence"] != ack.fence:
        raise OctoError(
            f"The lease of partition {ack.partition} has ended or another consumer has it; its events are delivered"
            " again.",
            code="lease_lost",
        )
    return row
