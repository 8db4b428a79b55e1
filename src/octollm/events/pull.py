"""Consumers that poll for deliveries and acknowledge them in a later call, which any replica may serve.

All state is in SQL. A poll returns every delivery that is not acknowledged, from the positions of the partitions on, so
nothing depends on the replica or the connection that delivered first. The lock of a partition's row orders polls and
acknowledgements: what a poll leaves to a delayed subject, no acknowledgement can pass over.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import msgspec
from sqlalchemy import select, update
from sqlalchemy.engine import RowMapping

from octollm.concurrency import BackgroundLoop
from octollm.contracts.events import Event
from octollm.contracts.subscriptions import AckId, Delivery, EventSelector, FailedDelivery, decode_spec, partition_of
from octollm.errors import FieldError, OctoError
from octollm.events.deliveries import DelayedSubject, DeliveryStore, read_head
from octollm.events.leases import LONGEST_LEASE_SECONDS, LeaseStore, Membership, PartitionLease, check_lease
from octollm.events.log import EventLog
from octollm.events.pubsub import RECONNECT_BACKOFF, PubSubListener
from octollm.events.rows import event_from_row
from octollm.events.suspects import ENDED_REASON, LEAST_DEATHS, encode_suspects, settle_suspects
from octollm.storage import Database, Transaction
from octollm.storage.keys import RedisKeys
from octollm.storage.redis_protocol import PubSubMessage, RedisClient
from octollm.storage.tables import dead_letters, delayed_subjects, events, subscription_consumers
from octollm.storage.tables import subscription_partitions as partitions

PULL_LEASE_SECONDS = LONGEST_LEASE_SECONDS
"""How long a consumer may be silent: between its polls and acknowledgements."""
SCAN_LIMIT = 1000
"""Selected events of the log that one poll looks at, from the first that is not acknowledged on."""


@dataclass(frozen=True, slots=True)
class _Acknowledgement:
    """An ``ack_id`` with its place in the request; ``failure`` is set for a delivery that failed."""

    ack: AckId
    pointer: str
    failure: FailedDelivery | None = None


class PullConsumers:
    """Polls and acknowledges for consumers in other processes."""

    def __init__(self, db: Database, log: EventLog, leases: LeaseStore, deliveries: DeliveryStore) -> None:
        self._db = db
        self._log = log
        self._leases = leases
        self._deliveries = deliveries

    async def poll(self, subscription_id: str, consumer: str, limit: int) -> list[Delivery]:
        """Join the group or renew the lease, and return up to ``limit`` deliveries.

        Deliveries that are not acknowledged come first, and again. Partitions beyond the consumer's share are given up.
        """
        async with self._db.transaction() as tx:
            membership = await self._leases.join_in(
                tx, subscription_id, consumer, PULL_LEASE_SECONDS, give_up_surplus=True
            )
            leases = await self._lock_partitions(tx, subscription_id, consumer)
            if not leases:
                return []
            selector = EventSelector(membership.spec)
            delayed = {
                (state.tenant, state.subject): state
                for state in await self._deliveries.load_delayed_in(tx, subscription_id, leases)
            }
            head = await read_head(tx)
            found = await self._retries(tx, subscription_id, leases, delayed, selector, head, limit)
            found += await self._from_log(
                tx, subscription_id, membership, leases, delayed, selector, head, limit - len(found)
            )
            careful = {n: dict(s) for n in leases if (s := membership.leases[n].suspects) is not None}
            if careful:
                found = await self._guard(tx, subscription_id, membership, leases, careful, found)
        return found

    async def _guard(
        self,
        tx: Transaction,
        subscription_id: str,
        membership: Membership,
        leases: dict[int, PartitionLease],
        careful: dict[int, dict[int, int]],
        found: list[Delivery],
    ) -> list[Delivery]:
        """Return what may be in hand of partitions whose consumer ended, and record it.

        Of each of them that is one delivery; a suspect is in hand alone. One that was too often is given up.
        """
        spec = membership.spec
        given_up: set[int] = set()
        first: dict[int, Delivery] = {}
        kept: list[Delivery] = []
        through: dict[int, int] = {}
        for delivery in found:
            ack = AckId.parse(delivery.ack_id, "")
            number = ack.partition
            if number not in careful:
                kept.append(delivery)
                continue
            through[number] = max(through.get(number, 0), ack.seq)
            if number in first or number in given_up:
                continue
            deaths = careful[number].get(ack.seq, 0)
            if deaths < max(LEAST_DEATHS, spec.max_attempts):
                first[number] = delivery
                kept.append(delivery)
                continue
            given_up.add(number)
            del careful[number][ack.seq]
            await self._deliveries.fail_in(
                tx,
                subscription_id,
                ack,
                delivery.event,
                spec=spec,
                selector=EventSelector(spec),
                reason=ENDED_REASON,
                retry_after=None,
                final=True,
                deaths=deaths,
            )
        suspects = [d for number, d in first.items() if careful[number].get(d.event.seq)]
        if suspects:
            kept = suspects[:1]
        for number, deaths_by_seq in careful.items():
            in_hand = {first[number].event.seq} if number in first and first[number] in kept else set[int]()
            position = leases[number].position
            entries = {**dict.fromkeys(in_hand, 0), **deaths_by_seq}
            if max(deaths_by_seq, default=0) <= position and number in through:
                # Just claimed. Outcomes may be reported in groups, so what ended it may be any of these.
                entries.setdefault(through[number], 0)
            entries = {seq: n for seq, n in entries.items() if n or seq > position or seq in in_hand}
            text = encode_suspects(entries, in_hand, leases[number].fence) if entries else None
            await tx.execute(
                update(partitions)
                .where(partitions.c.subscription_id == subscription_id, partitions.c.partition == number)
                .values(suspects=text)
            )
        return kept

    async def _lock_partitions(self, tx: Transaction, subscription_id: str, consumer: str) -> dict[int, PartitionLease]:
        rows = await tx.all(
            select(partitions)
            .where(partitions.c.subscription_id == subscription_id, partitions.c.consumer == consumer)
            .order_by(partitions.c.partition)
            .with_for_update()
        )
        return {int(row["partition"]): PartitionLease(row["partition"], row["fence"], row["position"]) for row in rows}

    async def _retries(
        self,
        tx: Transaction,
        subscription_id: str,
        leases: dict[int, PartitionLease],
        delayed: dict[tuple[str, str], DelayedSubject],
        selector: EventSelector,
        head: int,
        limit: int,
    ) -> list[Delivery]:
        """Return the next events of delayed subjects that are due, and the dead letters that are to be retried."""
        found: list[Delivery] = []
        due = [state for state in delayed.values() if state.through is None and not state.held and state.due_in <= 0]
        for state in due[:limit]:
            event = await self._deliveries.next_of_subject_in(tx, state, selector, through=head)
            fence = leases[state.partition].fence
            if event is None:
                # Its events are gone from the log, or no longer selected.
                ack = AckId("subject", state.partition, fence, state.handled, state.handled)
                subject = (state.tenant, state.subject)
                if (
                    ended := await self._deliveries.resolve_in(tx, subscription_id, ack, subject, selector)
                ) is not None:
                    delayed[subject] = ended
                continue
            ack = AckId("subject", state.partition, fence, state.handled, event.seq)
            found.append(Delivery(event, str(ack), state.attempts + 1))
        for letter, event, attempts in await self._deliveries.due_letters_in(
            tx, subscription_id, leases, limit - len(found)
        ):
            partition = partition_of(event.tenant, event.subject)
            ack = AckId("letter", partition, leases[partition].fence, letter, event.seq)
            found.append(Delivery(event, str(ack), attempts + 1))
        return found

    async def _from_log(
        self,
        tx: Transaction,
        subscription_id: str,
        membership: Membership,
        leases: dict[int, PartitionLease],
        delayed: dict[tuple[str, str], DelayedSubject],
        selector: EventSelector,
        head: int,
        limit: int,
    ) -> list[Delivery]:
        """Return the next events of the log, and move the partitions that have none to the end of what was read."""
        start = min(lease.position for lease in leases.values())
        page = [
            event
            for event in await self._log.read(
                start, SCAN_LIMIT, tenant=membership.event_tenant, types=list(selector.types), connection=tx
            )
            if event.seq <= head
        ]
        end = page[-1].seq if len(page) == SCAN_LIMIT else head
        last = {number: lease.position for number, lease in leases.items()}
        waiting: set[int] = set()
        found: list[Delivery] = []
        for event in page:
            number = partition_of(event.tenant, event.subject)
            lease = leases.get(number)
            if lease is None or event.seq <= lease.position or not selector.matches(event):
                continue
            state = delayed.get((event.tenant, event.subject))
            if state is not None and (state.through is None or event.seq <= state.through):
                continue
            if len(found) >= limit:
                end = event.seq - 1
                break
            found.append(Delivery(event, str(AckId("log", number, lease.fence, last[number], event.seq))))
            last[number] = event.seq
            waiting.add(number)
        idle = [number for number, lease in leases.items() if number not in waiting and lease.position < end]
        if idle:
            await tx.execute(
                update(partitions)
                .where(partitions.c.subscription_id == subscription_id, partitions.c.partition.in_(idle))
                .values(position=end)
            )
        return found

    async def acknowledge(
        self,
        subscription: RowMapping,
        consumer: str,
        acked: Sequence[str],
        failed: Sequence[FailedDelivery],
    ) -> None:
        """Record the outcome of deliveries, all of them or none, and renew the lease.

        A delivery that was acknowledged before changes nothing. Raises ``invalid_body`` for an ``ack_id`` that is none,
        ``lease_lost``, ``ack_out_of_order``, and ``overloaded`` when too many subjects are delayed.
        """
        parsed = [
            *(_Acknowledgement(AckId.parse(text, f"/acked/{n}"), f"/acked/{n}") for n, text in enumerate(acked)),
            *(
                _Acknowledgement(AckId.parse(failure.ack_id, f"/failed/{n}/ack_id"), f"/failed/{n}/ack_id", failure)
                for n, failure in enumerate(failed)
            ),
        ]
        # By partition, so that locks are taken in one order; within it, in the order of the log.
        parsed.sort(key=lambda item: (item.ack.partition, item.ack.kind != "log", item.ack.seq))
        subscription_id = str(subscription["id"])
        async with self._db.transaction() as tx:
            until = await tx.now() + PULL_LEASE_SECONDS
            await tx.execute(
                update(subscription_consumers)
                .where(
                    subscription_consumers.c.subscription_id == subscription_id,
                    subscription_consumers.c.consumer == consumer,
                )
                .values(lease_until=until)
            )
            await _check_known(tx, parsed)
            locked: dict[int, RowMapping] = {}
            positions: dict[int, int] = {}
            for item in parsed:
                number = item.ack.partition
                if number not in locked or locked[number]["fence"] != item.ack.fence:
                    locked[number] = await check_lease(tx, subscription_id, consumer, item.ack)
                    positions.setdefault(number, int(locked[number]["position"]))
                await self._apply(tx, subscription, item, positions)
            for number, position in positions.items():
                changes: dict[str, Any] = {}
                if position > int(locked[number]["position"]):
                    changes["position"] = position
                if stored := locked[number]["suspects"]:
                    answered = {item.ack.seq for item in parsed if item.ack.partition == number}
                    changes["suspects"] = settle_suspects(stored, answered, position)
                if changes:
                    await tx.execute(
                        update(partitions)
                        .where(partitions.c.subscription_id == subscription_id, partitions.c.partition == number)
                        .values(changes)
                    )

    async def _apply(
        self, tx: Transaction, subscription: RowMapping, item: _Acknowledgement, positions: dict[int, int]
    ) -> None:
        ack = item.ack
        if ack.kind == "log":
            if ack.seq <= positions[ack.partition]:
                return
            _check_order(ack, positions[ack.partition], item.pointer)
            if item.failure is None:
                positions[ack.partition] = ack.seq
                return
        event = await self._find_event(tx, subscription, item)
        if event is None:
            return
        if item.failure is not None:
            await self._fail(tx, subscription, item.failure, ack, event)
        elif ack.kind != "log":
            selector = EventSelector(decode_spec(subscription["spec"]))
            subject = (event.tenant, event.subject)
            await self._deliveries.resolve_in(tx, subscription["id"], ack, subject, selector)
        if ack.kind == "log":
            positions[ack.partition] = ack.seq

    async def _fail(
        self, tx: Transaction, subscription: RowMapping, failure: FailedDelivery, ack: AckId, event: Event
    ) -> None:
        spec = decode_spec(subscription["spec"])
        outcome = await self._deliveries.fail_in(
            tx,
            subscription["id"],
            ack,
            event,
            spec=spec,
            selector=EventSelector(spec),
            reason=failure.reason or "no reason given",
            retry_after=failure.retry_after,
            final=failure.final,
        )
        if outcome.kind == "blocked":
            raise OctoError(
                "Too many subjects wait for a retry; the event stays the next one of its partition.",
                code="overloaded",
                retry_after=outcome.seconds,
            )

    async def _find_event(self, tx: Transaction, subscription: RowMapping, item: _Acknowledgement) -> Event | None:
        """Return the event of a delivery; ``None`` for one that needs no more work."""
        ack = item.ack
        if ack.kind == "letter":
            row = await tx.first(
                select(dead_letters).where(
                    dead_letters.c.subscription_id == subscription["id"],
                    dead_letters.c.id == ack.after,
                    dead_letters.c.state == "retrying",
                )
            )
            return None if row is None else msgspec.convert(row["event"], Event)
        row = await tx.first(select(events).where(events.c.seq == ack.seq))
        if row is None:
            raise _unknown(item.pointer)
        event = event_from_row(row)
        # A position that somebody made up must not reveal or change anything of another tenant.
        allowed = subscription["event_tenant"] in (None, event.tenant)
        if not allowed or partition_of(event.tenant, event.subject) != ack.partition:
            raise _unknown(item.pointer)
        if ack.kind == "subject":
            state = await tx.first(
                select(delayed_subjects).where(
                    delayed_subjects.c.subscription_id == subscription["id"],
                    delayed_subjects.c.tenant == event.tenant,
                    delayed_subjects.c.subject == event.subject,
                )
            )
            if state is None or state["handled"] >= ack.seq:
                return None
            _check_order(ack, int(state["handled"]), item.pointer)
        return event


class AckHints:
    """Wakes the polls and streams of every replica when deliveries were acknowledged or failed, within ``async with``.

    Only hints: without Redis they wake those of this process, and the others look again by themselves.
    """

    def __init__(self, redis: RedisClient, keys: RedisKeys, replica: str) -> None:
        """``replica`` is the id of this process, which need not be woken by its own hints."""
        self._redis = redis
        self._channel = keys.acks
        self._replica = replica
        self._listeners: dict[str, set[asyncio.Event]] = {}
        self._pending: set[str] = set()
        self._wakeup = asyncio.Event()
        self._announcing = BackgroundLoop("announcing acknowledgements", self._announce, backoff=RECONNECT_BACKOFF)
        self._listener = PubSubListener("acknowledgements", redis, self._on_message, channels=(keys.acks,))

    async def __aenter__(self) -> AckHints:
        """Start. Redis need not be up yet."""
        self._announcing.start()
        await self._listener.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop, and close the connection."""
        await self._announcing.aclose()
        await self._listener.aclose()
        self._announcing.raise_if_crashed()
        self._listener.raise_if_crashed()

    @contextlib.contextmanager
    def waiting(self, subscription_id: str, wakeup: asyncio.Event) -> Generator[None]:
        """Set ``wakeup`` when deliveries of the subscription were recorded, while the block runs."""
        listeners = self._listeners.setdefault(subscription_id, set())
        listeners.add(wakeup)
        try:
            yield
        finally:
            listeners.discard(wakeup)
            if not listeners:
                self._listeners.pop(subscription_id, None)

    def announce(self, subscription_id: str) -> None:
        """Wake all that wait for the subscription, here and at the other replicas."""
        self._wake(subscription_id)
        self._pending.add(subscription_id)
        self._wakeup.set()

    def _wake(self, subscription_id: str) -> None:
        for wakeup in self._listeners.get(subscription_id, ()):
            wakeup.set()

    async def _announce(self) -> None:
        """Publish the hints; those during the round trip share the next one."""
        await self._wakeup.wait()
        self._wakeup.clear()
        pending, self._pending = self._pending, set()
        await self._redis.publish([(self._channel, f"{self._replica} {each}".encode()) for each in pending])

    def _on_message(self, message: PubSubMessage) -> None:
        replica, _space, subscription_id = message.data.decode(errors="replace").partition(" ")
        if replica != self._replica:
            self._wake(subscription_id)


async def _check_known(tx: Transaction, parsed: Sequence[_Acknowledgement]) -> None:
    """Raise ``invalid_body`` for a position beyond the end of the log, which no delivery can have."""
    head = await read_head(tx)
    for item in parsed:
        if item.ack.seq > head:
            raise _unknown(item.pointer)


def _check_order(ack: AckId, position: int, pointer: str) -> None:
    if ack.after > position:
        detail = f"comes after position {ack.after}, which is not acknowledged yet"
        raise OctoError(f"The delivery {detail}.", code="ack_out_of_order", field_errors=[FieldError(pointer, detail)])


def _unknown(pointer: str) -> OctoError:
    detail = "is no ack_id of a delivery"
    return OctoError(f"The ack_id {detail}.", code="invalid_body", field_errors=[FieldError(pointer, detail)])
