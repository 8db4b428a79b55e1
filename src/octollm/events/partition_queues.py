"""The queues of a consumer's partitions: which event may be handled now, and up to where all are handled. No I/O."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from octollm.clock import Clock
from octollm.contracts.events import Event
from octollm.contracts.subscriptions import AckId, EventSelector, partition_of
from octollm.events.deliveries import DelayedSubject, FailureOutcome
from octollm.events.handlers import QueuedDelivery
from octollm.events.leases import PartitionLease
from octollm.events.suspects import CAREFUL_EVENTS, Isolation, encode_suspects

SubjectKey = tuple[str, str]
"""Tenant and subject."""


@dataclass(slots=True)
class PartitionQueue:
    """A partition that this consumer holds, and its events in memory."""

    number: int
    fence: int
    settled: int  # every event up to it is handled, or of a delayed subject
    saved: int  # as `settled`, in SQL
    seen: int  # every event up to it was read
    pending: deque[Event] = field(default_factory=deque[Event])
    busy: bool = False
    handled: bool = False  # an event of its own was handled since it was saved
    leaving: bool = False  # it goes to another consumer
    attempts: int = 0  # of an event that stops its partition, because too many subjects are delayed
    blocked_until: float = 0.0
    suspects: dict[int, int] | None = None  # deaths by position, in careful mode
    careful: int = CAREFUL_EVENTS  # events until it ends


@dataclass(slots=True)
class SubjectRetry:
    """A delayed subject in memory; ``due`` is on the monotonic clock."""

    state: DelayedSubject
    due: float
    busy: bool = False


class PartitionQueues:
    """The partitions of one consumer. At most one event of a partition is handled at a time."""

    def __init__(self, clock: Clock, isolation: Isolation) -> None:
        self._clock = clock
        self._isolation = isolation
        self.guarded: dict[AckId, int] = {}
        """Deliveries in hand that are of a partition in careful mode, with the deaths of their events."""
        self.partitions: dict[int, PartitionQueue] = {}
        self.delayed: dict[SubjectKey, SubjectRetry] = {}
        self.position = 0
        """Every event up to it was read."""
        self.size = 0
        """Events in memory that wait for their turn."""
        self._ready: deque[PartitionQueue] = deque()
        self._retries: deque[QueuedDelivery] = deque()
        self._letters: set[int] = set()

    def claim(self, leases: Sequence[PartitionLease]) -> None:
        """Add partitions. The reader goes back to the lowest of their positions; the others skip what they have."""
        self._mark_seen()
        first = min(lease.position for lease in leases)
        self.position = min(self.position, first) if self.partitions else first
        for lease in leases:
            self.partitions[lease.partition] = PartitionQueue(
                lease.partition, lease.fence, lease.position, lease.position, lease.position
            )
            if lease.suspects is not None:
                self.partitions[lease.partition].suspects = dict(lease.suspects)

    def drop(self, number: int) -> None:
        """Forget a partition that another consumer has."""
        partition = self.partitions.pop(number, None)
        if partition is None:
            return
        self.size -= len(partition.pending)
        partition.pending.clear()
        for key, delayed in list(self.delayed.items()):
            if delayed.state.partition == number:
                del self.delayed[key]

    def keep(self, leases: Collection[PartitionLease]) -> None:
        """Drop every partition that is not held under the same fence."""
        held = {(lease.partition, lease.fence) for lease in leases}
        for partition in list(self.partitions.values()):
            if (partition.number, partition.fence) not in held:
                self.drop(partition.number)

    def leave(self, numbers: Iterable[int]) -> None:
        """Deliver nothing more of partitions that go to another consumer; what is being handled ends first."""
        self._mark_seen()
        for number in numbers:
            if (partition := self.partitions.get(number)) is not None:
                partition.leaving = True
                self.size -= len(partition.pending)
                partition.pending.clear()

    def remember(self, state: DelayedSubject) -> None:
        """Take the state of a delayed subject as stored."""
        self.delayed[(state.tenant, state.subject)] = SubjectRetry(state, self._clock.monotonic() + state.due_in)

    def dispatch(self, page: Sequence[Event], end: int, selector: EventSelector, tenant: str | None) -> bool:
        """Put a page of the log into the queues; return whether some event may be handled now.

        ``end`` is the position up to which the log was read, and ``tenant`` whose events are wanted.
        """
        for event in page:
            if (tenant is not None and event.tenant != tenant) or not selector.matches(event):
                continue
            partition = self.partitions.get(partition_of(event.tenant, event.subject))
            if partition is None or event.seq <= partition.seen or partition.leaving:
                continue
            partition.pending.append(event)
            self.size += 1
            if not partition.busy and len(partition.pending) == 1:
                self._ready.append(partition)
        self.position = end
        return bool(self._ready)

    def _mark_seen(self) -> None:
        """Record for every partition how far the reader is; not with each page, which often has one event."""
        for partition in self.partitions.values():
            if partition.seen < self.position and not partition.leaving:
                partition.seen = self.position
                if not partition.busy and not partition.pending:
                    self._set_idle(partition)

    def pop(self) -> QueuedDelivery | None:
        """Return a delivery that may be handled now, if there is one."""
        for _ in range(len(self._retries)):
            delivery = self._retries.popleft()
            if self._take_in_hand(delivery.ack):
                return delivery
            self._retries.append(delivery)
        for _ in range(len(self._ready)):
            partition = self._ready.popleft()
            if partition.busy or partition.leaving or self.partitions.get(partition.number) is not partition:
                continue
            if partition.blocked_until and self._clock.monotonic() < partition.blocked_until:
                self._ready.append(partition)
                continue
            event = self._next_pending(partition)
            if event is None:
                continue
            ack = AckId("log", partition.number, partition.fence, partition.settled, event.seq)
            if partition.suspects is not None and not self._take_in_hand(ack):
                self._put_back(partition, event)
                continue
            partition.busy = True
            return QueuedDelivery(event, ack, partition.attempts + 1)
        return None

    def _take_in_hand(self, ack: AckId) -> bool:
        """Return whether a delivery may be handed over now; in careful mode it is guarded then."""
        partition = self.partitions.get(ack.partition)
        if partition is None or partition.suspects is None:
            return True
        deaths = partition.suspects.get(ack.seq, 0)
        if not self._isolation.enter(suspect=deaths > 0):
            return False
        self.guarded[ack] = partition.suspects[ack.seq] = deaths
        return True

    def describe_suspects(self, number: int) -> tuple[PartitionLease, str | None] | None:
        """Return what is to be saved of a partition in careful mode; ``None`` when another consumer has it."""
        partition = self.partitions.get(number)
        if partition is None or partition.suspects is None:
            return None
        lease = PartitionLease(number, partition.fence, partition.settled)
        if partition.careful <= 0:
            return lease, None
        in_hand = {ack.seq for ack in self.guarded if ack.partition == number}
        return lease, encode_suspects(partition.suspects, in_hand, partition.fence)

    def absolve(self, ack: AckId) -> bool:
        """Record that a guarded delivery was answered; return whether careful mode ends for its partition."""
        partition = self.partitions.get(ack.partition)
        if partition is None or partition.suspects is None or partition.fence != ack.fence:
            return False
        partition.suspects.pop(ack.seq, None)
        partition.careful -= 1
        return partition.careful <= 0

    def end_careful(self, number: int) -> None:
        """End careful mode of a partition."""
        if (partition := self.partitions.get(number)) is not None and partition.careful <= 0:
            partition.suspects = None

    def unguard(self, ack: AckId) -> None:
        """End a guarded delivery, so that others may begin."""
        if (deaths := self.guarded.pop(ack, None)) is not None:
            self._isolation.leave(suspect=deaths > 0)

    def _next_pending(self, partition: PartitionQueue) -> Event | None:
        while partition.pending:
            event = partition.pending.popleft()
            self.size -= 1
            delayed = self.delayed.get((event.tenant, event.subject)) if self.delayed else None
            # The event of a delayed subject is read by its subject once the retry is due.
            if delayed is None or (delayed.state.through is not None and event.seq > delayed.state.through):
                return event
        self._set_idle(partition)
        return None

    def _set_idle(self, partition: PartitionQueue) -> None:
        # Everything that was read of it is handled, or its subject is delayed.
        partition.settled = max(partition.settled, partition.seen)

    def settle(self, ack: AckId) -> bool:
        """Record that an event in its turn was handled, and return whether some event may be handled now.

        For a partition that was lost meanwhile nothing is recorded.
        """
        partition = self.partitions.get(ack.partition)
        if partition is not None and partition.fence == ack.fence:
            partition.settled, partition.handled = ack.seq, True
            self._end_turn(partition)
        return bool(self._ready or self._retries)

    def _end_turn(self, partition: PartitionQueue) -> None:
        partition.busy = False
        partition.attempts, partition.blocked_until = 0, 0.0
        if partition.leaving:
            return
        if partition.pending:
            self._ready.append(partition)
        else:
            self._set_idle(partition)

    def fail(self, ack: AckId, event: Event, outcome: FailureOutcome) -> None:
        """Record what became of an event that failed."""
        if ack.kind == "letter":
            self._letters.discard(ack.after)
            return
        resume_at = self._clock.monotonic() + outcome.seconds
        if ack.kind == "subject" and outcome.kind == "blocked":
            self.retry_at((event.tenant, event.subject), resume_at)
            return
        if outcome.state is not None:
            self.remember(outcome.state)
        partition = self.partitions.get(ack.partition)
        if ack.kind == "subject" or partition is None or partition.fence != ack.fence:
            return
        if outcome.kind == "blocked":
            partition.attempts += 1
            partition.blocked_until = resume_at
            self._put_back(partition, event)
        else:
            partition.settled = partition.saved = max(partition.settled, ack.seq)
            self._end_turn(partition)

    def give_back(self, delivery: QueuedDelivery) -> None:
        """End a delivery without an outcome: its event is the next one of its subject again."""
        ack, event = delivery.ack, delivery.event
        if ack.kind == "letter":
            self._letters.discard(ack.after)
        elif ack.kind == "subject":
            self.retry_at((event.tenant, event.subject), self._clock.monotonic())
        else:
            partition = self.partitions.get(ack.partition)
            if (
                partition is not None
                and partition.fence == ack.fence
                and partition.busy
                and partition.settled < ack.seq
            ):
                self._put_back(partition, event)

    def _put_back(self, partition: PartitionQueue, event: Event) -> None:
        partition.busy = False
        if not partition.leaving:
            partition.pending.appendleft(event)
            self.size += 1
            self._ready.append(partition)

    def retry_at(self, subject: SubjectKey, due: float) -> None:
        """Deliver the event of a delayed subject again at ``due``."""
        if (delayed := self.delayed.get(subject)) is not None:
            delayed.busy, delayed.due = False, due

    def resolved(self, ack: AckId, state: DelayedSubject | None) -> None:
        """Record that a delivery of a delayed subject or of a dead letter was handled."""
        if ack.kind == "letter":
            self._letters.discard(ack.after)
        if state is not None:
            self.remember(state)

    def due_subjects(self) -> list[SubjectRetry]:
        """Return the delayed subjects that are due, and forget those that are over."""
        due: list[SubjectRetry] = []
        now = self._clock.monotonic()
        for key, delayed in list(self.delayed.items()):
            partition = self.partitions.get(delayed.state.partition)
            through = delayed.state.through
            if partition is None or (through is not None and partition.saved >= through):
                del self.delayed[key]
            elif (
                through is None and delayed.due <= now and not (delayed.busy or delayed.state.held or partition.leaving)
            ):
                due.append(delayed)
        return due

    def seconds_to_retry(self, longest: float) -> float:
        """Return the seconds until the next delayed subject is due, at most ``longest``."""
        now = self._clock.monotonic()
        waiting = (d for d in self.delayed.values() if not d.busy and not d.state.held and d.state.through is None)
        return max(0.0, min((d.due - now for d in waiting), default=longest)) if self.delayed else longest

    def queue_subject(self, delayed: SubjectRetry, event: Event) -> None:
        """Queue the event of a delayed subject."""
        state = delayed.state
        partition = self.partitions.get(state.partition)
        # Lost or changed while the event was read.
        if partition is None or self.delayed.get((state.tenant, state.subject)) is not delayed:
            return
        delayed.busy = True
        ack = AckId("subject", partition.number, partition.fence, state.handled, event.seq)
        self._retries.append(QueuedDelivery(event, ack, state.attempts + 1))

    def queue_letter(self, letter: int, event: Event, attempts: int) -> None:
        """Queue a dead letter that somebody wants to be retried."""
        partition = self.partitions.get(partition_of(event.tenant, event.subject))
        if partition is None or letter in self._letters:
            return
        self._letters.add(letter)
        ack = AckId("letter", partition.number, partition.fence, letter, event.seq)
        self._retries.append(QueuedDelivery(event, ack, attempts + 1))

    def moved(self, *, handled: bool = False) -> list[PartitionLease]:
        """Return the partitions whose position is not saved yet, or those of them that ``handled`` an event."""
        self._mark_seen()
        return [
            PartitionLease(p.number, p.fence, p.settled)
            for p in self.partitions.values()
            if p.settled > p.saved and (p.handled or p.leaving or not handled)
        ]

    def saved(self, leases: Sequence[PartitionLease], held: Collection[int]) -> None:
        """Record that positions were saved, except those of partitions that are not ``held`` any more."""
        for lease in leases:
            partition = self.partitions.get(lease.partition)
            if partition is None or partition.fence != lease.fence:
                continue
            if lease.partition in held:
                partition.saved = max(partition.saved, lease.position)
                partition.handled = partition.settled > partition.saved
            else:
                self.drop(lease.partition)

    def released(self) -> list[int]:
        """Return the partitions that can be given up: everything of them is settled and saved."""
        self._mark_seen()
        busy = {delayed.state.partition for delayed in self.delayed.values() if delayed.busy}
        return [
            p.number
            for p in self.partitions.values()
            if p.leaving and not p.busy and p.settled <= p.saved and p.number not in busy
        ]
