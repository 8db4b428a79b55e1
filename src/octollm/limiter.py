"""The concurrency limiter (bulkhead): bounded concurrency, a bounded fair queue, and a deadline while queued.

Every bound on what runs at once in this process is a :class:`ConcurrencyLimiter`, so that all of them hand slots on in
the same order, survive cancellation in the same way and refuse with the same errors. The decisions are those of
:class:`ConcurrencyPolicy`, which awaits nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

from octollm.errors import OctoError

Admission = Literal["start", "queue", "refuse"]
"""What happens to a newcomer."""
Refusal = Literal["queue_full", "wait_expired", "deadline_exceeded"]
"""Why a caller gets no slot: the queue is full, the longest wait is over, or the caller's own time is."""
QueueOutcome = Literal["admitted", "cancelled", "queue_full", "wait_expired", "deadline_exceeded"]
"""How it ended for a caller that found no free slot."""
OnQueued = Callable[[QueueOutcome, float], None]
"""A metrics hook: called with the outcome and the seconds in the queue, for callers that found no free slot."""


@dataclass(frozen=True, slots=True)
class ConcurrencyPolicy:
    """The bounds of a concurrency limiter. ``max_wait`` is the longest time in the queue, in seconds.

    Raises ``ValueError`` for a policy that admits nobody, or has a wait without end.
    """

    max_concurrent: int
    max_queued: int
    max_wait: float

    def __post_init__(self) -> None:
        if self.max_concurrent < 1 or self.max_queued < 0 or not 0 <= self.max_wait < math.inf:
            raise ValueError(f"{self} admits nobody, or has a wait without end")

    def admit(self, running: int, queued: int) -> Admission:
        """Decide about a newcomer while ``running`` callers hold a slot and ``queued`` ones wait."""
        # Fair: a slot that is free while others wait is theirs.
        if running < self.max_concurrent and not queued:
            return "start"
        return "queue" if queued < self.max_queued else "refuse"

    def limit_wait(self, remaining: float) -> tuple[float, Refusal]:
        """Return the seconds that a caller with ``remaining`` seconds may wait, and the refusal that follows."""
        if remaining < self.max_wait:
            return max(0.0, remaining), "deadline_exceeded"
        return self.max_wait, "wait_expired"


class ConcurrencyLimiter:
    """Bounds how many callers use ``resource`` at once; further ones wait in order of arrival (FIFO).

    A slot that comes free passes to the caller that has waited longest, so nobody overtakes. A caller that is cancelled
    in the queue leaves it; one that is cancelled in the moment it gets the slot passes the slot on.

    ``refusal`` returns the error for a caller that gets no slot. Without it that is ``overloaded`` with ``retry_after``
    seconds, and ``deadline_exceeded`` for a caller whose own time is up. ``on_queued`` is the metrics hook.
    """

    def __init__(
        self,
        resource: str,
        policy: ConcurrencyPolicy,
        *,
        retry_after: float = 1.0,
        refusal: Callable[[Refusal], OctoError] | None = None,
        on_queued: OnQueued | None = None,
    ) -> None:
        self._resource = resource
        self._policy = policy
        self._retry_after = retry_after
        self._refusal = refusal or self._to_overloaded
        self._on_queued = on_queued
        self._running = 0
        self._queue: deque[asyncio.Future[QueueOutcome]] = deque()

    @property
    def running(self) -> int:
        """Return how many callers hold a slot."""
        return self._running

    @property
    def queued(self) -> int:
        """Return how many callers wait for a slot."""
        return len(self._queue)

    async def __aenter__(self) -> None:
        """Take a slot as :meth:`acquire` does."""
        if not self.try_acquire():
            await self.acquire()

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        """Give the slot back."""
        self.release()

    @contextlib.asynccontextmanager
    async def slot(self, remaining: float) -> AsyncGenerator[None]:
        """Hold a slot while the context is open; ``remaining`` is as for :meth:`acquire`."""
        await self.acquire(remaining)
        try:
            yield
        finally:
            self.release()

    def try_acquire(self) -> bool:
        """Take a slot if one is free; never wait."""
        if self._policy.admit(self._running, len(self._queue)) != "start":
            return False
        self._running += 1
        return True

    async def acquire(self, remaining: float = math.inf) -> None:
        """Take a slot, at the latest after ``remaining`` seconds, the caller's own time; :meth:`release` returns it.

        Raises the error of the refusal when the queue is full or the wait is over.
        """
        match self._policy.admit(self._running, len(self._queue)):
            case "start":
                self._running += 1
            case "queue":
                await self._wait_for_slot(remaining)
            case "refuse":
                self._report("queue_full", 0.0)
                raise self._refusal("queue_full")

    def release(self) -> None:
        """Give a slot back: to the caller that has waited longest, if there is one."""
        while self._queue:
            turn = self._queue.popleft()
            # A caller that was just cancelled is in the queue until its own task runs.
            if not turn.done():
                # ``_running`` stays as it is: a slot that never becomes free cannot be taken by a newcomer first.
                turn.set_result("admitted")
                return
        self._running -= 1

    async def _wait_for_slot(self, remaining: float) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        seconds, refusal = self._policy.limit_wait(remaining)
        turn: asyncio.Future[QueueOutcome] = loop.create_future()
        self._queue.append(turn)
        # The timer ends the wait by a result. asyncio.timeout would cancel the task, which others may do as well.
        timer = loop.call_later(seconds, self._expire, turn, refusal)
        outcome: QueueOutcome = "cancelled"
        try:
            outcome = await turn
        except asyncio.CancelledError:
            # The slot was handed over, and the caller was cancelled before it could run: the next one gets the slot.
            if not turn.cancelled() and turn.result() == "admitted":
                self.release()
            raise
        finally:
            timer.cancel()
            if turn.cancelled() and turn in self._queue:
                self._queue.remove(turn)
            self._report(outcome, loop.time() - began)
        if outcome != "admitted":
            raise self._refusal(refusal)

    def _expire(self, turn: asyncio.Future[QueueOutcome], refusal: Refusal) -> None:
        if not turn.done():
            self._queue.remove(turn)
            turn.set_result(refusal)

    def _report(self, outcome: QueueOutcome, seconds: float) -> None:
        if self._on_queued is not None:
            self._on_queued(outcome, seconds)

    def _to_overloaded(self, refusal: Refusal) -> OctoError:
        if refusal == "deadline_exceeded":
            return OctoError("The time limit of this call has expired.", code="deadline_exceeded")
        detail = (
            f"{self._resource} has no slot free, and its queue is full."
            if refusal == "queue_full"
            else f"{self._resource} had no slot free within {self._policy.max_wait:g} s."
        )
        return OctoError(detail, code="overloaded", retry_after=self._retry_after)
