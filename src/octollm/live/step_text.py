"""Step text: where a client resumes (``after``, ``offset``), and which text of which step is still to be sent.

Pure state machines without I/O. Offsets count code points of one attempt and run of a step.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from octollm.contracts.api import StepText
from octollm.errors import OctoError
from octollm.storage import TextEntry

MAX_OFFSETS = 64
"""Running steps that one client may name."""
_SEQ = re.compile(r"[0-9]{1,15}")
_OFFSET = re.compile(r"([A-Za-z0-9._-]{1,64})\.([0-9]{1,9})\.([0-9]{1,9})\.([0-9]{1,9})")


@dataclass(frozen=True, slots=True)
class TextOffset:
    """The text of one step that a client has: the first ``count`` code points of this attempt and run."""

    attempt: int
    run: int
    count: int


@dataclass(frozen=True, slots=True)
class ResumePosition:
    """``after`` is the last ``seq`` that the client has; ``None`` requests the present state, 0 the whole history."""

    after: int | None = None
    offsets: Mapping[str, TextOffset] = field(default_factory=dict[str, TextOffset])


def parse_resume_position(after: str | None, offsets: Iterable[str]) -> ResumePosition:
    """Parse the parameters; an offset is ``<step>.<attempt>.<run>.<n>``.

    Raises ``invalid_parameter`` for any other form, for a step named twice and for more than 64 steps.
    """
    if after is not None and not _SEQ.fullmatch(after):
        raise OctoError("`after` must be the seq of a frame: a whole number.", code="invalid_parameter")
    by_step: dict[str, TextOffset] = {}
    for text in offsets:
        match = _OFFSET.fullmatch(text)
        if match is None:
            raise OctoError("`offset` must be <step>.<attempt>.<run>.<n>.", code="invalid_parameter")
        if match[1] in by_step or len(by_step) >= MAX_OFFSETS:
            raise OctoError(
                f"`offset` may be given once per running step, {MAX_OFFSETS} times at most.", code="invalid_parameter"
            )
        by_step[match[1]] = TextOffset(int(match[2]), int(match[3]), int(match[4]))
    return ResumePosition(None if after is None else int(after), by_step)


PLAN = "plan"
"""The step name of the planner's text, which belongs to no step of the plan."""
MAX_CHUNK = 8192
"""Code points of one chunk."""


@dataclass(frozen=True, slots=True)
class TextChunk:
    """Text to be sent. ``reset`` voids the text that the client has of this step."""

    step: str
    attempt: int
    run: int
    offset: int
    text: str
    reset: bool


class EntryResult(Enum):
    """The result of adding a stream entry."""

    ACCEPTED = "accepted"
    """Its new text, if any, will be sent."""
    EARLY = "early"
    """No event has started its attempt yet: read the events, then add the entry again."""
    GAP = "gap"
    """Text before it is missing: restore the saved texts, then read the stream from its beginning."""


@dataclass(slots=True)
class _StepText:
    """The text of a step's newest attempt and run.

    Three positions describe it: ``base`` (start of the valid text), ``end`` (what was sent or is pending), and the
    offset of each entry. All are absolute, so entries may repeat, overlap or arrive after a restore.
    """

    attempt: int
    run: int
    end: int = 0
    """Offset up to which text was sent or is pending."""
    base: int = 0
    """Offset of the first code point that is not void."""
    needs_reset: bool = True
    """The next chunk carries ``reset``."""
    has_stale_text: bool = False
    """The client has void text, and is sent a ``reset`` at once, even without new text."""
    is_claimed: bool = False
    """``end`` is what the client claims to have, and no text has confirmed it yet."""
    is_open: bool = True
    reset_id: tuple[int, int] = (0, 0)
    """Stream id of the last reset; entries before it are void."""
    pending: list[str] = field(default_factory=list[str])

    @property
    def state(self) -> tuple[object, ...]:
        # Of an attempt that has ended, nothing more is sent, whatever the client has of it.
        offsets = (self.end, self.base, self.needs_reset, self.reset_id) if self.is_open else ()
        return (self.attempt, self.run, offsets)

    def restart(self, run: int, at: int) -> None:
        self.has_stale_text = self.has_stale_text or not self.needs_reset
        self.pending.clear()
        self.run, self.base, self.end, self.needs_reset, self.is_claimed = run, at, at, True, False

    def extend(self, offset: int, text: str) -> bool:
        """Append the new part of ``text``; return ``False`` when text before it is missing."""
        # Text may overlap what is known (a duplicate, or a saved text), but must not leave a hole before it.
        if offset > self.end:
            return False
        new = text[self.end - offset :]
        if new:
            self.pending.append(new)
            self.end += len(new)
            self.is_claimed = False
        return True


