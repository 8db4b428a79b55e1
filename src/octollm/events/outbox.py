"""Transactional outbox: publishes each committed event to Redis, at least once and in order.

One replica at a time holds the sequencer's lease. It assigns sequence numbers to committed events and publishes them;
the others stand by and take over when the lease expires.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Literal

import msgspec

from octollm.clock import Clock, IdGenerator
from octollm.concurrency import BackgroundLoop, wait_for_event
from octollm.contracts.events import Event, channel_of
from octollm.errors import OctoError
from octollm.events.log import TASK_PREFIX, EventLog
from octollm.events.pubsub import PubSubListener
from octollm.events.sequencer import Sequencer, SequencerLease
from octollm.resilience import Backoff
from octollm.storage import Database, Transaction
from octollm.storage.keys import RedisKeys
from octollm.storage.redis_protocol import RedisClient

FaultPoint = Literal["acquired", "numbering", "numbered", "publishing", "published", "saved"]
"""The steps between a commit and its publication: the lease was acquired; events are about to get their positions, or
have them; a batch is about to be published, or was; the publish cursor was saved."""
FaultHook = Callable[[FaultPoint], Awaitable[None]]
COMMIT_HINT = b"1"
CURSOR_INTERVAL = 1000
"""Events after which the publish cursor is saved."""
CURSOR_SECONDS = 0.1
"""Seconds after which the publish cursor is saved when it moved by fewer events."""


@dataclass(frozen=True, slots=True)
class OutboxPolicy:
    """Intervals in seconds and batch sizes.

    ``poll`` is the fallback for a lost wake-up. ``batch`` counts events. ``batch_bytes`` bounds the events of one
    publish to Redis, except for a single larger event.
    """

    lease: float = 5.0
    poll: float = 0.2
    backoff_initial: float = 0.1
    backoff_max: float = 5.0
    batch: int = 200
    batch_bytes: int = 1024 * 1024

    @property
    def backoff(self) -> Backoff:
        """Return the pauses while the database or Redis is away."""
        return Backoff(self.backoff_initial, self.backoff_max)


@dataclass(frozen=True, slots=True)
class OutboxHealth:
    """State of the publisher. ``is_leader``: this replica holds the lease; otherwise another may.

    ``degraded`` says what fails now, or ``None``; ``last_sequenced`` and ``last_published`` are positions in the log.
    ``lag_seconds`` is how long there have been events without interruption that are not published.
    """

    is_leader: bool = False
    degraded: str | None = None
    last_sequenced: int = 0
    last_published: int = 0
    lag_seconds: float = 0.0

    @property
    def lag(self) -> int:
        """Return how many events have a position and are not published."""
        return self.last_sequenced - self.last_published


class OutboxPublisher:
    """Sequences and publishes the log's events within ``async with``, while this replica holds the lease.

    One loop sequences and another publishes, so sequencing continues while Redis is down. Both retry an ``OctoError``
    forever and report it in :attr:`health`. Any other exception is a bug: it ends its loop, shows in :attr:`health`,
    and is raised at the end of the ``async with``.

    A replica that does not hold the lease tells the one that does of its commits, over Redis.
    """

    def __init__(
        self,
        db: Database,
        log: EventLog,
        redis: RedisClient,
        clock: Clock,
        ids: IdGenerator,
        *,
        keys: RedisKeys,
        policy: OutboxPolicy | None = None,
        fault_hook: FaultHook | None = None,
    ) -> None:
        """``fault_hook`` is for tests: it is awaited at each step, and may raise or never return."""
        self._log = log
        self._fault_hook = fault_hook
        self._redis = redis
        self._clock = clock
        self._keys = keys
        self._policy = policy or OutboxPolicy()
        self._sequencer = Sequencer(db, holder=ids.hex(), lease_seconds=self._policy.lease)
        self._lease: SequencerLease | None = None
        self._renewed_at = clock.monotonic()
        self._sequence_wakeup = asyncio.Event()
        self._publish_wakeup = asyncio.Event()
        self._position_changed = asyncio.Event()
        # Held while events get their positions, so that batches are announced in order.
        self._numbering = asyncio.Lock()
        # Saves the publisher a read of events that were just sequenced; each with its JSON.
        self._latest_batch: list[tuple[Event, bytes]] = []
        self._saved_cursor = 0  # the publish cursor as stored in SQL
        self._saved_at = clock.monotonic()
        self._sequencing = BackgroundLoop("outbox sequencing", self._sequence_round, backoff=self._policy.backoff)
        self._publishing = BackgroundLoop("outbox publishing", self._publish_round, backoff=self._policy.backoff)
        self._behind_since: float | None = None
        self._announce_wakeup = asyncio.Event()
        # Hints only: without them the poll finds the events. Failures of Redis show in `_publishing`.
        self._announcing = BackgroundLoop("outbox announcing", self._announce, backoff=self._policy.backoff)
        self._listener = PubSubListener(
            "outbox listening", redis, lambda _message: self._sequence_wakeup.set(), channels=(keys.commits,)
        )
        self._remove_listener: Callable[[], None] | None = None

    async def __aenter__(self) -> OutboxPublisher:
        """Start both tasks. Neither the database nor Redis needs to be up yet."""
        self._remove_listener = self._log.attach_publisher(self)
        for loop in (self._sequencing, self._publishing, self._announcing):
            loop.start()
        await self._listener.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop, and release the lease so that another replica takes over at once."""
        remove_listener, self._remove_listener = self._remove_listener, None
        if remove_listener is not None:
            remove_listener()
        # Both loops end before the release, so that the publish cursor in the lease is final. Without the release, for
        # example after `kill -9`, the next holder starts at the last saved cursor and publishes up to CURSOR_INTERVAL
        # events again.
        for loop in (self._publishing, self._sequencing, self._announcing, self._listener):
            await loop.aclose()
        if self._lease is not None:
            lease, self._lease = self._lease, None
            # Otherwise the lease expires by itself; the next holder only waits for that.
            with contextlib.suppress(OctoError):
                await self._sequencer.release(lease.fence, lease.last_published)
        self._raise_if_crashed()

    def wake(self) -> None:
        """Signal new events. The log calls it after each commit in this process of an event without a position."""
        self._sequence_wakeup.set()
        if self._lease is None:
            self._announce_wakeup.set()

    async def _announce(self) -> None:
        """Tell the replica that holds the lease of commits here. Those during the round trip share the next hint."""
        await self._announce_wakeup.wait()
        self._announce_wakeup.clear()
        await self._redis.publish([(self._keys.commits, COMMIT_HINT)])

    async def _reach(self, point: FaultPoint) -> None:
        if self._fault_hook is not None:
            await self._fault_hook(point)

    @property
    def health(self) -> OutboxHealth:
        """Return the current state."""
        degraded = " ".join(filter(None, (self._sequencing.failure, self._publishing.failure))) or None
        if self._lease is None or self._sequencing.crash or self._publishing.crash:
            return OutboxHealth(degraded=degraded)
        behind = 0.0 if self._behind_since is None else self._clock.monotonic() - self._behind_since
        return OutboxHealth(True, degraded, self._lease.last_sequenced, self._lease.last_published, behind)

    def _raise_if_crashed(self) -> None:
        self._sequencing.raise_if_crashed()
        self._publishing.raise_if_crashed()

    async def flush(self, timeout: float) -> bool:
        """Wait until all events committed so far are published; return whether that took at most ``timeout`` seconds.

        It can happen only while this replica holds the lease.
        """
        self.wake()
        try:
            async with asyncio.timeout(timeout):
                while await self._sequencer.has_backlog() or not self._is_all_published():
                    self._raise_if_crashed()
                    await wait_for_event(self._position_changed, self._policy.poll)
        except TimeoutError:
            return False
        return True

    def _is_all_published(self) -> bool:
        return self._lease is not None and self._lease.last_published >= self._lease.last_sequenced

    async def _sequence_round(self) -> None:
        await self._while_leased(self._sequence_once())

    async def _publish_round(self) -> None:
        await self._while_leased(self._publish_once())

    async def _while_leased(self, work: Awaitable[None]) -> None:
        """Wait for ``work``. A lost lease is not a failure: another replica holds it, and this one tries to get it."""
        try:
            await work
        except OctoError as error:
            if error.code != "fence_lost":
                raise
            self._lease = None

    async def _sequence_once(self) -> None:
        """Acquire or renew the lease, sequence one batch, or wait for new events."""
        if self._lease is None:
            acquired = await self._sequencer.acquire()
            if acquired is None:
                await wait_for_event(self._sequence_wakeup, self._policy.poll)
                return
            self._lease, self._renewed_at = acquired, self._clock.monotonic()
            self._saved_cursor = acquired.last_published
            # The last holder may have sequenced events that it did not publish.
            self._publish_wakeup.set()
            await self._reach("acquired")
        lease = self._lease
        woken = self._sequence_wakeup.is_set()
        # Assigning numbers renews the lease too, so an idle publisher must do it now and then. A third of the lease
        # leaves time for two failed attempts.
        due = self._clock.monotonic() - self._renewed_at >= self._policy.lease / 3
        if not woken and not due and not await self._sequencer.has_backlog():
            # The wake-up is not cleared here: only a round that reads the events may do so.
            await wait_for_event(self._sequence_wakeup, self._policy.poll, clear=False)
            return
        self._sequence_wakeup.set()  # so that no transaction takes this turn
        async with self._numbering:
            # Cleared before the read, so that a commit during the read sets it again, and the next round finds the
            # event.
            self._sequence_wakeup.clear()
            # Read before the statement, so that the lease in the database always ends later than this replica assumes.
            started = self._clock.monotonic()
            await self._reach("numbering")
            batch, last_sequenced = await self._sequencer.assign(lease.fence, self._policy.batch)
            self._on_numbered(lease.fence, started, batch, last_sequenced)
        if batch:
            await self._reach("numbered")

    async def number_in(self, tx: Transaction) -> bool:
        """Give the events of ``tx``, which is about to commit, their positions; return whether it did.

        Readers then have them one commit earlier. It never waits: while other events are being numbered, or wait for
        it, those of ``tx`` follow after the commit, many in one statement.
        """
        lease = self._lease
        if lease is None or self._fault_hook is not None or self._sequencing.failure or self._numbering.locked():
            return False
        started = self._clock.monotonic()
        if self._sequence_wakeup.is_set() or started - self._renewed_at >= self._policy.lease / 2:
            return False
        await self._numbering.acquire()
        assigned: tuple[list[Event], int] | None = None

        def end(committed: bool) -> None:
            self._numbering.release()
            if assigned is not None:
                self._sequencer.confirm(lease.fence, assigned[1] if committed else None)
            if committed and assigned is not None:
                self._on_numbered(lease.fence, started, *assigned)

        tx.at_end(end)
        assigned = await self._sequencer.assign_in(tx, lease.fence, self._policy.batch)
        return assigned is not None

    def _on_numbered(self, fence: int, started: float, batch: list[Event], last: int) -> None:
        self._renewed_at = started
        self._advance(fence, last_sequenced=last)
        if batch:
            self._latest_batch = encoded = _encode_events(batch)
            self._publish_wakeup.set()
            self._log.notify_numbered(batch, sum(len(payload) for _event, payload in encoded))
        # A full batch leaves more events behind, for which no further wake-up may come.
        if len(batch) == self._policy.batch:
            self._sequence_wakeup.set()

    async def _publish_once(self) -> None:
        """Publish one batch, or wait for sequenced events."""
        lease = self._lease
        if lease is None or lease.last_published >= lease.last_sequenced:
            if lease is None or lease.last_published <= self._saved_cursor:
                await wait_for_event(self._publish_wakeup, self._policy.poll)
            elif (due_in := self._saved_at + CURSOR_SECONDS - self._clock.monotonic()) > 0:
                await wait_for_event(self._publish_wakeup, due_in)
            else:
                await self._save_cursor(lease)
            return
        # Publish first, then advance: a crash in between repeats events, which subscribers detect by `seq`. The other
        # order would lose them. A holder that lost its lease unnoticed can only repeat events as well, since their
        # numbers were assigned under the fence.
        for messages, last in self._build_messages(await self._read_unpublished(lease.last_published)):
            await self._reach("publishing")
            await self._redis.publish(messages)
            await self._reach("published")
            self._advance(lease.fence, last_published=last)
        if self._lease is not None and self._lease.last_published - self._saved_cursor >= CURSOR_INTERVAL:
            await self._save_cursor(self._lease)

    async def _save_cursor(self, lease: SequencerLease) -> None:
        # Not per batch, which would be a commit beside each that numbers events: after a crash the next holder
        # publishes the events since the cursor once more, which subscribers recognise as duplicates by their ``seq``.
        await self._sequencer.mark_published(lease.fence, lease.last_published)
        self._saved_cursor, self._saved_at = lease.last_published, self._clock.monotonic()
        await self._reach("saved")

    async def _read_unpublished(self, published: int) -> Sequence[tuple[Event, bytes]]:
        """Return the events after a position: the batch just sequenced if it is next, else from the log."""
        # Events reach subscribers without a second read in the normal case. Only after a failure of Redis, or a
        # takeover, does the publisher lag behind the latest batch and read from the log.
        if self._latest_batch and self._latest_batch[0][0].seq == published + 1:
            return self._latest_batch
        return _encode_events(await self._log.read(published, self._policy.batch, tenant=None))

    def _advance(self, fence: int, *, last_sequenced: int = 0, last_published: int = 0) -> None:
        """Raise the positions, unless the lease changed hands meanwhile."""
        lease = self._lease
        if lease is not None and lease.fence == fence:
            self._lease = replace(
                lease,
                last_sequenced=max(lease.last_sequenced, last_sequenced),
                last_published=max(lease.last_published, last_published),
            )
        if self._is_all_published():
            self._behind_since = None
        elif self._behind_since is None:
            self._behind_since = self._clock.monotonic()
        self._position_changed.set()

    def _build_messages(self, batch: Sequence[tuple[Event, bytes]]) -> Iterator[tuple[list[tuple[str, bytes]], int]]:
        """Yield messages in batches of bounded size, each with the last ``seq`` in it."""
        if not batch:
            return
        # Channels without a subscriber are published to as well: PUBSUB NUMSUB counts neither patterns nor the other
        # nodes of a cluster, and a subscriber that arrives between count and publish would miss its first event
        # without noticing a gap. The publishes of a batch share one round trip anyway.
        messages: list[tuple[str, bytes]] = []
        payloads: list[bytes] = []
        size = last = 0
        for event, payload in batch:
            if messages and size + len(payload) > self._policy.batch_bytes:
                yield [(self._keys.log, b"[%b]" % b",".join(payloads)), *messages], last
                messages, payloads, size = [], [], 0
            payloads.append(payload)
            messages.append((self._keys.channel(channel_of(event.event_type)), payload))
            if event.subject.startswith(TASK_PREFIX):
                messages.append((self._keys.watch(event.subject.removeprefix(TASK_PREFIX)), payload))
            size += len(payload)
            last = event.seq
        yield [(self._keys.log, b"[%b]" % b",".join(payloads)), *messages], last


def _encode_events(batch: Sequence[Event]) -> list[tuple[Event, bytes]]:
    return [(event, msgspec.json.encode(event)) for event in batch]
