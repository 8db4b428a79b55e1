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

import msgspec

from octollm.clock import Clock, IdGenerator
from octollm.concurrency import BackgroundLoop, wait_for_event
from octollm.contracts.events import Event, channel_of
from octollm.errors import OctoError
from octollm.events.log import TASK_PREFIX, EventLog
from octollm.events.sequencer import Sequencer, SequencerLease
from octollm.resilience import Backoff
from octollm.storage import Database
from octollm.storage.keys import RedisKeys
from octollm.storage.redis_protocol import RedisClient

CURSOR_INTERVAL = 1000
"""Events after which the publish cursor is saved even under load."""


@dataclass(frozen=True, slots=True)
class OutboxPolicy:
    """Intervals in seconds and batch sizes.

    ``poll`` is the fallback for a lost wake-up. ``blocked_pause`` applies while a running transaction blocks events
    before the commit horizon: its end sends no wake-up. ``batch`` counts events. ``batch_bytes`` bounds the events
    of one publish to Redis, except for a single larger event.
    """

    lease: float = 5.0
    poll: float = 0.2
    blocked_pause: float = 0.02
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
    """

    is_leader: bool = False
    degraded: str | None = None
    last_sequenced: int = 0
    last_published: int = 0


class OutboxPublisher:
    """Sequences and publishes the log's events within ``async with``, while this replica holds the lease.

    One loop sequences and another publishes, so sequencing continues while Redis is down. Both retry an ``OctoError``
    forever and report it in :attr:`health`. Any other exception is a bug: it ends its loop, shows in :attr:`health`,
    and is raised at the end of the ``async with``.
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
    ) -> None:
        self._log = log
        self._redis = redis
        self._clock = clock
        self._keys = keys
        self._policy = policy or OutboxPolicy()
        self._sequencer = Sequencer(db, holder=ids.hex(), lease_seconds=self._policy.lease)
        self._lease: SequencerLease | None = None
        self._renewed_at = clock.monotonic()
        self._sequence_wakeup = asyncio.Event()
        self._publish_wakeup = asyncio.Event()
        self._position_changed = asyncio.Condition()
        self._latest_batch: list[Event] = []  # saves the publisher a read of events that were just sequenced
        self._saved_cursor = 0  # the publish cursor as stored in SQL
        self._sequencing = BackgroundLoop("outbox sequencing", self._sequence_round, backoff=self._policy.backoff)
        self._publishing = BackgroundLoop("outbox publishing", self._publish_round, backoff=self._policy.backoff)
        self._remove_listener: Callable[[], None] | None = None

    async def __aenter__(self) -> OutboxPublisher:
        """Start both tasks. Neither the database nor Redis needs to be up yet."""
        self._remove_listener = self._log.on_commit(self.wake)
        self._sequencing.start()
        self._publishing.start()
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
        await self._publishing.aclose()
        await self._sequencing.aclose()
        if self._lease is not None:
            lease, self._lease = self._lease, None
            # Otherwise the lease expires by itself; the next holder only waits for that.
            with contextlib.suppress(OctoError):
                await self._sequencer.release(lease.fence, lease.last_published)
        self._raise_if_crashed()

    def wake(self) -> None:
        """Signal new events. The log calls it after each commit of an event in this process."""
        self._sequence_wakeup.set()

    @property
    def health(self) -> OutboxHealth:
        """Return the current state."""
        degraded = " ".join(filter(None, (self._sequencing.failure, self._publishing.failure))) or None
        if self._lease is None or self._sequencing.crash or self._publishing.crash:
            return OutboxHealth(degraded=degraded)
        return OutboxHealth(True, degraded, self._lease.last_sequenced, self._lease.last_published)

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
                while await self._sequencer.backlog() != "none" or not self._is_all_published():
                    self._raise_if_crashed()
                    async with self._position_changed:
                        try:
                            async with asyncio.timeout(self._policy.poll):
                                await self._position_changed.wait()
                        except TimeoutError:
                            continue
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
        lease = self._lease
        woken = self._sequence_wakeup.is_set()
        # Assigning numbers renews the lease too, so an idle publisher must do it now and then. A third of the lease
        # leaves time for two failed attempts.
        due = self._clock.monotonic() - self._renewed_at >= self._policy.lease / 3
        if not woken and not due and (backlog := await self._sequencer.backlog()) != "ready":
            # The wake-up is not cleared here: only a round that reads the events may do so.
            pause = self._policy.poll if backlog == "none" else self._policy.blocked_pause
            await wait_for_event(self._sequence_wakeup, pause, clear=False)
            return
        # Cleared before the read, so that a commit during the read sets it again, and the next round finds the event.
        self._sequence_wakeup.clear()
        # Read before the statement, so that the lease in the database always ends later than this replica assumes.
        started = self._clock.monotonic()
        batch, last_sequenced = await self._sequencer.assign(lease.fence, self._policy.batch)
        self._renewed_at = started
        await self._advance(lease.fence, last_sequenced=last_sequenced)
        if batch:
            self._latest_batch = batch
            self._publish_wakeup.set()
        # A full batch leaves more events behind, for which no further wake-up may come.
        if len(batch) == self._policy.batch:
            self._sequence_wakeup.set()

    async def _publish_once(self) -> None:
        """Publish one batch, or wait for sequenced events."""
        lease = self._lease
        if lease is None or lease.last_published >= lease.last_sequenced:
            await wait_for_event(self._publish_wakeup, self._policy.poll)
            return
        # Publish first, then advance: a crash in between repeats events, which subscribers detect by `seq`. The other
        # order would lose them. A holder that lost its lease unnoticed can only repeat events as well, since their
        # numbers were assigned under the fence.
        for messages, last in self._build_messages(await self._read_unpublished(lease.last_published)):
            await self._redis.publish(messages)
            await self._advance(lease.fence, last_published=last)
        # The cursor is saved when the backlog is empty, not per batch: after a crash the next holder publishes the
        # events since the cursor once more, which subscribers recognise as duplicates by their ``seq``.
        published = self._lease.last_published if self._lease is not None else 0
        if self._is_all_published() or published - self._saved_cursor >= CURSOR_INTERVAL:
            await self._sequencer.mark_published(lease.fence, published)
            self._saved_cursor = published

    async def _read_unpublished(self, published: int) -> Sequence[Event]:
        """Return the events after a position: the batch just sequenced if it is next, else from the log."""
        # Events reach subscribers without a second read in the normal case. Only after a failure of Redis, or a
        # takeover, does the publisher lag behind the latest batch and read from the log.
        if self._latest_batch and self._latest_batch[0].seq == published + 1:
            return self._latest_batch
        return await self._log.read(published, self._policy.batch, tenant=None)

    async def _advance(self, fence: int, *, last_sequenced: int = 0, last_published: int = 0) -> None:
        """Raise the positions, unless the lease changed hands meanwhile."""
        lease = self._lease
        if lease is not None and lease.fence == fence:
            self._lease = replace(
                lease,
                last_sequenced=max(lease.last_sequenced, last_sequenced),
                last_published=max(lease.last_published, last_published),
            )
        async with self._position_changed:
            self._position_changed.notify_all()

    def _build_messages(self, batch: Sequence[Event]) -> Iterator[tuple[list[tuple[str, bytes]], int]]:
        """Yield messages in batches of bounded size, each with the last ``seq`` in it."""
        if not batch:
            return
        # Channels without a subscriber are published to as well: PUBSUB NUMSUB counts neither patterns nor the other
        # nodes of a cluster, and a subscriber that arrives between count and publish would miss its first event
        # without noticing a gap. The publishes of a batch share one round trip anyway.
        messages: list[tuple[str, bytes]] = []
        size = last = 0
        for event in batch:
            payload = msgspec.json.encode(event)
            if messages and size + len(payload) > self._policy.batch_bytes:
                yield messages, last
                messages, size = [], 0
            messages.append((self._keys.channel(channel_of(event.event_type)), payload))
            if event.subject.startswith(TASK_PREFIX):
                messages.append((self._keys.watch(event.subject.removeprefix(TASK_PREFIX)), payload))
            size += len(payload)
            last = event.seq
        yield messages, last
