"""The relay: gives each event its place in the log, then tells Redis, and never loses one in between."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType

import msgspec

from octollm.background import Background, wait_for
from octollm.clock import Clock, Ids
from octollm.contracts.events import Event, channel_of
from octollm.errors import OctoError
from octollm.events.log import TASK_PREFIX, EventLog
from octollm.events.numbering import Claim, Numbering
from octollm.storage import Database
from octollm.storage.keys import Keys
from octollm.storage.redis_protocol import RedisClient

MARK_EVERY = 1000
"""Events after which the cursor is written even under load."""


@dataclass(frozen=True, slots=True)
class RelayPolicy:
    """Times in seconds. ``poll`` is the fallback for a lost wake-up; ``batch`` counts events.

    ``held`` is the pause while a running transaction holds events up: its end wakes nobody.

    ``batch_bytes`` bounds what is sent to Redis at once and so the size of one message on ``octollm:log``, apart
    from a single event that is larger.
    """

    lease: float = 5.0
    poll: float = 0.2
    held: float = 0.02
    backoff_first: float = 0.1
    backoff_most: float = 5.0
    batch: int = 200
    batch_bytes: int = 1024 * 1024

    def backoff(self, failures: int) -> float:
        """Return the pause after that many failures in a row."""
        return min(self.backoff_first * 2 ** min(failures - 1, 16), self.backoff_most)


@dataclass(frozen=True, slots=True)
class RelayHealth:
    """How the relay is. ``holding`` says whether it is this one that works; another replica's may.

    ``degraded`` is what does not work now, or ``None``; ``numbered`` and ``published`` are positions in the log.
    """

    holding: bool = False
    degraded: str | None = None
    numbered: int = 0
    published: int = 0


class Relay:
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
        ids: Ids,
        *,
        keys: Keys,
        policy: RelayPolicy | None = None,
    ) -> None:
        self._log = log
        self._redis = redis
        self._clock = clock
        self._keys = keys
        self._policy = policy or RelayPolicy()
        self._numbering = Numbering(db, holder=ids.hex(), lease_seconds=self._policy.lease)
        self._claim: Claim | None = None
        self._renewed = clock.monotonic()
        self._work = asyncio.Event()
        self._news = asyncio.Event()
        self._moved = asyncio.Condition()
        self._fresh: list[Event] = []  # the latest batch numbered
        self._marked = 0  # the position of the cursor in SQL
        self._troubles: dict[str, str] = {}
        self._background = Background("relay")
        self._unlisten: Callable[[], None] | None = None

    async def __aenter__(self) -> Relay:
        """Start to work."""
        self._unlisten = self._log.on_commit(self.wake)
        self._background.start(self._run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop, and let another replica go on at once."""
        unlisten, self._unlisten = self._unlisten, None
        if unlisten is not None:
            unlisten()
        try:
            await self._background.stop()
        finally:
            if self._claim is not None:
                claim, self._claim = self._claim, None
                try:
                    await self._numbering.release(claim.fence, claim.published)
                except OctoError:
                    # The lease runs out by itself; the next holder only waits for that.
                    self._troubles["database"] = "The lease could not be released."

    def wake(self) -> None:
        """Say that there may be new events. Called by the log after each commit in this process."""
        self._work.set()

    @property
    def health(self) -> RelayHealth:
        """Return how it is now."""
        if (failure := self._background.failure) is not None:
            return RelayHealth(degraded=f"The relay stopped: {type(failure).__name__}.")
        degraded = " ".join(self._troubles[part] for part in sorted(self._troubles)) or None
        if self._claim is None:
            return RelayHealth(degraded=degraded)
        return RelayHealth(True, degraded, self._claim.numbered, self._claim.published)

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
                while await self._numbering.backlog() != "none" or not self._all_published():
                    self._background.check()
                    async with self._moved:
                        try:
                            async with asyncio.timeout(self._policy.poll):
                                await self._moved.wait()
                        except TimeoutError:
                            continue
        except TimeoutError:
            return False
        return True

    def _all_published(self) -> bool:
        return self._claim is not None and self._claim.published >= self._claim.numbered

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._forever("database", self._number), name="relay-number")
            group.create_task(self._forever("redis", self._publish), name="relay-publish")

    async def _forever(self, part: str, work: Callable[[], Awaitable[None]]) -> None:
        """Run one round of ``work`` after another; pause longer and longer while it fails."""
        failures = 0
        while True:
            try:
                await work()
                failures = 0
                self._troubles.pop(part, None)
            except OctoError as error:
                if error.code == "fence_lost":
                    self._claim = None
                    continue
                failures += 1
                self._troubles[part] = error.detail
                await asyncio.sleep(self._policy.backoff(failures))

    async def _number(self) -> None:
        """One round of numbering: claim or renew the lease, number what is there, else wait."""
        if self._claim is None:
            claim = await self._numbering.claim()
            if claim is None:
                await wait_for(self._work, self._policy.poll)
                return
            self._claim, self._renewed, self._marked = claim, self._clock.monotonic(), claim.published
            self._news.set()
        claim = self._claim
        woken = self._work.is_set()
        due = self._clock.monotonic() - self._renewed >= self._policy.lease / 3
        if not woken and not due and (backlog := await self._numbering.backlog()) != "ready":
            pause = self._policy.poll if backlog == "none" else self._policy.held
            await wait_for(self._work, pause, clear=False)
            return
        self._work.clear()
        started = self._clock.monotonic()
        batch, numbered = await self._numbering.number(claim.fence, self._policy.batch)
        self._renewed = started
        await self._advance(claim.fence, numbered=numbered)
        if batch:
            self._fresh = batch
            self._news.set()
        if len(batch) == self._policy.batch:
            self._work.set()

    async def _publish(self) -> None:
        """One round of publishing: tell Redis what it has not taken yet, else wait."""
        claim = self._claim
        if claim is None or claim.published >= claim.numbered:
            await wait_for(self._news, self._policy.poll)
            return
        for messages, last in self._messages(await self._behind(claim.published)):
            await self._redis.publish(messages)
            await self._advance(claim.fence, published=last)
        # The cursor is written when there is a pause: after a crash, what Redis took since comes once more.
        published = self._claim.published if self._claim is not None else 0
        if self._all_published() or published - self._marked >= MARK_EVERY:
            await self._numbering.mark_published(claim.fence, published)
            self._marked = published

    async def _behind(self, published: int) -> Sequence[Event]:
        """Return the events behind a position: those just numbered, if they are next, else from the log."""
        if self._fresh and self._fresh[0].seq == published + 1:
            return self._fresh
        return await self._log.read(published, self._policy.batch, tenant=None)

    async def _advance(self, fence: int, *, numbered: int = 0, published: int = 0) -> None:
        """Raise the positions, if the claim is still the same."""
        claim = self._claim
        if claim is not None and claim.fence == fence:
            self._claim = replace(
                claim, numbered=max(claim.numbered, numbered), published=max(claim.published, published)
            )
        async with self._moved:
            self._moved.notify_all()

    def _messages(self, batch: Sequence[Event]) -> Iterator[tuple[list[tuple[str, bytes]], int]]:
        """Give what to publish, in portions of bounded size, with the last ``seq`` of each."""
        if not batch:
            return
        messages: list[tuple[str, bytes]] = []
        whole: list[bytes] = []
        size = last = 0
        for event in batch:
            payload = msgspec.json.encode(event)
            if whole and size + len(payload) > self._policy.batch_bytes:
                yield [*messages, (self._keys.log, _array(whole))], last
                messages, whole, size = [], [], 0
            messages.append((self._keys.channel(channel_of(event.event_type)), payload))
            if event.subject.startswith(TASK_PREFIX):
                messages.append((self._keys.watch(event.subject.removeprefix(TASK_PREFIX)), payload))
            whole.append(payload)
            size += len(payload)
            last = event.seq
        yield [*messages, (self._keys.log, _array(whole))], last


def _array(parts: Sequence[bytes]) -> bytes:
    return b"[" + b",".join(parts) + b"]"