class StepTextTracker:
    """The texts of one task's steps, as far as one client has them."""

    def __init__(self, offsets: Mapping[str, TextOffset]) -> None:
        self._claims = dict(offsets)
        self._texts: dict[str, _StepText] = {}
        self._plans = 0

    @property
    def has_running_step(self) -> bool:
        """Return whether a step may still produce text."""
        return any(text.is_open for text in self._texts.values())

    @property
    def has_silent_step(self) -> bool:
        """Return whether a running step has no confirmed text so far."""
        return any(text.is_open and (text.is_claimed or text.end == 0) for text in self._texts.values())

    @property
    def state(self) -> tuple[object, ...] | None:
        """Return what the client has of all steps; ``None`` while a claim of this client is not settled."""
        if any(step not in self._texts for step in self._claims):
            return None
        open_texts = [text for text in self._texts.values() if text.is_open]
        if any(text.is_claimed or text.pending or text.has_stale_text for text in open_texts):
            return None
        return (self._plans, *((step, *text.state) for step, text in sorted(self._texts.items())))

    def start_attempt(self, step: str, attempt: int, run: int) -> None:
        """Begin an attempt of ``step``, or its takeover by a newer ``run``."""
        text = self._texts.get(step)
        if text is None or attempt > text.attempt:
            self._texts[step] = self._begin_text(step, attempt, run)
        elif attempt == text.attempt and run > text.run:
            text.restart(run, 0)
            text.reset_id = (0, 0)

    def end_attempt(self, step: str, attempt: int) -> None:
        """End an attempt of ``step``: no more of its text is sent."""
        text = self._texts.get(step)
        if text is not None and text.attempt <= attempt:
            text.is_open = text.has_stale_text = False
            text.pending.clear()

    def record_plan(self) -> None:
        """End the planner's attempt: the n-th plan is attempt n of its text."""
        self._plans += 1
        self.end_attempt(PLAN, self._plans)

    def add(self, entry: TextEntry) -> EntryResult:
        """Add an entry of the stream."""
        text = self._find_text(entry.step, entry.attempt, entry.run)
        if text is None:
            return EntryResult.EARLY
        if not text.is_open or entry.attempt < text.attempt or entry.run < text.run:
            return EntryResult.ACCEPTED
        at = parse_stream_id(entry.id)
        # After a takeover the new worker repeats the attempt and its text from offset 0 (or from its first reset), and
        # its words may differ. So the text of the older run is void, also what the client has of it.
        if entry.run > text.run:
            text.restart(entry.run, entry.offset if entry.reset else 0)
            text.reset_id = at if entry.reset else (0, 0)
        # When the stream is read again from its beginning, entries before the last reset appear once more.
        if at < text.reset_id:
            return EntryResult.ACCEPTED
        if entry.reset and at > text.reset_id:
            text.reset_id = at
            if text.is_claimed and entry.offset < text.end:
                text.base = entry.offset  # The client has text after this reset, so it has seen the reset.
            # The first entry of an attempt carries `reset` too; where there is no text yet, nothing is void.
            elif not (text.needs_reset and text.base == text.end == entry.offset):
                text.restart(text.run, entry.offset)
        return EntryResult.ACCEPTED if text.extend(entry.offset, entry.text) else EntryResult.GAP

    def restore(self, saved: StepText) -> None:
        """Use the saved text of a step where it reaches further than the stream has."""
        text = self._find_text(saved.step, saved.attempt, saved.run)
        if text is None or not text.is_open or saved.attempt < text.attempt or saved.run < text.run:
            return
        if text.is_claimed and saved.run == text.run and saved.base < text.end:
            # The client has text after this base, so it has seen the reset before it: its text is not void.
            text.base = saved.base
        elif saved.run > text.run or saved.base > text.base:
            text.restart(saved.run, saved.base)
        text.extend(saved.base, saved.text)

    def get_offset(self, step: str, attempt: int) -> int:
        """Return the offset that an attempt's text has reached; a huge number when no more of it can be sent."""
        text = self._texts.get(step)
        if text is None or text.attempt > attempt or not text.is_open:
            return 2**62
        return text.end if text.attempt == attempt else 0

    def drain(self) -> list[TextChunk]:
        """Return and clear the pending text, joined to chunks of at most ``MAX_CHUNK`` code points."""
        chunks: list[TextChunk] = []
        for step, text in self._texts.items():
            if not (text.pending or text.has_stale_text):
                continue
            text_to_send = "".join(text.pending)
            text.pending.clear()
            offset = text.end - len(text_to_send)
            # At least one chunk: a reset without new text is sent as well.
            for start in range(0, max(len(text_to_send), 1), MAX_CHUNK):
                part = text_to_send[start : start + MAX_CHUNK]
                chunks.append(TextChunk(step, text.attempt, text.run, offset + start, part, text.needs_reset))
                text.needs_reset = text.has_stale_text = False
        return chunks

    def _find_text(self, step: str, attempt: int, run: int) -> _StepText | None:
        """Return the step's text; ``None`` when no event has started ``attempt`` yet."""
        text = self._texts.get(step)
        if text is not None and attempt <= text.attempt:
            return text
        if step != PLAN:
            return None
        text = self._begin_text(step, attempt, run)
        text.is_open = attempt > self._plans
        self._texts[step] = text
        return text

    def _begin_text(self, step: str, attempt: int, run: int) -> _StepText:
        claim = self._claims.get(step)
        if claim is None or claim.attempt != attempt or claim.count == 0:
            return _StepText(attempt, run)
        # The client's text is of an older run. The newer run started again, so the client must discard it.
        if claim.run < run:
            return _StepText(attempt, run, has_stale_text=True)
        return _StepText(attempt, claim.run, end=claim.count, needs_reset=False, is_claimed=True)


def parse_stream_id(text: str) -> tuple[int, int]:
    """Return the id of a stream's entry as a pair that orders entries: milliseconds, and the number within them."""
    milliseconds, _, number = text.partition("-")
    return int(milliseconds), int(number or 0)
