"""The session of one client: which frames it is sent, in order, until the task's final frame. Frames are built on demand, so a slow client costs no memory here."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from octollm.clock import Clock, format_rfc3339
from octollm.contracts.api import StepTexts, TaskView
from octollm.contracts.events import Event
from octollm.contracts.problems import ERROR_KINDS
from octollm.errors import OctoError, RemoteError
from octollm.events import Hint
from octollm.live.frames import FINAL_EVENTS, FINAL_STATUSES, FrameBuilder, LiveFrame
from octollm.live.step_text import EntryResult, ResumePosition, StepTextTracker
from octollm.storage import TextEntry
from octollm.storage.text_stream import READ_COUNT

HISTORY_PAGE = 200
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

    async def texts(self) -> StepTexts:
        """Return the text of each step as it was last saved."""
        ...


class TextSource(Protocol):
    """The live text of all tasks; ``storage.TextStream`` is one."""

    async def read(self, task_id: str, last_id: str = "0") -> Sequence[TextEntry]:
        """Return up to ``READ_COUNT`` entries behind ``last_id``, oldest first."""
        ...


@dataclass(frozen=True, slots=True)
class SessionTiming:
    """The times of a session, in seconds."""

    ping_interval: float = 15.0
    """After so long without a frame, a ``ping`` is sent."""
    max_text_wait: float = 3.0
    """How long the frame of ``step.completed`` waits for the step's text."""
    max_start_wait: float = 2.0
    """How long text waits for the event that its attempt started."""
    retry_interval: float = 0.1
    """Pause between two looks for what should be there."""
    poll_interval: float = 1.0
    """Pause between two looks while Redis does not answer: then no hint comes either."""
    max_outage: float = 30.0
    """How long the source may fail, in ways that may pass, before the session does."""


