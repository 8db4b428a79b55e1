"""The session of one client: which frames it receives, in order, until the task's final frame.

Frames are built on demand, so a slow client costs no memory here. ``seq`` and ``offset`` make each event and each
code point arrive exactly once, over reconnects to any replica.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
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
"""Pending notes to the client; the oldest is dropped."""
MAX_READS = 40
"""Reads of the text stream before their text is sent."""
RESTORE_SECONDS = 1.0
"""Interval at which saved texts are read; the worker saves a running text as often."""


class TaskSource(Protocol):
    """The stored state of one task, as one client may read it. Each method raises the error that refuses the client."""

    async def view(self) -> TaskView:
        """Return the task as it is now."""
        ...

    async def history(self, after: int, limit: int) -> Sequence[Event]:
        """Return up to ``limit`` events after version ``after``, oldest first; fewer only when there are no more."""
        ...

    async def texts(self) -> StepTexts:
        """Return the text of each step as last saved."""
        ...


def is_transient(error: OctoError) -> bool:
    """Return whether a read that failed with ``error`` may succeed later, rather than being refused."""
    kind = ERROR_KINDS.get(error.code)
    return error.retryable if isinstance(error, RemoteError) else kind is not None and kind.retryable


class TextSource(Protocol):
    """The live text of all tasks; ``storage.TextStream`` is one."""

    async def read(self, task_id: str, last_id: str = "0") -> Sequence[TextEntry]:
        """Return up to ``READ_COUNT`` entries after ``last_id``, oldest first."""
        ...


@dataclass(frozen=True, slots=True)
class SessionTiming:
    """Intervals and bounds of a session, in seconds."""

    ping_interval: float = 15.0
    """A ``ping`` is sent after this time without a frame."""
    max_text_wait: float = 3.0
    """How long the frame of ``step.completed`` waits for the step's text."""
    max_start_wait: float = 2.0
    """How long text waits for the ``step.started`` event of its attempt."""
    retry_interval: float = 0.1
    """Interval of polls for text or events that must exist."""
    poll_interval: float = 1.0
    """Interval of polls while Redis is down, when no hints arrive."""
    max_outage: float = 30.0
    """How long transient errors of the source may last before the session fails."""


