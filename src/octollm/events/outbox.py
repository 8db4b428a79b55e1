"""Transactional outbox: one replica at a time assigns each committed event its sequence number and publishes it to Redis, at least once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType

import msgspec

from octollm.clock import Clock, IdGenerator
from octollm.concurrency import BackgroundTask, wait_for_event
from octollm.contracts.events import Event, channel_of
from octollm.errors import OctoError
from octollm.events.log import TASK_PREFIX, EventLog
from octollm.events.sequencer import Sequencer, SequencerLease
from octollm.storage import Database
from octollm.storage.keys import RedisKeys
from octollm.storage.redis_protocol import RedisClient

CURSOR_INTERVAL = 1000
"""Events after which the cursor is written even under load."""


@dataclass(frozen=True, slots=True)
class OutboxPolicy:
    """Times in seconds. ``poll`` is the fallback for a lost wake-up; ``batch`` counts events.

    ``held`` is the pause while a running transaction holds events up: its end wakes nobody.

    ``batch_bytes`` bounds what is sent to Redis at once and so the size of one message on ``octollm:log``, apart
    from a single event that is larger.
    """

    lease: float = 5.0
    poll: float = 0.2
    blocked_pause: float = 0.02
    backoff_initial: float = 0.1
    backoff_max: float = 5.0
    batch: int = 200
    batch_bytes: int = 1024 * 1024

    def backoff(self, failures: int) -> float:
        """Return the pause after that many failures in a row."""
        return min(self.backoff_initial * 2 ** min(failures - 1, 16), self.backoff_max)


@dataclass(frozen=True, slots=True)
class OutboxHealth:
    """How the relay is. ``holding`` says whether it is this one that works; another replica's may.

    ``degraded`` is what does not work now, or ``None``; ``numbered`` and ``published`` are positions in the log.
    """

    is_leader: bool = False
    degraded: str | None = None
    last_sequenced: int = 0
    last_published: int = 0


class OutboxPublisher:
    """Numbers and publishes the log's events while its ``async with`` lasts, if no other replica does.

    One task numbers, another publishes, so that numbering goes on while Redis is down. Both try again for ever what
    fails with an ``OctoError``, and say so in :attr:`health`; anything else is a fault of the program: it ends the
    relay, shows in :attr:`health`, and is raised by :meth:`wait` and at the end of the ``async with``.
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
        self._latest_batch: list[Event] = []  # the latest batch numbered
        self._saved_cursor = 0  # the position of the cursor in SQL
        self._failures: dict[str, str] = {}
        self._background = BackgroundTask("relay")
        self._remove_listener: Callable[[], None] | None = None

    async def __aenter__(self) -> OutboxPublisher:
        """Start to work."""
        self._remove_listener = self._log.on_commit(self.wake)
        self._background.start(self._run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop, and let another replica go on at once."""
        unlisten, self._remove_listener = self._remove_listener, None
        if unlisten is not None:
            unlisten()
        try:
            await self._background.stop()
        finally:
            if self._lease is not None:
                claim, self._lease = self._lease, None
                try:
                    await self._sequencer.release(claim.fence, claim.last_published)
                except OctoError:
                    # The lease runs out by itself; the next holder only waits for that.
                    self._failures["database"] = "The lease could not be released."

    def wake(self) -> None:
        """Say that there may be new events. Called by the log after each commit in this process."""
        self._sequence_wakeup.set()

    @property
    def health(self) -> OutboxHealth:
        """Return how it is now."""
        if (failure := self._background.failure) is not None:
            return OutboxHealth(degraded=f"The relay stopped: {type(failure).__name__}.")
        degraded = " ".join(self._failures[part] for part in sorted(self._failures)) or None
        if self._lease is None:
            return OutboxHealth(degraded=degraded)
        return OutboxHealth(True, degraded, self._lease.last_sequenced, self._lease.last_published)

    async def wait(self) -> None:
        """Wait until the relay ends, and raise what it died of."""
        await self._background.wait()

    async def flush(self, timeout: float) -> bool:
        """Wait until all events committed before are published; return whether that came within ``timeout`` seconds.

        It can only come while this replica holds the relay.
        """
        self.wake()
        try:
            async with asyncio.timeout(timeout):
                while await self._sequencer.backlog() != "none" or not self._is_all_published():
                    self._background.raise_if_failed()
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

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._retry_forever("database", self._sequence_once), name="relay-number")
            group.create_task(self._retry_forever("redis", self._publish_once), name="relay-publish")

    async def _retry_forever(self, part: str, work: Callable[[], Awaitable[None]]) -> None:
        """Run one round of ``work`` after another; pause longer and longer while it fails."""
        failures = 0
        while True:
            try:
                await work()
                failures = 0
                self._failures.pop(part, None)
            except OctoError as error:
                if error.code == "fence_lost":
                    self._lease = None
                    continue
                failures += 1
                self._failures[part] = error.detail
                await asyncio.sleep(self._policy.backoff(failures))

    async def _sequence_once(self) -> None:
        """One round of numbering: claim or renew the lease, number what is there, else wait."""
        if self._lease is None:
            claim = await self._sequencer.acquire()
            if claim is None:
                await wait_for_event(self._sequence_wakeup, self._policy.poll)
                return
            self._lease, self._renewed_at, self._saved_cursor = claim, self._clock.monotonic(), claim.last_published
            self._publish_wakeup.set()
        claim = self._lease
        woken = self._sequence_wakeup.is_set()
        due = self._clock.monotonic() - self._renewed_at >= self._policy.lease / 3
        if not woken and not due and (backlog := await self._sequencer.backlog()) != "ready":
            pause = self._policy.poll if backlog == "none" else self._policy.blocked_pause
            await wait_for_event(self._sequence_wakeup, pause, clear=False)
            return
        self._sequence_wakeup.clear()
        started = self._clock.monotonic()
        batch, numbered = await self._sequencer.assign(claim.fence, self._policy.batch)
        self._renewed_at = started
        await self._advance(claim.fence, sequenced=numbered)
        if batch:
            self._latest_batch = batch
            self._publish_wakeup.set()
        if len(batch) == self._policy.batch:
            self._sequence_wakeup.set()

    async def _publish_once(self) -> None:
        """One round of publishing: tell Redis what it has not taken yet, else wait."""
        claim = self._lease
        if claim is None or claim.last_published >= claim.last_sequenced:
            await wait_for_event(self._publish_wakeup, self._policy.poll)
            return
        for messages, last in self._build_messages(await self._read_unpublished(claim.last_published)):
            await self._redis.publish(messages)
            await self._advance(claim.fence, published=last)
        # The cursor is written when there is a pause: after a crash, what Redis took since comes once more.
        published = self._lease.last_published if self._lease is not None else 0
        if self._is_all_published() or published - self._saved_cursor >= CURSOR_INTERVAL:
            await self._sequencer.mark_published(claim.fence, published)
            self._saved_cursor = published

    async def _read_unpublished(self, published: int) -> Sequence[Event]:
        """Return the events behind a position: those just numbered, if they are next, else from the log."""
        if self._latest_batch and self._latest_batch[0].seq == published + 1:
            return self._latest_batch
        return await self._log.read(published, self._policy.batch, tenant=None)

    async def _advance(self, fence: int, *, sequenced: int = 0, published: int = 0) -> None:
        """Raise the positions, if the claim is still the same."""
        claim = self._lease
        if claim is not None and claim.fence == fence:
            self._lease = replace(
                claim,
                last_sequenced=max(claim.last_sequenced, sequenced),
                last_published=max(claim.last_published, published),
            )
        async with self._position_changed:
            self._position_changed.notify_all()

    def _build_messages(self, batch: Sequence[Event]) -> Iterator[tuple[list[tuple[str, bytes]], int]]:
        """Give what to publish, in portions of bounded size, with the last ``seq`` of each."""
        if not batch:
            return
        messages: list[tuple[str, bytes]] = []
        whole: list[bytes] = []
        size = last = 0
        for event in batch:
            payload = msgspec.json.encode(event)
            if whole and size + len(payload) > self._policy.batch_bytes:
                yield [*messages, (self._keys.log, _join_json_array(whole))], last
                messages, whole, size = [], [], 0
            messages.append((self._keys.channel(channel_of(event.event_type)), payload))
            if event.subject.startswith(TASK_PREFIX):
                messages.append((self._keys.watch(event.subject.removeprefix(TASK_PREFIX)), payload))
            whole.append(payload)
            size += len(payload)
            last = event.seq
        yield [*messages, (self._keys.log, _join_json_array(whole))], last


def _join_json_array(parts: Sequence[bytes]) -> bytes:
    return b"[" + b",".join(parts) + b"]"
