"""A durable subscription in this process: in order per subject, at least once, acknowledged, retried.

One reader takes events from the end of the log in memory, or from SQL, and puts them into the queues of the partitions
that this consumer holds. At most one event of a partition is handled at a time. Acknowledgements are saved in groups.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass, field
from types import TracebackType

from octollm.clock import Clock, IdGenerator
from octollm.concurrency import BackgroundLoop, LoopLogger, TaskDeadline, retry_outage, wait_for_event
from octollm.contracts.events import Event
from octollm.contracts.subscriptions import AckId, EventSelector, SubscriptionSpec
from octollm.errors import OctoError
from octollm.events.deliveries import DeliveryStore, FailureOutcome
from octollm.events.handlers import (
    DeliveryPolicy,
    Handler,
    QueuedDelivery,
    RejectDelivery,
    RetryDelivery,
    describe_failure,
)
from octollm.events.leases import LeaseStore, Membership
from octollm.events.log import EventLog
from octollm.events.log_tail import LogTail
from octollm.events.partition_queues import PartitionQueues, SubjectRetry
from octollm.events.pull import PullConsumers
from octollm.events.reader import LogReader
from octollm.events.subscriptions import Start, SubscriptionStore
from octollm.events.suspects import ENDED_REASON, LEAST_DEATHS, Isolation
from octollm.resilience import Backoff
from octollm.storage import Database

LOOP_BACKOFF = Backoff(0.1, 5.0)
"""Pauses while the database is away."""
MAX_LETTERS = 100
"""Dead letters that are retried in one round."""
SAVE_ALL_SECONDS = 0.25
"""How often the positions of partitions without an event are saved."""


class DurableSubscription:
    """Async iterator over the events of a durable subscription, within ``async with``.

    An event is acknowledged when the loop asks for the next one, or when the block ends without an exception. An
    exception in the block counts as a failed attempt: the event comes again after a pause, and the other subjects go
    on. :meth:`run` handles several subjects at a time.
    """

    def __init__(
        self,
        context: DurableSubscriptions,
        name: str,
        spec: SubscriptionSpec,
        *,
        tenant: str,
        event_tenant: str | None,
        start: Start = "latest",
        policy: DeliveryPolicy | None = None,
    ) -> None:
        self._context = context
        self.name = name
        self._spec = spec
        self._tenant = tenant
        self._start: Start = start
        self._policy = policy or DeliveryPolicy()
        self.consumer = context.ids.hex()
        """The id of this consumer in the group."""
        self._id = ""
        self._revision = 0
        self._group: Hashable = None
        self._renewed_at = 0.0
        self._renew_wakeup = asyncio.Event()
        self._leased_until = 0.0
        self._queues = PartitionQueues(context.clock, context.isolation)
        self._dirty = asyncio.Event()
        self._saved_all_at = 0.0
        self._available = asyncio.Event()
        self._reader = LogReader(
            context.log,
            context.tail,
            self._queues,
            self._policy,
            selector=EventSelector(spec),
            event_tenant=event_tenant,
            on_ready=self._available.set,
            on_gap=self._on_gap,
        )
        # One waits for an event and the other handlers for their turn: an event wakes one of them, not all.
        self._taking = asyncio.Lock()
        self._retry_wakeup = asyncio.Event()
        self._current: QueuedDelivery | None = None
        self._crash: BaseException | None = None
        self._log = context.logger
        self._loops = (
            self._make_loop("lease", self._renew_round),
            self._make_loop("reader", self._reader.read_round),
            self._make_loop("acknowledgements", self._save_round),
            self._make_loop("retries", self._retry_round),
        )
        self._remove_listener: Callable[[], None] | None = None

    def _make_loop(self, name: str, work: Callable[[], Awaitable[None]]) -> BackgroundLoop:
        name = f"{name} of subscription {self.name}"
        return BackgroundLoop(name, work, backoff=LOOP_BACKOFF, log=self._log, on_crash=self._on_crash)

    @property
    def degraded(self) -> str | None:
        """Return why no events are delivered now; ``None`` while they are."""
        return " ".join(filter(None, (loop.failure for loop in self._loops))) or None

    @property
    def held_partitions(self) -> frozenset[int]:
        """Return the partitions that this consumer holds."""
        return frozenset(self._queues.partitions)

    async def __aenter__(self) -> DurableSubscription:
        """Create or update the subscription and join its group; wait for the database while it is away."""
        await retry_outage(self._join, LOOP_BACKOFF, name=f"opening of subscription {self.name}", log=self._log)
        self._remove_listener = self._context.tail.on_batch(self._reader.wakeup.set)
        for loop in self._loops:
            loop.start()
        return self

    async def _join(self) -> None:
        put, tenant = self._context.subscriptions.put, self._reader.event_tenant
        self._id = await put(self._tenant, self.name, self._spec, event_tenant=tenant, start=self._start)
        await self._renew()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Settle the event in hand, save the acknowledgements and leave the group, so that others take over at once."""
        if self._remove_listener is not None:
            self._remove_listener()
        try:
            if self._current is not None and error is None:
                await self.ack(self._current)
            elif self._current is not None and isinstance(error, Exception):
                await self.nack(self._current, error)
        finally:
            for loop in self._loops:
                await loop.aclose()
            # What cannot be saved now is delivered again, after the lease at the latest.
            with contextlib.suppress(OctoError):
                await self._save()
                await self._context.leases.leave(self._id, self.consumer)
            for ack in tuple(self._queues.guarded):
                self._queues.unguard(ack)
        self._raise_if_crashed()

    def __aiter__(self) -> DurableSubscription:
        """Return itself."""
        return self

    async def __anext__(self) -> Event:
        """Acknowledge the last event, and return the next; wait without a limit."""
        if self._current is not None:
            current, self._current = self._current, None
            await self.ack(current)
        self._current = await self.take()
        return self._current.event

    async def run(self, handler: Handler, *, concurrency: int = 16) -> None:
        """Handle events until cancelled, up to ``concurrency`` at a time and each subject's one after the other.

        A handler that returns acknowledges. One that raises :class:`RetryDelivery` or :class:`RejectDelivery` says what
        becomes of the event; any other exception, and one that takes longer than ``handler_timeout``, is a failed
        attempt.
        """
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(self._work(handler))

    async def _work(self, handler: Handler) -> None:
        with contextlib.closing(TaskDeadline(self._policy.handler_timeout)) as deadline:
            while True:
                await self._handle_next(handler, deadline)

    async def _handle_next(self, handler: Handler, deadline: TaskDeadline) -> None:
        delivery = await self.take()
        try:
            try:
                with deadline:
                    await handler(delivery)
            except Exception as error:
                await self.nack(delivery, error)
            else:
                await self.ack(delivery)
        except BaseException:
            # Cancelled: the event is neither handled nor failed.
            self.give_back(delivery)
            raise

    async def take(self) -> QueuedDelivery:
        """Return the next delivery, which :meth:`ack`, :meth:`nack` or :meth:`give_back` has to end; wait for it."""
        while True:
            delivery = await self._next()
            if not self._queues.guarded or await self._guard(delivery):
                return delivery

    async def _next(self) -> QueuedDelivery:
        # Without the lock while there are events: it would pass from handler to handler with each.
        if (delivery := self._pop()) is not None:
            return delivery
        async with self._taking:
            while (delivery := self._pop()) is None:
                self._available.clear()
                await wait_for_event(self._available, self._policy.poll, clear=False)
            return delivery

    def _pop(self) -> QueuedDelivery | None:
        self._raise_if_crashed()
        if self._context.clock.monotonic() >= self._leased_until or (delivery := self._queues.pop()) is None:
            return None
        if self._queues.size < self._policy.buffer // 2:
            self._reader.wakeup.set()
        return delivery

    async def _guard(self, delivery: QueuedDelivery) -> bool:
        """Record that an event of a partition in careful mode is in hand; return whether to hand it over."""
        ack = delivery.ack
        if (deaths := self._queues.guarded.get(ack)) is None:
            return True
        try:
            if deaths >= max(LEAST_DEATHS, self._spec.max_attempts):
                await self._fail(delivery, RejectDelivery(ENDED_REASON), deaths=deaths)
                return False
            if await self._save_suspects(ack.partition):
                return True
            self.give_back(delivery)
        except OctoError as error:
            self._log.warning("delivery.not_recorded", subscription=self.name, seq=ack.seq, error=error)
            self._queues.fail(ack, delivery.event, FailureOutcome("blocked", seconds=LOOP_BACKOFF.first))
            self._queues.unguard(ack)
        except BaseException:
            self.give_back(delivery)
            raise
        return False

    async def _save_suspects(self, number: int) -> bool:
        found = self._queues.describe_suspects(number)
        if found is not None and await self._context.leases.save_suspects(self._id, self.consumer, *found):
            return True
        self._queues.drop(number)
        return False

    async def _unguard(self, ack: AckId) -> None:
        """End a delivery that was handed over in careful mode."""
        if (deaths := self._queues.guarded.get(ack)) is None:
            return
        try:
            # Before another suspect may end the process: this one would be counted with it.
            if self._queues.absolve(ack) or deaths:
                await self._save_suspects(ack.partition)
                self._queues.end_careful(ack.partition)
        except OctoError as error:
            self._log.warning("delivery.not_recorded", subscription=self.name, seq=ack.seq, error=error)
        finally:
            self._queues.unguard(ack)

    def _on_gap(self, error: OctoError) -> None:
        # The partitions are claimed again, from their positions in SQL. The claim records and skips the gap.
        self._log.warning("subscription.gap", subscription=self.name, error=error)
        self._queues.keep(())
        self._group = None
        self._renew_wakeup.set()

    def _on_crash(self, error: BaseException) -> None:
        self._crash = error
        self._available.set()

    def _raise_if_crashed(self) -> None:
        # Looked at for each event, so not in four tasks.
        if self._crash is not None:
            raise self._crash

    async def ack(self, delivery: QueuedDelivery) -> None:
        """Acknowledge a delivery: its event is not delivered again once this is saved."""
        ack = delivery.ack
        if ack.kind == "log":
            self._dirty.set()
            ready = self._queues.settle(ack)
        else:
            await self._resolve(delivery.event, ack)
            ready = True
        if self._queues.guarded:
            await self._unguard(ack)
        if ready:
            self._available.set()

    async def _resolve(self, event: Event, ack: AckId) -> None:
        subject = (event.tenant, event.subject)
        try:
            state = await self._context.deliveries.resolve(self._id, self.consumer, ack, subject, self._reader.selector)
        except OctoError as error:
            # Not recorded, so it comes again.
            self._log.warning("delivery.not_recorded", subscription=self.name, seq=event.seq, error=error)
            self._queues.fail(ack, event, FailureOutcome("blocked", seconds=LOOP_BACKOFF.first))
        else:
            self._queues.resolved(ack, state)
        self._retry_wakeup.set()

    async def nack(self, delivery: QueuedDelivery, error: Exception) -> None:
        """Record that a delivery failed: it is retried after a pause, or becomes a dead letter."""
        await self._fail(delivery, error)

    async def _fail(self, delivery: QueuedDelivery, error: Exception, *, deaths: int = 0) -> None:
        ack = delivery.ack
        try:
            outcome = await self._context.deliveries.fail(
                self._id,
                self.consumer,
                ack,
                delivery.event,
                spec=self._spec,
                selector=self._reader.selector,
                reason=describe_failure(error),
                retry_after=error.after if isinstance(error, RetryDelivery) else None,
                final=isinstance(error, RejectDelivery),
                deaths=deaths,
            )
        except OctoError as failure:
            # Without a record the event is delivered again, as after a crash.
            self._log.warning("delivery.not_recorded", subscription=self.name, seq=delivery.event.seq, error=failure)
            outcome = FailureOutcome("blocked", seconds=self._spec.retry_first)
        self._log.warning(
            "delivery.failed",
            subscription=self.name,
            seq=delivery.event.seq,
            attempt=delivery.attempt,
            outcome=outcome.kind,
            error=error,
        )
        self._queues.fail(ack, delivery.event, outcome)
        if outcome.kind == "blocked":
            self._queues.unguard(ack)  # it comes again, and what is known of it stays
        elif self._queues.guarded:
            await self._unguard(ack)
        self._retry_wakeup.set()
        self._available.set()

    def give_back(self, delivery: QueuedDelivery) -> None:
        """End a delivery without an outcome: its event is the next one of its subject again."""
        self._queues.give_back(delivery)
        self._queues.unguard(delivery.ack)
        self._retry_wakeup.set()
        self._available.set()

    async def _retry_round(self) -> None:
        """Queue the events of delayed subjects that are due."""
        for delayed in self._queues.due_subjects():
            event = await self._context.deliveries.read_subject(delayed.state, self._reader.selector)
            if event is not None:
                self._queues.queue_subject(delayed, event)
                self._available.set()
            else:
                await self._end_delay(delayed)
        await wait_for_event(self._retry_wakeup, self._queues.seconds_to_retry(self._policy.poll))

    async def _end_delay(self, delayed: SubjectRetry) -> None:
        """End the delay of a subject whose events are gone from the log, or no longer selected."""
        state = delayed.state
        partition = self._queues.partitions.get(state.partition)
        if partition is not None:
            ack = AckId("subject", partition.number, partition.fence, state.handled, state.handled)
            subject = (state.tenant, state.subject)
            ended = await self._context.deliveries.resolve(self._id, self.consumer, ack, subject, self._reader.selector)
            self._queues.resolved(ack, ended)

    async def _renew_round(self) -> None:
        # At the same moments for all the subscriptions of a process, which then renew in one transaction.
        interval = self._policy.renew
        due = (self._renewed_at // interval + 1) * interval
        await wait_for_event(self._renew_wakeup, due - self._context.clock.monotonic())
        await self._renew()

    async def _renew(self) -> None:
        """Renew the lease, and take and give partitions as consumers come and go."""
        # Read before the statement, so that the lease in the database always ends later than this consumer assumes.
        started = self._context.clock.monotonic()
        group = await self._context.leases.renew(self._id, self.consumer, self._policy.lease)
        if group is None or group != self._group:
            membership = await self._context.leases.join(self._id, self.consumer, self._policy.lease)
            await self._apply(membership)
            self._group = membership.group
        self._renewed_at = started
        # A process that was stopped may find after its lease that nobody took its partitions: they are its own still,
        # under the same fence.
        self._leased_until = started + self._policy.usable_lease
        self._dirty.set()
        self._available.set()
        if any(delayed.state.through is not None for delayed in self._queues.delayed.values()):
            await self._context.deliveries.forget_finished(self._id)

    async def _apply(self, membership: Membership) -> None:
        queues = self._queues
        queues.keep(membership.leases.values())
        changed = membership.revision != self._revision
        if changed:
            self._spec = membership.spec
            self._reader.selector = EventSelector(membership.spec)
            self._reader.event_tenant = membership.event_tenant
        new = [lease for number, lease in membership.leases.items() if number not in queues.partitions]
        wanted = set(membership.leases) if changed else {lease.partition for lease in new}
        if wanted:
            # Before the partitions are added, since events of delayed subjects have to wait.
            for state in await self._context.deliveries.load_delayed(self._id, wanted):
                known = queues.delayed.get((state.tenant, state.subject))
                if known is None or not known.busy:
                    queues.remember(state)
        if new:
            queues.claim(new)
            self._reader.wakeup.set()
        queues.leave(membership.surplus)
        if wanted:
            for letter, event, attempts in await self._context.deliveries.due_letters(self._id, wanted, MAX_LETTERS):
                queues.queue_letter(letter, event, attempts)
        self._revision = membership.revision

    async def _save_round(self) -> None:
        """Save what was acknowledged at once, and the positions of partitions without an event now and then.

        Every event moves those too: saved with each, they would be 64 rows to write instead of one.
        """
        due_in = self._saved_all_at + SAVE_ALL_SECONDS - self._context.clock.monotonic()
        if not self._dirty.is_set() and due_in > 0 and self._queues.moved():
            await wait_for_event(self._dirty, due_in, clear=False)
        elif due_in > 0 or not self._queues.moved():
            await self._dirty.wait()
        self._dirty.clear()
        await self._save(every=due_in <= 0)
        await asyncio.sleep(self._policy.ack_interval)

    async def _save(self, *, every: bool = True) -> None:
        """Save the positions that moved, and give up partitions beyond this consumer's share."""
        if every:
            self._saved_all_at = self._context.clock.monotonic()
        if moved := self._queues.moved(handled=not every):
            held = await self._context.leases.settle(self._id, self.consumer, moved)
            self._queues.saved(moved, held)
        if given := self._queues.released():
            await self._context.leases.release(self._id, self.consumer, given)
            for number in given:
                self._queues.drop(number)


@dataclass(frozen=True, slots=True)
class DurableSubscriptions:
    """Opens the durable subscriptions of a process that has the log. They share its connection to Redis."""

    db: Database
    subscriptions: SubscriptionStore
    leases: LeaseStore
    deliveries: DeliveryStore
    log: EventLog
    tail: LogTail
    clock: Clock
    ids: IdGenerator
    logger: LoopLogger
    isolation: Isolation = field(default_factory=Isolation)

    @classmethod
    def build(
        cls, db: Database, log: EventLog, tail: LogTail, clock: Clock, ids: IdGenerator, logger: LoopLogger
    ) -> DurableSubscriptions:
        """Return those of the database that has the log."""
        return cls(
            db, SubscriptionStore(db, clock, ids), LeaseStore(db, log), DeliveryStore(db), log, tail, clock, ids, logger
        )

    @property
    def pull(self) -> PullConsumers:
        """Return what serves consumers in other processes."""
        return PullConsumers(self.db, self.log, self.leases, self.deliveries)

    def open(
        self,
        name: str,
        spec: SubscriptionSpec,
        *,
        tenant: str = "system",
        event_tenant: str | None = None,
        start: Start = "latest",
        policy: DeliveryPolicy | None = None,
    ) -> DurableSubscription:
        """Return the subscription ``name`` of ``tenant``, to be used with ``async with``.

        It is created when there is none, with the events from ``start`` on, and gets ``spec`` when it has another. Its
        events are those of ``event_tenant``, or of every tenant.
        """
        return DurableSubscription(
            self, name, spec, tenant=tenant, event_tenant=event_tenant, start=start, policy=policy
        )