class LiveSession:
    """The frames of one client. Call :meth:`open`, then iterate :meth:`frames` once.

    Without ``after`` the first frame is the present state, followed by the running text from offset 0. With ``after``
    come the events after that ``seq``, and of each running step the text after its ``offset``, or from 0 after a
    ``reset``.
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
        """The version up to which the client has the events, by frames or by the present state."""
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
        self._sent_at = clock.monotonic()
        self._has_begun = False
        self._ended = False

    async def open(self) -> None:
        """Read the task. Raises the error that refuses the client, before any frame."""
        self._view = await self._source.view()
        version, after = self._view.version, self._position.after
        self._acknowledged = version if after is None else after
        # The source refuses a position beyond the task's events (of a restored database, or made up), and one whose
        # events were deleted: before any frame, not as a stream that never begins.
        if after is not None and after not in (0, version):
            await self._source.history(after, 1)

    @property
    def is_finished(self) -> bool:
        """Return whether the client has received the final frame already."""
        view, after = self._view, self._position.after
        return view is not None and view.status in FINAL_STATUSES and after is not None and after >= view.version

    @property
    def has_ended(self) -> bool:
        """Return whether the final frame was made."""
        return self._ended

    @property
    def state(self) -> tuple[object, ...] | None:
        """Return what the client has: two sessions in equal states make equal frames from here on.

        ``None`` while something that exists could not be read yet, or concerns this client alone.
        """
        texts = self._tracker.state
        is_settled = self._has_read_stream and not self._is_stream_down and not self._is_unsettled
        if not is_settled or self._notes or texts is None or self._fetched_version < self._acknowledged:
            return None
        return (self._fetched_version, self._builder.seq, self._builder.progress, self._last_id, texts)

    def fork(self, source: TaskSource, text_source: TextSource) -> LiveSession:
        """Return a session of another client that has the same frames and goes on from here by itself."""
        other = copy.copy(self)
        other._source, other._text_source = source, text_source
        other._builder, other._tracker = copy.copy(self._builder), copy.deepcopy(self._tracker)
        other._notes = deque(maxlen=MAX_NOTES)
        return other

    def add_note(self, note: dict[str, object]) -> None:
        """Queue a note to the client: a ``status`` frame with ``data.note``."""
        self._notes.append(note)

    def build_note(self, note: dict[str, object]) -> LiveFrame:
        """Return the frame of a note to a client that has what this session has made."""
        return self._builder.build_note(note, self._now())

    async def frames(self, hints: AsyncIterator[Hint]) -> AsyncGenerator[LiveFrame]:
        """Yield the frames until the final one; :meth:`poll` and :meth:`wait` in turn.

        ``hints`` wake the session; one must arrive when the subscription is in effect. A wait for a hint may be
        cancelled and repeated. Raises the error that refuses the client meanwhile, and a transient error of the
        source after ``max_outage`` seconds.
        """
        hint = Hint(events=True, text=True)
        while True:
            async with contextlib.aclosing(self.poll(hint, hints)) as frames:
                async for frame in frames:
                    yield frame
            if self._ended:
                return
            hint = await self.wait(hints)

    async def poll(self, hint: Hint, hints: AsyncIterator[Hint]) -> AsyncGenerator[LiveFrame]:
        """Yield the frames that can be made now, after ``hint``. Raises as :meth:`frames`."""
        if self._view is None:
            raise AssertionError("the session was not opened")
        if not self._has_begun:
            self._has_begun = True
            # The view and `version` in it are one snapshot, so the events after that version continue exactly where
            # this frame ends.
            if self._position.after is None:
                yield self._builder.build_status(self._view, self._now())
        async with contextlib.aclosing(self._poll(hint, hints)) as frames:
            async for frame in frames:
                yield frame
                self._sent_at = self._clock.monotonic()
        if self._ended:
            return
        while self._notes:
            yield self._builder.build_note(self._notes.popleft(), self._now())
            self._sent_at = self._clock.monotonic()
        if self._clock.monotonic() - self._sent_at >= self._timing.ping_interval:
            yield self._builder.build_ping(self._now())
            self._sent_at = self._clock.monotonic()

    async def wait(self, hints: AsyncIterator[Hint]) -> Hint:
        """Return the next hint, or one of its own when a ping or another attempt to read is due."""
        return await self._next_hint(hints, self._sent_at + self._timing.ping_interval - self._clock.monotonic())

    async def _poll(self, hint: Hint, hints: AsyncIterator[Hint]) -> AsyncGenerator[LiveFrame]:
        """Yield the frames of new events and new text."""
        events = hint.events or self._early_since is not None
        while True:
            if events:
                async with contextlib.aclosing(self._events(hints)) as frames:
                    async for frame in frames:
                        yield frame
                # Text must wait until the events that the client already has were read again, because they tell which
                # attempts are running, and so which text is current.
                if self._ended or self._fetched_version < self._acknowledged:
                    return
            was_early = self._early_since is not None
            await self._read_stream()
            for frame in self._drain_text():
                yield frame
            if self._early_since is None or was_early:
                return
            # Text has arrived for an attempt that no event has started yet. The worker commits `step.started` before it
            # writes text, so the event must be in the history: read the events again without waiting for a hint.
            events = True

    async def _events(self, hints: AsyncIterator[Hint]) -> AsyncGenerator[LiveFrame]:
        """Yield the frames of new events, each after the text that precedes it."""
        more = True
        while more:
            page, more = await self._fetch_events()
            for event in page:
                self._ended = event.event_type in FINAL_EVENTS
                # Events that the client has are still read, since they rebuild the state of the steps (which attempt
                # runs, what text is void). Only their frames are left out.
                if event.version <= self._acknowledged:
                    self._builder.skip(event)
                    if self._ended and self._position.after is None:
                        # A client of a finished task waits for the final frame too.
                        yield self._builder.build_event(event)
                else:
                    async with contextlib.aclosing(self._remaining_text(event, hints)) as frames:
                        async for frame in frames:
                            yield frame
                    yield self._builder.build_event(event)
                self._apply(event)
                if self._ended:
                    return

    async def _remaining_text(self, event: Event, hints: AsyncIterator[Hint]) -> AsyncGenerator[LiveFrame]:
        """Yield the remaining text of a step, which must precede the frame that ends the step."""
        if event.event_type not in ("step.completed", "step.failed", "task.planned", "task.replanned"):
            return
        await self._read_stream()
        for frame in self._drain_text():
            yield frame
        step, attempt, length = event.data.get("step"), event.data.get("attempt"), event.data.get("text_length")
        if not (isinstance(step, str) and isinstance(attempt, int) and isinstance(length, int)):
            return
        # The event and the text take different ways (SQL and Redis), so the event may arrive first; `text_length` tells
        # how much text must come. The wait is bounded: if Redis and the worker fail within the same second, some text
        # exists nowhere, and the frame of the step must not wait for it for ever.
        end = self._clock.monotonic() + self._timing.max_text_wait
        while self._tracker.get_offset(step, attempt) < length and self._clock.monotonic() < end:
            # The stream may have lost the text (it expires, and Redis can be flushed); SQL has what was saved.
            await self._restore(force=True)
            await self._read_stream()
            for frame in self._drain_text():
                yield frame
            if self._tracker.get_offset(step, attempt) < length:
                await self._next_hint(hints, self._timing.retry_interval)

    def _apply(self, event: Event) -> None:
        """Start or end attempts in the tracker as an event says, after its frame."""
        step, attempt, run = (event.data.get(name) for name in ("step", "attempt", "run"))
        if event.event_type in ("task.planned", "task.replanned"):
            self._tracker.record_plan()
        elif isinstance(step, str) and isinstance(attempt, int):
            if event.event_type == "step.started":
                self._tracker.start_attempt(step, attempt, run if isinstance(run, int) else 0)
            elif event.event_type in ("step.completed", "step.failed"):
                self._tracker.end_attempt(step, attempt)

    async def _fetch_events(self) -> tuple[list[Event], bool]:
        """Return the next events and whether there may be more. Tolerates transient errors up to ``max_outage``."""
        try:
            page = await self._source.history(self._fetched_version, HISTORY_PAGE)
        except OctoError as error:
            self._raise_unless_transient(error)
            return [], False
        self._failing_since = None
        # Versions are taken strictly in sequence, so that `seq` has no gap for the client even if a page had one.
        events: list[Event] = []
        # The first events of an old task may have been deleted. What is left has no gaps.
        if self._fetched_version == 0 and page:
            self._fetched_version = page[0].version - 1
        for event in page:
            if event.version == self._fetched_version + 1:
                events.append(event)
                self._fetched_version = event.version
        return events, len(page) >= HISTORY_PAGE and bool(events)

    async def _read_stream(self) -> None:
        """Read the text stream to its end, or the saved texts while Redis is down."""
        try:
            # Bounded, so that a client that connects late to a fast model gets its first text after MAX_READS reads
            # rather than after the end of the stream.
            for _ in range(MAX_READS):
                if not await self._add_entries(await self._text_source.read(self._task_id, self._last_id)):
                    break
            self._is_stream_down = False
            # A step that is silent in the stream may have its text in SQL alone.
            if not self._has_read_stream and self._tracker.has_silent_step:
                await self._restore(force=True)
            self._has_read_stream = True
        except OctoError as error:
            # Without Redis the saved texts are the source; they lag by a second.
            if error.code != "unavailable":
                raise
            self._is_stream_down = True
            await self._restore()

    async def _add_entries(self, entries: Sequence[TextEntry]) -> bool:
        """Add entries to the tracker; return whether to read on."""
        for entry in entries:
            result = self._tracker.add(entry)
            if result is EntryResult.EARLY:
                if self._early_since is None:
                    self._early_since = self._clock.monotonic()
                if self._clock.monotonic() - self._early_since < self._timing.max_start_wait:
                    return False
                self._tracker.start_attempt(entry.step, entry.attempt, entry.run)
                # After `max_start_wait` the text is shown without its event: the entry itself proves that the attempt
                # has started, and a lagging history must not hold back live text.
                result = self._tracker.add(entry)
            self._early_since = None
            self._has_gap = result is EntryResult.GAP
            if self._has_gap:
                # The saved text may end before this entry, and the part in between is in the stream: read it again from
                # the beginning. Text that was sent already is skipped by its offset.
                restored = await self._restore()
                self._last_id = "0" if restored else self._last_id
                return restored
            self._last_id = entry.id
        return len(entries) >= READ_COUNT

    async def _restore(self, *, force: bool = False) -> bool:
        """Read the saved texts, at most once a second unless forced; return whether they were read."""
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
        return [self._builder.build_token(chunk, now) for chunk in self._tracker.drain()]

    async def _next_hint(self, hints: AsyncIterator[Hint], seconds: float) -> Hint:
        # Some text or events exist but could not be read yet. Their hint was consumed, and no other may come.
        unsettled = self._is_unsettled
        if unsettled:
            seconds = min(seconds, self._timing.retry_interval)
        elif self._is_stream_down:
            seconds = min(seconds, self._timing.poll_interval)
        try:
            async with asyncio.timeout(max(seconds, 0.0)):
                return await anext(hints)
        except TimeoutError:
            must_poll = unsettled or self._is_stream_down
            return Hint(events=must_poll, text=must_poll)

    @property
    def _is_unsettled(self) -> bool:
        return self._failing_since is not None or self._early_since is not None or self._has_gap

    def _raise_unless_transient(self, error: OctoError) -> None:
        """Raise ``error`` unless it is transient and has lasted for less than ``max_outage``."""
        now = self._clock.monotonic()
        if self._failing_since is None:
            self._failing_since = now
        if not is_transient(error) or now - self._failing_since > self._timing.max_outage:
            raise error

    def _now(self) -> str:
        return format_rfc3339(self._clock.now())