class LiveSession:
    """One watcher's frames. ``open`` it, then iterate ``frames`` once.

    Without ``after`` the first frame is the present state and then the running text from 0; with it the events
    behind that ``seq``, and of each step that is not over the text behind ``offset``, or from 0 after a ``reset``.
    """

    def __init__(
        self,
        task_id: str,
        source: TaskSource,
        text_source: TextSource,
        clock: Clock,
        *,
        position: ResumePosition,
        timing: SessionTiming | None = None,
    ) -> None:
        self._task_id = task_id
        self._source = source
        self._text_source = text_source
        self._clock = clock
        self._position = position
        self._timing = timing or SessionTiming()
        self._builder = FrameBuilder(task_id)
        self._tracker = StepTextTracker(position.offsets)
        self._acknowledged = 0 if position.after is None else position.after
        """The version up to which the watcher has the events, by frame or by the present state."""
        self._fetched_version = 0
        self._last_id = "0"
        self._has_read_stream = False
        self._early_since: float | None = None
        self._has_gap = False
        self._is_stream_down = False
        self._failing_since: float | None = None
        self._restored_at = -1e9
        self._notes: deque[dict[str, object]] = deque(maxlen=MAX_NOTES)
        self._view: TaskView | None = None
        self._ended = False

    async def open(self) -> None:
        """Read the task. Raises what refuses the watcher, before any frame."""
        self._view = await self._source.view()
        version = self._view.version
        self._acknowledged = version if self._position.after is None else min(self._position.after, version)

    @property
    def is_finished(self) -> bool:
        """Say whether the watcher has the final frame already."""
        view, after = self._view, self._position.after
        return view is not None and view.status in FINAL_STATUSES and after is not None and after >= view.version

    def add_note(self, note: dict[str, object]) -> None:
        """Tell the watcher something, in a ``status`` frame with ``data.note``; the oldest of many is dropped."""
        self._notes.append(note)

    async def frames(self, hints: AsyncIterator[Hint]) -> AsyncGenerator[LiveFrame]:
        """Yield the frames. ``hints`` say when to look; one has to come when the subscription is in effect.

        A wait for a hint may be cancelled, and another begun. Raises what refuses the watcher meanwhile, and what
        the source fails with for longer than the patience.
        """
        if self._view is None:
            raise AssertionError("the session was not opened")
        if self._position.after is None:
            yield self._builder.build_status(self._view, self._now())
        told = self._clock.monotonic()
        hint = Hint(events=True, text=True)
        while True:
            async with contextlib.aclosing(self._poll(hint, hints)) as found:
                async for frame in found:
                    yield frame
                    told = self._clock.monotonic()
            if self._ended:
                return
            while self._notes:
                yield self._builder.build_note(self._notes.popleft(), self._now())
                told = self._clock.monotonic()
            if self._clock.monotonic() - told >= self._timing.ping_interval:
                yield self._builder.build_ping(self._now())
                told = self._clock.monotonic()
            hint = await self._next_hint(hints, told + self._timing.ping_interval - self._clock.monotonic())

    async def _poll(self, hint: Hint, hints: AsyncIterator[Hint]) -> AsyncGenerator[LiveFrame]:
        """Yield the frames of everything that is new."""
        events = hint.events or self._early_since is not None
        while True:
            if events:
                async with contextlib.aclosing(self._events(hints)) as found:
                    async for frame in found:
                        yield frame
                if self._ended or self._fetched_version < self._acknowledged:
                    return
            was_early = self._early_since is not None
            await self._read_stream()
            for frame in self._drain_text():
                yield frame
            if self._early_since is None or was_early:
                return
            events = True  # text of an attempt whose start is not known: the event must be there

    async def _events(self, hints: AsyncIterator[Hint]) -> AsyncGenerator[LiveFrame]:
        """Yield the frames of the events that are new, each behind the text that belongs before it."""
        more = True
        while more:
            page, more = await self._fetch_events()
            for event in page:
                self._ended = event.event_type in FINAL_EVENTS
                if event.version <= self._acknowledged:
                    self._builder.skip(event)
                    if self._ended and self._position.after is None:
                        # Whoever waits for the final frame gets one, also when the task was over before.
                        yield self._builder.build_event(event)
                else:
                    async with contextlib.aclosing(self._rest_of_text(event, hints)) as pieces:
                        async for frame in pieces:
                            yield frame
                    yield self._builder.build_event(event)
                self._apply(event)
                if self._ended:
                    return

    async def _rest_of_text(self, event: Event, hints: AsyncIterator[Hint]) -> AsyncGenerator[LiveFrame]:
        """Yield the rest of a step's text, which belongs before the frame that ends it."""
        if event.event_type not in ("step.completed", "step.failed", "task.planned", "task.replanned"):
            return
        await self._read_stream()
        for frame in self._drain_text():
            yield frame
        step, attempt, length = event.data.get("step"), event.data.get("attempt"), event.data.get("text_length")
        if not (isinstance(step, str) and isinstance(attempt, int) and isinstance(length, int)):
            return
        end = self._clock.monotonic() + self._timing.max_text_wait
        while self._tracker.get_offset(step, attempt) < length and self._clock.monotonic() < end:
            await self._restore(force=True)
            await self._read_stream()
            for frame in self._drain_text():
                yield frame
            if self._tracker.get_offset(step, attempt) < length:
                await self._next_hint(hints, self._timing.retry_interval)

    def _apply(self, event: Event) -> None:
        """Note what an event means for the text, once its frame was made."""
        step, attempt, run = (event.data.get(name) for name in ("step", "attempt", "run"))
        if event.event_type in ("task.planned", "task.replanned"):
            self._tracker.record_plan()
        elif isinstance(step, str) and isinstance(attempt, int):
            if event.event_type == "step.started":
                self._tracker.start_attempt(step, attempt, run if isinstance(run, int) else 0)
            elif event.event_type in ("step.completed", "step.failed"):
                self._tracker.end_attempt(step, attempt)

    async def _fetch_events(self) -> tuple[list[Event], bool]:
        """Return the next events and whether there may be more. A failure that may pass is borne for a while."""
        try:
            page = await self._source.history(self._fetched_version, HISTORY_PAGE)
        except OctoError as error:
            self._raise_unless_transient(error)
            return [], False
        self._failing_since = None
        found: list[Event] = []
        for event in page:
            if event.version == self._fetched_version + 1:
                found.append(event)
                self._fetched_version = event.version
        return found, len(page) >= HISTORY_PAGE and bool(found)

    async def _read_stream(self) -> None:
        """Read the stream as far as it goes."""
        try:
            for _ in range(MAX_READS):
                if not await self._add_entries(await self._text_source.read(self._task_id, self._last_id)):
                    break
            self._is_stream_down = False
            if not self._has_read_stream and self._tracker.has_silent_step:
                await self._restore(force=True)
            self._has_read_stream = True
        except OctoError as error:
            # Without Redis the text is what was saved, a second behind.
            if error.code != "unavailable":
                raise
            self._is_stream_down = True
            await self._restore()

    async def _add_entries(self, entries: Sequence[TextEntry]) -> bool:
        """Add entries to the book; return whether to read on."""
        for entry in entries:
            verdict = self._tracker.add(entry)
            if verdict is EntryResult.EARLY:
                if self._early_since is None:
                    self._early_since = self._clock.monotonic()
                if self._clock.monotonic() - self._early_since < self._timing.max_start_wait:
                    return False
                self._tracker.start_attempt(entry.step, entry.attempt, entry.run)
                verdict = self._tracker.add(entry)
            self._early_since = None
            self._has_gap = verdict is EntryResult.GAP
            if self._has_gap:
                # What was saved may end before this entry: what lies between is still in the stream.
                restored = await self._restore()
                self._last_id = "0" if restored else self._last_id
                return restored
            self._last_id = entry.id
        return len(entries) >= READ_COUNT

    async def _restore(self, *, force: bool = False) -> bool:
        """Take the saved texts, at most once a second unless forced; return whether that was done."""
        now = self._clock.monotonic()
        if not self._tracker.has_running_step or (not force and now - self._restored_at < RESTORE_SECONDS):
            return False
        self._restored_at = now
        try:
            saved = await self._source.texts()
        except OctoError as error:
            self._raise_unless_transient(error)
            return False
        for text in saved.texts:
            self._tracker.restore(text)
        return True

    def _drain_text(self) -> list[LiveFrame]:
        now = self._now()
        return [self._builder.build_token(piece, now) for piece in self._tracker.drain()]

    async def _next_hint(self, hints: AsyncIterator[Hint], seconds: float) -> Hint:
        unsettled = self._failing_since is not None or self._early_since is not None or self._has_gap
        if unsettled:
            seconds = min(seconds, self._timing.retry_interval)
        elif self._is_stream_down:
            seconds = min(seconds, self._timing.poll_interval)
        try:
            async with asyncio.timeout(max(seconds, 0.0)):
                return await anext(hints)
        except TimeoutError:
            look = unsettled or self._is_stream_down
            return Hint(events=look, text=look)

    def _raise_unless_transient(self, error: OctoError) -> None:
        """Raise ``error`` unless it may pass and has not lasted too long."""
        kind = ERROR_KINDS.get(error.code)
        passing = error.retryable if isinstance(error, RemoteError) else kind is not None and kind.retryable
        now = self._clock.monotonic()
        if self._failing_since is None:
            self._failing_since = now
        if not passing or now - self._failing_since > self._timing.max_outage:
            raise error

    def _now(self) -> str:
        return format_rfc3339(self._clock.now())
