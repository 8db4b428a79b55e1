"""Each wrong try on a key makes the next wait longer; a right one is never refused for it."""

from __future__ import annotations

import asyncio

import pytest

from octollm.errors import OctoError
from octollm.services.reflex import throttle as guessing_module
from octollm.services.reflex.throttle import FORGET_SECONDS, LONGEST_SECONDS, MAX_WAITING, FailedLoginThrottle
from octollm.testing import ManualClock


def test_the_delay_doubles_up_to_a_bound_and_is_forgotten() -> None:
    clock = ManualClock()
    guessing = FailedLoginThrottle(clock)
    assert guessing.delay("octo_a") == 0
    delays: list[float] = []
    for _ in range(10):
        guessing.record_failure("octo_a")
        delays.append(guessing.delay("octo_a"))
    assert delays[:4] == [0.05, 0.1, 0.2, 0.4]
    assert delays[-1] == LONGEST_SECONDS
    assert guessing.delay("octo_b") == 0, "another key's tries are its own"
    clock.time += FORGET_SECONDS + 1
    assert guessing.delay("octo_a") == 0
    guessing.record_failure("octo_a")
    assert guessing.delay("octo_a") == 0.05


async def test_so_many_wait_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guessing_module, "FIRST_SECONDS", 0.2)
    guessing = FailedLoginThrottle(ManualClock())
    await guessing.wait("octo_a")
    guessing.record_failure("octo_a")
    waiting = [asyncio.create_task(guessing.wait("octo_a")) for _ in range(MAX_WAITING)]
    await asyncio.sleep(0)
    with pytest.raises(OctoError) as caught:
        await guessing.wait("octo_a")
    assert (caught.value.code, caught.value.retry_after) == ("rate_limited", LONGEST_SECONDS)
    await asyncio.gather(*waiting)
    await guessing.wait("octo_a")


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guessing_module, "MAX_KEYS", 3)
    guessing = FailedLoginThrottle(ManualClock())
    for number in range(5):
        guessing.record_failure(f"octo_{number}")
    assert [guessing.delay(f"octo_{number}") > 0 for number in range(5)] == [False, False, True, True, True]
