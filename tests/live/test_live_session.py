"""The session of a watcher: order, resume, and that nothing is lost or doubled."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from live_kit import TASK, LiveKit, LossyHints, ReceivedText, Watcher, Writer

from octollm.clock import SystemClock
from octollm.contracts.api import StepTexts, TaskView
from octollm.contracts.stream import TokenFrame
from octollm.errors import OctoError
from octollm.events import Hint
from octollm.live import LiveSession, SessionTiming, parse_resume_position
from octollm.storage import RedisKeys, TextStream, open_redis

QUICK = SessionTiming(retry_interval=0.001, max_text_wait=5.0, max_start_wait=5.0)


def session(kit: Any, tokens: Any, after: int | None = None, offsets: list[str] | None = None) -> LiveSession:
    resume = parse_resume_position(None if after is None else str(after), offsets or [])
    return LiveSession(TASK, kit, tokens, SystemClock(), position=resume, timing=QUICK)


async def watch(kit: Any, tokens: Any, after: int | None = None, offsets: list[str] | None = None) -> Watcher:
    watcher = Watcher()
    watcher.seq = after or 0
    for step, offset in parse_resume_position(None, offsets or []).offsets.items():
        watcher.texts[step] = ReceivedText(offset.attempt, offset.run, 0, "-" * offset.count)
    one = session(kit, tokens, after, offsets)
    await one.open()
    async for frame in one.frames(LossyHints(1)):
        watcher.take(frame)
    return watcher


@pytest.fixture
async def kit() -> AsyncIterator[LiveKit]:
    async with open_redis("memory://live") as redis:
        yield LiveKit(TextStream(redis, RedisKeys()))


async def run_task(kit: LiveKit, chance: random.Random) -> dict[str, str]:
    """Let a task happen; return the text that stood of each step that was completed."""
    standing: dict[str, str] = {}

    async def yield_some() -> None:
        for _ in range(chance.randrange(6)):
            await asyncio.sleep(0)

    async def step(name: str) -> None:
        attempts, run = chance.randint(1, 3), 1
        for attempt in range(1, attempts + 1):
            writer = Writer(kit, name, attempt, run)
            kit.emit("step.started", step=name, title=name, arm="coder", attempt=attempt, run=run)
            for piece in range(chance.randrange(8)):
                await yield_some()
                await writer.write(f"[{name}.{attempt}.{run}.{piece}]" * chance.randint(1, 3))
                event = chance.random()
                if event < 0.1:
                    await writer.void()
                elif event < 0.2:
                    writer.save()
                elif event < 0.25 and not kit.voided:
                    await kit.stream.delete(TASK)
                elif event < 0.3:
                    run += 1
                    kit.emit("step.started", step=name, title=name, arm="coder", attempt=attempt, run=run)
                    writer = Writer(kit, name, attempt, run)
            writer.save()
            await yield_some()
            kit.progress += 5
            if attempt == attempts:
                kit.emit("step.completed", step=name, attempt=attempt, text_length=len(writer.text), score=1.0)
                standing[name] = writer.text[writer.base :]
            else:
                kit.emit("step.failed", step=name, attempt=attempt, reasons=["no"], final=False)
            kit.emit("task.progress", progress=kit.progress)

    kit.emit("task.accepted", goal="a goal", progress=0)
    plan = Writer(kit, "plan", 1, 1)
    for piece in range(3):
        await plan.write(f"plan {piece}")
        await yield_some()
    kit.emit("task.planned", steps=[], progress=5)
    kit.emit("task.started", progress=5)
    kit.progress = 5
    await asyncio.gather(step("a"), step("b"))
    await step("c")
    kit.emit("task.completed", status="completed", duration_ms=1, progress=100)
    return standing


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), mode=st.sampled_from(["whole", "present"]), cuts=st.integers(0, 6))
def test_nothing_is_lost_or_doubled_over_reconnects(seed: int, mode: str, cuts: int) -> None:
    chance = random.Random(seed)

    async def play() -> None:
        async with open_redis("memory://live") as redis:
            kit = LiveKit(TextStream(redis, RedisKeys()))
            running = asyncio.create_task(run_task(kit, chance))
            while not kit.events:
                await asyncio.sleep(0)
            watcher = Watcher()
            after: int | None = 0 if mode == "whole" else None
            for cut in range(cuts + 1):
                limit = chance.randrange(1, 30) if cut < cuts else 10**9
                one = session(kit, kit.stream, after, watcher.offsets)
                await one.open()
                frames = one.frames(LossyHints(chance.randrange(10**6)))
                async for frame in frames:
                    watcher.take(frame)
                    limit -= 1
                    if limit == 0:
                        break
                await frames.aclose()
                after = watcher.seq
            standing = await running
            assert watcher.seq == len(kit.events)
            for step, seen in watcher.completed.items():
                # What the watcher shows ends with what stands, and holds nothing voided besides.
                assert seen.text == standing[step]
            if mode == "whole":
                assert {step for step, text in standing.items() if text} <= set(watcher.completed)

    asyncio.run(play())


async def test_the_present_state_comes_first_and_then_the_running_text_from_the_beginning(kit: LiveKit) -> None:
    kit.emit("task.accepted", goal="a goal", progress=0)
    kit.emit("task.planned", steps=[], progress=5)
    kit.emit("step.started", step="a", title="A", arm="coder", attempt=1, run=1)
    writer = Writer(kit, "a", 1, 1)
    await writer.write("one ")
    await writer.write("two")
    kit.progress = 12.5
    one = session(kit, kit.stream)
    await one.open()
    frames = one.frames(LossyHints(1))
    first = await anext(frames)
    assert (first.type, first.seq, first.progress) == ("status", 3, 12.5)
    assert first.data["status"] == "accepted"
    second = await anext(frames)
    assert isinstance(second, TokenFrame)
    assert (second.step, second.offset, second.reset, second.data) == ("a", 0, True, {"text": "one two"})
    await frames.aclose()


async def test_a_finished_task_is_shown_and_then_its_final_frame(kit: LiveKit) -> None:
    kit.emit("task.accepted", goal="a goal", progress=0)
    kit.emit("task.failed", status="failed", code="not_accepted", reason="no", progress=40)
    one = session(kit, kit.stream)
    await one.open()
    frames = [frame async for frame in one.frames(LossyHints(1))]
    assert [(frame.type, frame.seq) for frame in frames] == [("status", 2), ("error", 2)]


async def test_a_watcher_who_has_the_final_frame_gets_none(kit: LiveKit) -> None:
    kit.emit("task.accepted", goal="a goal", progress=0)
    kit.emit("task.completed", status="completed", duration_ms=1, progress=100)
    assert (await watch(kit, kit.stream, 2)).frames == []
    one = session(kit, kit.stream, 2)
    await one.open()
    assert one.is_finished
    assert (await watch(kit, kit.stream, 999)).frames == []


async def test_the_whole_history_of_a_finished_task_has_the_text_before_the_step_ends(kit: LiveKit) -> None:
    await run_task(kit, random.Random(3))
    watcher = await watch(kit, kit.stream, 0)
    assert watcher.seq == len(kit.events)
    assert watcher.completed


async def test_the_text_is_rebuilt_from_what_was_saved_when_redis_lost_it(kit: LiveKit) -> None:
    kit.emit("task.accepted", goal="a goal", progress=0)
    kit.emit("step.started", step="a", title="A", arm="coder", attempt=1, run=4)
    writer = Writer(kit, "a", 1, 4)
    await writer.write("lost but saved")
    writer.save()
    await kit.stream.delete(TASK)
    kit.emit("step.completed", step="a", attempt=1, text_length=14, score=1.0)
    kit.emit("task.completed", status="completed", duration_ms=1, progress=100)
    watcher = await watch(kit, kit.stream, 2, ["a.1.4.5"])
    tokens = [frame for frame in watcher.frames if isinstance(frame, TokenFrame)]
    assert [(frame.offset, frame.reset, frame.data["text"]) for frame in tokens] == [(5, False, "but saved")]


class SilentHints:
    """Hints that never come."""

    def __aiter__(self) -> SilentHints:
        return self

    async def __anext__(self) -> Hint:
        await asyncio.Event().wait()
        raise AssertionError


class UnavailableStream:
    """A stream whose Redis does not answer."""

    async def read(self, task_id: str, last_id: str = "0") -> Any:
        raise OctoError("Redis does not answer.", code="unavailable")


async def test_without_redis_the_saved_text_is_sent(kit: LiveKit) -> None:
    kit.emit("task.accepted", goal="a goal", progress=0)
    kit.emit("step.started", step="a", title="A", arm="coder", attempt=1, run=1)
    writer = Writer(kit, "a", 1, 1)
    await writer.write("héllo 🐙")
    writer.save()
    kit.emit("step.completed", step="a", attempt=1, text_length=7, score=1.0)
    kit.emit("task.completed", status="completed", duration_ms=1, progress=100)
    watcher = await watch(kit, UnavailableStream(), 0)
    assert watcher.completed["a"].text == "héllo 🐙"


async def test_without_redis_the_session_looks_by_itself(kit: LiveKit) -> None:
    kit.emit("task.accepted", goal="a goal", progress=0)
    kit.emit("step.started", step="a", title="A", arm="coder", attempt=1, run=1)
    one = LiveSession(
        TASK,
        kit,
        UnavailableStream(),
        SystemClock(),
        position=parse_resume_position("0", []),
        timing=SessionTiming(retry_interval=0.001, poll_interval=0.001),
    )
    await one.open()
    frames = one.frames(SilentHints())
    assert [(await anext(frames)).type for _ in range(2)] == ["status", "step"]
    kit.emit("task.cancelled", status="cancelled", progress=0)
    assert [frame.type async for frame in frames] == ["status"]


class FailingLog(LiveKit):
    """A log that fails for a while, and then refuses."""

    failures: list[OctoError] = []  # noqa: RUF012

    async def history(self, after: int, limit: int) -> Any:
        if self.failures:
            raise self.failures.pop(0)
        return await super().history(after, limit)


async def test_a_failure_that_passes_is_borne_and_a_refusal_is_not(kit: LiveKit) -> None:
    failing = FailingLog(kit.stream)
    failing.emit("task.accepted", goal="a goal", progress=0)
    failing.emit("task.cancelled", status="cancelled", progress=0)
    failing.failures = [OctoError("down", code="unavailable")] * 3
    watcher = await watch(failing, kit.stream, 0)
    assert watcher.seq == 2
    failing.failures = [OctoError("revoked", code="api_key_invalid")]
    with pytest.raises(OctoError, match="revoked"):
        await watch(failing, kit.stream, 0)


async def test_opening_raises_what_refuses_the_watcher(kit: LiveKit) -> None:
    class MissingTask(LiveKit):
        async def view(self) -> TaskView:
            raise OctoError("no", code="task_not_found")

    with pytest.raises(OctoError) as caught:
        await session(MissingTask(kit.stream), kit.stream).open()
    assert caught.value.code == "task_not_found"


async def test_text_that_never_comes_does_not_hold_the_step_for_ever(kit: LiveKit) -> None:
    kit.emit("task.accepted", goal="a goal", progress=0)
    kit.emit("step.started", step="a", title="A", arm="coder", attempt=1, run=1)
    kit.emit("step.completed", step="a", attempt=1, text_length=99, score=1.0)
    kit.emit("task.completed", status="completed", duration_ms=1, progress=100)
    one = LiveSession(
        TASK,
        kit,
        kit.stream,
        SystemClock(),
        position=parse_resume_position("0", []),
        timing=SessionTiming(retry_interval=0.001, max_text_wait=0.01),
    )
    await one.open()
    assert [frame.type async for frame in one.frames(LossyHints(1))] == ["status", "step", "step", "result"]


async def test_a_quiet_task_is_pinged_and_notes_are_told(kit: LiveKit) -> None:
    kit.emit("task.accepted", goal="a goal", progress=3)
    one = LiveSession(
        TASK,
        kit,
        kit.stream,
        SystemClock(),
        position=parse_resume_position("0", []),
        timing=SessionTiming(ping_interval=0.01, retry_interval=0.001),
    )
    await one.open()
    frames = one.frames(SilentHints())
    assert (await anext(frames)).type == "status"
    ping = await anext(frames)
    assert (ping.type, ping.seq, ping.progress) == ("ping", 1, 3.0)
    one.add_note({"code": "state_conflict"})
    note = await anext(frames)
    assert (note.type, note.seq, note.data) == ("status", 1, {"note": {"code": "state_conflict"}})
    await frames.aclose()


async def test_texts_are_not_asked_for_when_nothing_runs(kit: LiveKit) -> None:
    class WithoutTexts(LiveKit):
        async def texts(self) -> StepTexts:
            raise AssertionError("nothing runs")

    without_texts = WithoutTexts(kit.stream)
    without_texts.emit("task.accepted", goal="a goal", progress=0)
    without_texts.emit("task.cancelled", status="cancelled", progress=0)
    assert (await watch(without_texts, kit.stream, 0)).seq == 2
