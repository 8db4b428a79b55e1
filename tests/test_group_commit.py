from __future__ import annotations

import asyncio
import contextvars
import gc
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octollm import group_commit as module
from octollm.errors import OctoError
from octollm.group_commit import GroupCommit
from octollm.testing import wait_until

WHO = contextvars.ContextVar("who", default="nobody")


class Work:
    """Doubles numbers; holds the first batch back until it is let go."""

    def __init__(self, *, hold: bool = True) -> None:
        self.batches: list[list[int]] = []
        self.go = asyncio.Event()
        if not hold:
            self.go.set()

    async def __call__(self, items: Sequence[int]) -> Sequence[int | OctoError]:
        self.batches.append(list(items))
        await self.go.wait()
        return [OctoError("odd") if item % 2 else item * 2 for item in items]


async def test_what_comes_meanwhile_is_done_together_and_each_gets_its_own() -> None:
    work = Work()
    batches: GroupCommit[int, int] = GroupCommit(work, name="numbers")
    waiting = [asyncio.create_task(batches.wait(item)) for item in range(6)]
    await wait_until(lambda: bool(work.batches), description="the first batch runs")
    waiting += [asyncio.create_task(batches.wait(item)) for item in range(6, 9)]
    await asyncio.sleep(0)
    work.go.set()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert [result for result in results if isinstance(result, int)] == [0, 4, 8, 12, 16]
    assert all(isinstance(result, OctoError) for result in results[1::2])
    assert work.batches == [[0, 1, 2, 3, 4, 5], [6, 7, 8]]


async def test_those_that_a_batch_wakes_share_the_next_one() -> None:
    work = Work(hold=False)
    batches: GroupCommit[int, int] = GroupCommit(work, name="numbers")

    async def two_in_turn(item: int) -> None:
        await batches.wait(item)
        await batches.wait(item)

    await asyncio.gather(*(two_in_turn(item) for item in range(0, 12, 2)))
    assert work.batches == [[0, 2, 4, 6, 8, 10]] * 2


@given(st.lists(st.integers(0, 12).map(lambda number: number * 2), max_size=60))
def test_a_batch_weighs_no_more_than_it_may_and_nothing_is_lost(items: list[int]) -> None:
    async def run() -> None:
        work = Work(hold=False)
        batches: GroupCommit[int, int] = GroupCommit(work, name="numbers", weight_of=lambda item: item, max_weight=20)
        assert await asyncio.gather(*map(batches.wait, items)) == [item * 2 for item in items]
        assert [item for batch in work.batches for item in batch] == items
        assert all(len(batch) == 1 or sum(batch) <= 20 for batch in work.batches)

    asyncio.run(run())


async def test_who_leaves_before_is_left_out_and_who_leaves_later_takes_nobody_along() -> None:
    work = Work()
    batches: GroupCommit[int, int] = GroupCommit(work, name="numbers")
    first = asyncio.create_task(batches.wait(2))
    await wait_until(lambda: bool(work.batches), description="the first batch runs")
    gone, second = batches.put(4), batches.put(6)
    gone.cancel()
    first.cancel()
    work.go.set()
    assert await second == 12
    assert work.batches == [[2], [6]]


async def test_what_the_work_raises_everybody_gets() -> None:
    async def fail(_items: Sequence[int]) -> Sequence[int]:
        raise OctoError("away", code="unavailable")

    batches: GroupCommit[int, int] = GroupCommit(fail, name="numbers")
    results = await asyncio.gather(*map(batches.wait, range(3)), return_exceptions=True)
    assert [getattr(result, "code", "") for result in results] == ["unavailable"] * 3


async def test_it_belongs_to_none_of_those_it_works_for() -> None:
    async def who(items: Sequence[int]) -> Sequence[str]:
        return [WHO.get()] * len(items)

    batches: GroupCommit[int, str] = GroupCommit(who, name="names")
    WHO.set("me")
    assert await batches.wait(1) == "nobody"


async def test_what_waits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WAITING", 3)
    batches: GroupCommit[int, int] = GroupCommit(Work(), name="numbers")
    futures = [batches.put(number) for number in range(3)]
    with pytest.raises(OctoError) as caught:
        batches.put(3)
    assert caught.value.code == "overloaded"
    for future in futures:
        future.cancel()


async def test_a_failure_that_comes_after_its_caller_has_left_is_not_logged() -> None:
    logged: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: logged.append(context))
    work = Work()
    batches: GroupCommit[int, int] = GroupCommit(work, name="numbers")
    waiting = asyncio.create_task(batches.wait(1))
    await wait_until(lambda: bool(work.batches), description="the batch runs")
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    work.go.set()
    assert await batches.wait(2) == 4
    gc.collect()
    assert logged == []
