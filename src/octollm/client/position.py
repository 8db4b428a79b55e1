"""What a watcher has seen of a task, so that nothing is lost or doubled over a broken connection. No I/O."""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import urlencode

import msgspec

from octollm.contracts.stream import FrameType

MAX_OFFSETS = 64
"""Running steps whose text the door goes on with."""


class Update(msgspec.Struct, frozen=True):
    """One thing that a task's watcher is told.

    ``seq`` counts the task's events without gaps; ``progress`` is from 0 to 100 and never falls. ``data`` holds the
    event's members, first of all ``event_type``. The last five members belong to ``token`` updates: ``offset`` is the
    place of ``text`` in what ``step`` writes in this ``attempt`` and ``run``, in code points; with ``reset`` all that
    the step wrote before is void.
    """

    task_id: str
    type: FrameType
    seq: int
    progress: float
    timestamp: str = ""
    data: dict[str, object] = {}
    step: str = ""
    attempt: int = 0
    run: int = 0
    offset: int = 0
    reset: bool = False

    @property
    def text(self) -> str:
        """Return what a token update adds to the step's text."""
        return str(self.data.get("text", ""))


class StreamGapError(Exception):
    """A frame does not join on to those before it: something between was lost."""


@dataclass(slots=True)
class StreamPosition:
    """What was seen: the last ``seq``, and per step how much of the text of which attempt and run."""

    seq: int = 0
    texts: dict[str, tuple[int, int, int]] = field(default_factory=dict[str, tuple[int, int, int]])

    def to_query(self) -> str:
        """Return the query string that goes on from here."""
        latest = list(self.texts.items())[-MAX_OFFSETS:]
        offsets = [("offset", f"{step}.{attempt}.{run}.{end}") for step, (attempt, run, end) in latest]
        return urlencode([("after", str(self.seq)), *offsets])

    def advance(self, update: Update) -> Update | None:
        """Note an update; return what is new of it, ``None`` when nothing is. Raises :class:`StreamGapError`."""
        if update.type == "ping":
            return None
        if update.type == "token":
            return self._advance_text(update)
        if update.seq <= self.seq:
            return None
        if update.seq > self.seq + 1:
            raise StreamGapError
        if update.type == "step" and "text_length" in update.data:
            self.texts.pop(str(update.data.get("step", "")), None)
        self.seq = update.seq
        return update

    def _advance_text(self, update: Update) -> Update | None:
        attempt, run, seen = self.texts.get(update.step, (-1, -1, 0))
        if (update.attempt, update.run) < (attempt, run):
            return None
        if (update.attempt, update.run) > (attempt, run):
            seen = 0
        start, text = update.offset, update.text
        if not update.reset:
            if start > seen:
                raise StreamGapError
            if start + len(text) <= seen:
                return None
            if start < seen:
                start, text = seen, text[seen - start :]
                update = msgspec.structs.replace(update, offset=start, data={**update.data, "text": text})
        # Taken out first, so that the step written last is also the last here.
        self.texts.pop(update.step, None)
        self.texts[update.step] = (update.attempt, update.run, start + len(text))
        return update
