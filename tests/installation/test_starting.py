"""A service waits for what it needs, says for what, and gives up after a bound."""

from __future__ import annotations

import asyncio

import pytest

from octollm.clock import SystemClock
from octollm.errors import OctoError, SettingError
from octollm.installation import service_host as starting
from octollm.installation.service_host import wait_for_dependencies

CLOCK = SystemClock()


@pytest.fixture(autouse=True)
def fast_polling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starting, "POLL_SECONDS", 0.01)


class LateDependency:
    """A dependency that answers after some attempts."""

    def __init__(self, after: int, error: OctoError | None = None) -> None:
        self.left = after
        self.error = error or OctoError("It is away.", code="connect_failed")

    async def __call__(self) -> None:
        self.left -= 1
        if self.left >= 0:
            raise self.error


async def test_it_waits_for_each_and_says_for_what():
    told: list[str] = []
    await wait_for_dependencies(
        {"redis": LateDependency(2), "orchestrator": LateDependency(0)}, clock=CLOCK, timeout=5, on_wait=told.append
    )
    assert told == ["redis: It is away."]


async def test_it_gives_up_after_the_bound_naming_what_is_missing():
    with pytest.raises(OctoError, match=r"Gave up after 0\.05 s .* redis: It is away\.") as caught:
        await wait_for_dependencies(
            {"redis": LateDependency(10_000)}, clock=CLOCK, timeout=0.05, on_wait=lambda _: None
        )
    assert caught.value.code == "unavailable"
    assert "OCTOLLM_STARTUP_TIMEOUT" in caught.value.detail


async def test_a_dependency_that_is_suspended_is_waited_for():
    late = LateDependency(1, OctoError("It did not answer in the 5.0 s that were left.", code="deadline_exceeded"))
    told: list[str] = []
    await wait_for_dependencies({"orchestrator": late}, clock=CLOCK, timeout=5, on_wait=told.append)
    assert told == ["orchestrator: It did not answer in the 5.0 s that were left."]


async def test_what_waiting_cannot_mend_is_said_at_once():
    wrong = LateDependency(1, SettingError("The schema is newer than this version."))
    with pytest.raises(SettingError):
        await wait_for_dependencies({"database": wrong}, clock=CLOCK, timeout=60, on_wait=lambda _: None)


async def test_what_hangs_is_given_up_too():
    async def hangs() -> None:
        await asyncio.Event().wait()

    with pytest.raises(OctoError, match="It does not answer"):
        await wait_for_dependencies({"database": hangs}, clock=CLOCK, timeout=0.05, on_wait=lambda _: None)
