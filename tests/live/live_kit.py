"""A task that happens: its log, its saved texts and its token stream, and a watcher that keeps what it is sent."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field

from octollm.contracts.api import StepText, StepTexts, TaskView
from octollm.contracts.events import Event
from octollm.contracts.stream import Frame, TokenFrame
from octollm.events import Hint
from octollm.storage import TextStream

TASK = "task-" + "0" * 31 + "1"


@dataclass
class LiveKit:
    """The truth. ``text`` is all that an attempt and run of a step wrote; ``base`` what of it was voided."""

    stream: TextStream
    events: list[Event] = field(default_factory=list)
    saved: dict[str, StepText] = field(default_factory=dict)
    progress: float = 0.0
    status: str = "accepted"
    voided: bool = False
    """Text was voided. Losing the stream in the moment after that loses the word that it was."""

    def emit(self, event_type: str, **data: object) -> None:
        version = len(self.events) + 1
        self.events.append(
            Event(
                event_type,
                f"2025-11-10T10:30:{version % 60:02}.000Z",
                "orchestrator",
                {"task_id": TASK, **data},
                f"id-{version}",
                "t",
                f"task/{TASK}",
                version=version,
            )
        )
        if event_type in ("task.completed", "task.failed", "task.cancelled"):
            self.status = event_type.partition(".")[2]

    async def view(self) -> TaskView:
        await asyncio.sleep(0)
        return TaskView(TASK, self.status, "a goal", self.progress, len(self.events), "then", "now")  # type: ignore[arg-type]

    async def history(self, after: int, limit: int) -> list[Event]:
        await asyncio.sleep(0)
        return self.events[after : after + limit]

    async def texts(self) -> StepTexts:
        await asyncio.sleep(0)
        return StepTexts(tuple(self.saved.values()))


class Writer:
    """One attempt of a step, by one run."""

    def __init__(self, kit: LiveKit, step: str, attempt: int, run: int) -> None:
        self.kit, self.step, self.attempt, self.run = kit, step, attempt, run
        self.text, self.base, self._reset = "", 0, True

    async def write(self, text: str) -> None:
        offset, reset = len(self.text), self._reset
        self.text, self._reset = self.text + text, False
        await self.kit.stream.append(
            TASK, step=self.step, attempt=self.attempt, run=self.run, offset=offset, text=text, reset=reset
        )

    async def void(self) -> None:
        self.base, self._reset, self.kit.voided = len(self.text), True, True
        await self.write("")

    def save(self) -> None:
        self.kit.saved[self.step] = StepText(self.step, self.attempt, self.run, self.text[self.base :], self.base)


class LossyHints:
    """Hints that are dropped, doubled and late; what a real one guarantees is that another look comes."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def __aiter__(self) -> LossyHints:
        return self

    async def __anext__(self) -> Hint:
        for _ in range(self._random.randrange(3)):
            await asyncio.sleep(0)
        return Hint(events=self._random.random() < 0.6, text=self._random.random() < 0.6)


@dataclass
class ReceivedText:
    """What a watcher has of a step's text."""

    attempt: int
    run: int
    base: int
    text: str

    @property
    def end(self) -> int:
        return self.base + len(self.text)


class Watcher:
    """Applies frames as a client does, and objects to anything lost, doubled or falling."""

    def __init__(self) -> None:
        self.seq = 0
        self.progress = 0.0
        self.texts: dict[str, ReceivedText] = {}
        self.completed: dict[str, ReceivedText] = {}
        self.frames: list[Frame | TokenFrame] = []

    def take(self, frame: Frame | TokenFrame) -> None:
        assert frame.progress >= self.progress, "progress fell"
        self.progress = frame.progress
        self.frames.append(frame)
        if isinstance(frame, TokenFrame):
            assert frame.seq == self.seq
            if frame.reset:
                self.texts[frame.step] = ReceivedText(frame.attempt, frame.run, frame.offset, "")
            seen = self.texts[frame.step]
            assert (seen.attempt, seen.run, seen.end) == (frame.attempt, frame.run, frame.offset), (
                "text lost or doubled"
            )
            seen.text += str(frame.data["text"])
        elif frame.type == "ping" or "event_type" not in frame.data:
            assert frame.seq >= self.seq
            self.seq = frame.seq
        else:
            assert frame.seq == self.seq + 1, "an event was lost or doubled"
            self.seq = frame.seq
            if frame.data["event_type"] == "step.completed":
                step = str(frame.data["step"])
                if step in self.texts and self.texts[step].attempt == frame.data["attempt"]:
                    self.completed[step] = self.texts[step]

    @property
    def offsets(self) -> list[str]:
        return [f"{step}.{seen.attempt}.{seen.run}.{seen.end}" for step, seen in self.texts.items()]
