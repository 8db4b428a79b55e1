"""The session of one watcher: what it is sent, in order, until the task's final frame.

Frames are made when the one who carries them asks for the next, so a slow watcher costs no memory here: the events
wait in the log, and the text that came meanwhile is joined to one frame.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from octollm.clock import Clock, iso
from octollm.contracts.api import SavedTexts, TaskView
from octollm.contracts.events import Event
from octollm.contracts.problems import KINDS
from octollm.errors import OctoError, RemoteError
from octollm.events import Hint
from octollm.live.frames import FINAL_EVENTS, FINAL_STATUSES, FrameMaker, LiveFrame
from octollm.live.resume import Resume
from octollm.live.texts import TextBook, Verdict
from octollm.storage import TextEntry
from octollm.storage.text_stream import READ_COUNT

PAGE = 200
"""Events of one read of the history."""
MAX_NOTES = 16
MAX_READS = 40
"""Reads of the stream before what they gave is sent."""
RESTORE_SECONDS = 1.0
"""A running text is saved as often."""


class TaskSource(Protocol):
    """The truth about one task, as one watcher may see it. Each raises what refuses the watcher."""

    async def view(self) -> TaskView:
        """Return the task as it is now."""
        ...

    async def history(self, after: int, limit: int) -> Sequence[Event]:
        """Return up to ``limit`` events behind version ``after``, oldest first; fewer only when there are no more."""
        ...

    async def texts(self) -> SavedTexts:
        """Return the text of each step as it was last saved."""
        ...


class TokenSource(Protocol):
    """The live text of all tasks; ``storage.TextStream`` is one."""

    async def read(self, task_id: str, last_id: str = "0") -> Sequence[TextEntry]:
        """Return up to ``READ_COUNT`` entries behind ``last_id``, oldest first."""
        ...


@dataclass(frozen=True, slots=True)
class Policy:
    """The times of a session, in seconds."""

    ping: float = 15.0
    """After so long without a frame, a ``ping`` is sent."""
    text_wait: float = 3.0
    """How long the frame of ``step.completed`` waits for the step's text."""
    start_wait: float = 2.0
    """How long text waits for the event that its attempt started."""
    again: float = 0.1
    """Pause between two looks for what should be there."""
    blind: float = 1.0
    """Pause between two looks while Redis does not answer: then no hint comes either."""
    patience: float = 30.0
    """How long the source may fail, in ways that may pass, before the session does."""


