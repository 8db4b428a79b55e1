"""The concurrency limiter: bounds, order of arrival, deadlines in the queue, cancellation at any moment."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octollm.errors import OctoError
from octollm.limiter import ConcurrencyLimiter, ConcurrencyPolicy, QueueOutcome, Refusal


@given(running=st.integers(0, 5), queued=st.integers(0, 5), concurrent=st.integers(1, 5), size=st.integers(0, 5))
def test_an_admission_keeps_both_bounds_and_the_order(running: int, queued: int, concurrent: int, size: int) -> None:
    admission = ConcurrencyPolicy(concurrent, size, 1.0).admit(running, queued)
    if admission == "start":
        assert running < concurrent
        assert queued == 0
    elif admission == "queue":
        assert queued < size
        assert running >= concurrent or queued > 0
    else:
        assert queued >= size


@given(remaining=st.floats(-10, 100) | st.just(math.inf), max_wait=st.floats(0, 50))
def test_a_wait_ends_with_the_policy_or_with_the_deadline_of_the_caller(remaining: float, max_wait: float) -> None:
    seconds, refusal = ConcurrencyPolicy(1, 1, max_wait).limit_wait(remaining)
    assert 0 <= seconds <= max_wait
    assert seconds <= max(0.0, remaining)
    assert refusal == ("deadline_exceeded" if remaining < max_wait else "wait_expired")


@pytest.mark.parametrize("bounds", [(0, 1, 1.0), (1, -1, 1.0), (1, 1, math.inf), (1, 1, -1.0), (1, 1, math.nan)])
def test_a_policy_that_admits_nobody_or_waits_for_ever_is_refused(bounds: tuple[int, int, float]) -> None:
    with pytest.raises(ValueError, match="admits nobody"):
        ConcurrencyPolicy(*bounds)


class Callers:
    """Tasks that use a limiter, and what happened to each, by number."""

    def __init__(self, limiter: ConcurrencyLimiter) -> None:
        self._limiter = limiter
        self.tasks: list[asyncio.Task[None]] = []
        self.admitted: list[int] = []
        self.running: dict[int, asyncio.Event] = {}
        self.refused: list[str] = []

    def start(self, remaining: float) -> None:
        self.tasks.append(asyncio.create_task(self._use(len(self.tasks), remaining)))

    async def _use(self, number: int, remaining: float) -> None:
        try:
            async with self._limiter.slot(remaining):
                self.admitted.append(number)
                self.running[number] = asyncio.Event()
                try:
                    await self.running[number].wait()
                finally:
                    del self.running[number]
        except OctoError as error:
            self.refused.append(error.code)


ACTIONS = ["arrive", "arrive", "arrive_late", "finish", "cancel", "turn", "turn"]
Step = tuple[str, int]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["arrive", "arrive", "arrive_late", "finish", "cancel", "turn", "turn"]), st.integers(0, 9)
    ),
    max_size=60,
)


@given(concurrent=st.integers(1, 3), size=st.integers(0, 3), steps=STEPS)
def test_any_sequence_of_calls_keeps_the_bounds_and_loses_no_slot(
    concurrent: int, size: int, steps: Sequence[Step]
) -> None:
    asyncio.run(check_sequence(concurrent, size, steps))


async def check_sequence(concurrent: int, size: int, steps: Sequence[Step]) -> None:
    outcomes: list[QueueOutcome] = []
    limiter = ConcurrencyLimiter(
        "The test", ConcurrencyPolicy(concurrent, size, 3600.0), on_queued=lambda outcome, _: outcomes.append(outcome)
    )
    callers = Callers(limiter)

    def check() -> None:
        assert len(callers.running) <= limiter.running <= concurrent
        assert limiter.queued <= size
        assert limiter.running == concurrent or limiter.queued == 0
        # Whoever was admitted was so in order of arrival.
        assert callers.admitted == sorted(callers.admitted)

    for action, index in steps:
        open_tasks = [task for task in callers.tasks if not task.done()]
        if action == "arrive":
            callers.start(math.inf)
        elif action == "arrive_late":
            callers.start(0.0)
        elif action == "finish" and callers.running:
            list(callers.running.values())[index % len(callers.running)].set()
        elif action == "cancel" and open_tasks:
            open_tasks[index % len(open_tasks)].cancel()
        elif action == "turn":
            await asyncio.sleep(0)
        check()
    for task in callers.tasks:
        task.cancel()
    await asyncio.gather(*callers.tasks, return_exceptions=True)
    assert (limiter.running, limiter.queued) == (0, 0)
    assert set(callers.refused) <= {"overloaded", "deadline_exceeded"}
    assert outcomes.count("queue_full") == callers.refused.count("overloaded")
    # Every slot is free again.
    assert [limiter.try_acquire() for _ in range(concurrent + 1)] == [True] * concurrent + [False]


async def test_a_slot_passes_to_the_first_in_the_queue_not_to_a_newcomer() -> None:
    limiter = ConcurrencyLimiter("The test", ConcurrencyPolicy(1, 2, 60.0))
    assert limiter.try_acquire()
    waiting = asyncio.create_task(limiter.acquire())
    await asyncio.sleep(0)
    limiter.release()
    # The waiting task has not run yet, but the slot is its own.
    assert not limiter.try_acquire()
    await waiting
    assert (limiter.running, limiter.queued) == (1, 0)


async def test_a_caller_that_is_cancelled_as_it_gets_the_slot_passes_it_on() -> None:
    limiter = ConcurrencyLimiter("The test", ConcurrencyPolicy(1, 2, 60.0))
    assert limiter.try_acquire()
    first, second = (asyncio.create_task(limiter.acquire()) for _ in range(2))
    await asyncio.sleep(0)
    limiter.release()
    first.cancel()
    await second
    with pytest.raises(asyncio.CancelledError):
        await first
    assert (limiter.running, limiter.queued) == (1, 0)


@pytest.mark.parametrize(
    ("policy", "remaining", "code", "outcome"),
    [
        (ConcurrencyPolicy(1, 0, 60.0), math.inf, "overloaded", "queue_full"),
        (ConcurrencyPolicy(1, 1, 0.0), math.inf, "overloaded", "wait_expired"),
        (ConcurrencyPolicy(1, 1, 60.0), 0.0, "deadline_exceeded", "deadline_exceeded"),
    ],
)
async def test_each_refusal_has_its_error_and_is_reported(
    policy: ConcurrencyPolicy, remaining: float, code: str, outcome: str
) -> None:
    reported: list[tuple[str, float]] = []
    limiter = ConcurrencyLimiter(
        "The test", policy, retry_after=5.0, on_queued=lambda *observation: reported.append(observation)
    )
    async with limiter:
        with pytest.raises(OctoError) as caught:
            await limiter.acquire(remaining)
    assert caught.value.code == code
    assert caught.value.retry_after == (5.0 if code == "overloaded" else None)
    [(observed, seconds)] = reported
    assert observed == outcome
    assert seconds >= 0
    assert limiter.running == 0


async def test_the_owner_chooses_the_error() -> None:
    def refuse(refusal: Refusal) -> OctoError:
        return OctoError(refusal, code="rate_limited")

    limiter = ConcurrencyLimiter("The test", ConcurrencyPolicy(1, 0, 0.0), refusal=refuse)
    async with limiter:
        with pytest.raises(OctoError, match="queue_full") as caught:
            async with limiter:
                raise AssertionError("never entered")
    assert caught.value.code == "rate_limited"