class Session:
    """One watcher's frames. ``open`` it, then iterate ``frames`` once.

    Without ``after`` the first frame is the present state and then the running text from 0; with it the events
    behind that ``seq``, and of each step that is not over the text behind ``offset``, or from 0 after a ``reset``.
    """

    def __init__(
        self,
        task_id: str,
        source: TaskSource,
        tokens: TokenSource,
        clock: Clock,
        *,
        resume: Resume,
        policy: Policy | None = None,
    ) -> None:
        self._task_id = task_id
        self._source = source
        self._tokens = tokens
        self._clock = clock
        self._resume = resume
        self._policy = policy or Policy()
        self._maker = FrameMaker(task_id)
        self._book = TextBook(resume.offsets)
        self._had = 0 if resume.after is None else resume.after
        """The version up to which the watcher has the events, by frame or by the present state."""
        self._fetched = 0
        self._last_id = "0"
        self._pulled = False
        self._early_since: float | None = None
        self._gap = False
        self._blind = False
        self._failing_since: float | None = None
        self._asked_texts = -1e9
        self._notes: deque[dict[str, object]] = deque(maxlen=MAX_NOTES)
        self._view: TaskView | None = None
        self._ended = False

    async def open(self) -> None:
        """Read the task. Raises what refuses the watcher, before any frame."""
        self._view = await self._source.view()
        version = self._view.version
        self._had = version if self._resume.after is None else min(self._resume.after, version)

    @property
    def nothing_left(self) -> bool:
        """Say whether the watcher has the final frame already."""
        view, after = self._view, self._resume.after
        return view is not None and view.status in FINAL_STATUSES and after is not None and after >= view.version

    def note(self, note: dict[str, object]) -> None:
        """Tell the watcher something, in a ``status`` frame with ``data.note``; the oldest of many is dropped."""
        self._notes.append(note)

    async def frames(self, hints: AsyncIterator[Hint]) -> AsyncGenerator[LiveFrame]:
        """Yield the frames. ``hints`` say when to look; one has to come when the subscription is in effect.

        A wait for a hint may be cancelled, and another begun. Raises what refuses the watcher meanwhile, and what
        the source fails with for longer than the patience.
        """
        if self._view is None:
            raise AssertionError("the session was not opened")
        if self._resume.after is None:
            yield self._maker.present(self._view, self._now())
        told = self._clock.monotonic()
        hint = Hint(events=True, text=True)
        while True:
            async with contextlib.aclosing(self._look(hint, hints)) as found:
                async for frame in found:
                    yield frame
                    told = self._clock.monotonic()
            if self._ended:
                return
            while self._notes:
                yield self._maker.note(self._notes.popleft(), self._now())
                told = self._clock.monotonic()
            if self._clock.monotonic() - told >= self._policy.ping:
                yield self._maker.ping(self._now())
                told = self._clock.monotonic()
            hint = await self._next_hint(hints, told + self._policy.ping - self._clock.monotonic())

    async def _look(self, hint: Hint, hints: AsyncIterator[Hint]) -> AsyncGenerator[LiveFrame]:
        """Yield the frames of everything that is new."""
        events = hint.events or self._early_since is not None
        while True:
            if events:
                async with contextlib.aclosing(self._events(hints)) as found:
                    async for frame in found:
                        yield frame
                if self._ended or self._fetched < self._had:
                    return
            was_early = self._early_since is not None
            await self._pull()
            for frame in self._take():
                yield frame
            if self._early_since is None or was_early:
                return
            events = True  # text of an attempt whose start is not known: the event must be there

    async def _events(self, hints: AsyncIterator[Hint]) -> AsyncGenerator[LiveFrame]:
        """Yield the frames of the events that are new, each behind the text that belongs before it."""
        more = True
        while more:
            page, more = await self._fetch()
            for event in page:
                self._ended = event.event_type in FINAL_EVENTS
                if event.version <= self._had:
                    self._maker.skip(event)
                    if self._ended and self._resume.after is None:
                        # Whoever waits for the final frame gets one, also when the task was over before.
                        yield self._maker.event(event)
                else:
                    async with contextlib.aclosing(self._text_of(event, hints)) as pieces:
                        async for frame in pieces:
                            yield frame
                    yield self._maker.event(event)
                self._apply(event)
                if self._ended:
                    return

    async def _text_of(self, event: Event, hints: AsyncIterator[Hint]) -> AsyncGenerator[LiveFrame]:
        """Yield the rest of a step's text, which belongs before the frame that ends it."""
        if event.event_type not in ("step.completed", "step.failed", "task.planned", "task.replanned"):
            return
        await self._pull()
        for frame in self._take():
            yield frame
        step, attempt, length = event.data.get("step"), event.data.get("attempt"), event.data.get("text_length")
        if not (isinstance(step, str) and isinstance(attempt, int) and isinstance(length, int)):
            return
        end = self._clock.monotonic() + self._policy.text_wait
        while self._book.reached(step, attempt) < length and self._clock.monotonic() < end:
            await self._restore(force=True)
            await self._pull()
            for frame in self._take():
                yield frame
            if self._book.reached(step, attempt) < length:
                await self._next_hint(hints, self._policy.again)

    def _apply(self, event: Event) -> None:
        """Note what an event means for the text, once its frame was made."""
        step, attempt, run = (event.data.get(name) for name in ("step", "attempt", "run"))
        if event.event_type in ("task.planned", "task.replanned"):
            self._book.planned()
        elif isinstance(step, str) and isinstance(attempt, int):
            if event.event_type == "step.started":
                self._book.started(step, attempt, run if isinstance(run, int) else 0)
            elif event.event_type in ("step.completed", "step.failed"):
                self._book.ended(step, attempt)

    async def _fetch(self) -> tuple[list[Event], bool]:
        """Return the next events and whether there may be more. A failure that may pass is borne for a while."""
        try:
            page = await self._source.history(self._fetched, PAGE)
        except OctoError as error:
            self._bear(error)
            return [], False
        self._failing_since = None
        found: list[Event] = []
        for event in page:
            if event.version == self._fetched + 1:
                found.append(event)
                self._fetched = event.version
        return found, len(page) >= PAGE and bool(found)

    async def _pull(self) -> None:
        """Read the stream as far as it goes."""
        try:
            for _ in range(MAX_READS):
                if not await self._offer(await self._tokens.read(self._task_id, self._last_id)):
                    break
            self._blind = False
            if not self._pulled and self._book.silent:
                await self._restore(force=True)
            self._pulled = True
        except OctoError as error:
            # Without Redis the text is what was saved, a second behind.
            if error.code != "unavailable":
                raise
            self._blind = True
            await self._restore()

    async def _offer(self, entries: Sequence[TextEntry]) -> bool:
        """Add entries to the book; return whether to read on."""
        for entry in entries:
            verdict = self._book.add(entry)
            if verdict is Verdict.EARLY:
                if self._early_since is None:
                    self._early_since = self._clock.monotonic()
                if self._clock.monotonic() - self._early_since < self._policy.start_wait:
                    return False
                self._book.started(entry.step, entry.attempt, entry.run)
                verdict = self._book.add(entry)
            self._early_since = None
            self._gap = verdict is Verdict.GAP
            if self._gap:
                # What was saved may end before this entry: what lies between is still in the stream.
                restored = await self._restore()
                self._last_id = "0" if restored else self._last_id
                return restored
            self._last_id = entry.id
        return len(entries) >= READ_COUNT

    async def _restore(self, *, force: bool = False) -> bool:
        """Take the saved texts, at most once a second unless forced; return whether that was done."""
        now = self._clock.monotonic()
        if not self._book.running or (not force and now - self._asked_texts < RESTORE_SECONDS):
            return False
        self._asked_texts = now
        try:
            saved = await self._source.texts()
        except OctoError as error:
            self._bear(error)
            return False
        for text in saved.texts:
            self._book.restore(text)
        return True

    def _take(self) -> list[LiveFrame]:
        now = self._now()
        return [self._maker.token(piece, now) for piece in self._book.take()]

    async def _next_hint(self, hints: AsyncIterator[Hint], seconds: float) -> Hint:
        unsettled = self._failing_since is not None or self._early_since is not None or self._gap
        if unsettled:
            seconds = min(seconds, self._policy.again)
        elif self._blind:
            seconds = min(seconds, self._policy.blind)
        try:
            async with asyncio.timeout(max(seconds, 0.0)):
                return await anext(hints)
        except TimeoutError:
            look = unsettled or self._blind
            return Hint(events=look, text=look)

    def _bear(self, error: OctoError) -> None:
        """Raise ``error`` unless it may pass and has not lasted too long."""
        kind = KINDS.get(error.code)
        passing = error.retryable if isinstance(error, RemoteError) else kind is not None and kind.retryable
        now = self._clock.monotonic()
        if self._failing_since is None:
            self._failing_since = now
        if not passing or now - self._failing_since > self._policy.patience:
            raise error

    def _now(self) -> str:
        return iso(self._clock.now())
