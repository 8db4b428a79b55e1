"""Building frames: one event of a task is one frame, and the frames between events repeat the last ``seq``."""

from __future__ import annotations

import msgspec

from octollm.contracts.api import TaskView
from octollm.contracts.events import Event
from octollm.contracts.stream import Frame, FrameType, TokenFrame
from octollm.live.step_text import TextChunk

LiveFrame = Frame | TokenFrame

FINAL_EVENTS = frozenset({"task.completed", "task.failed", "task.cancelled"})
"""No frame follows the frame of one of these."""
FINAL_STATUSES = frozenset({"completed", "failed", "cancelled"})

_FRAME_TYPES: dict[str, FrameType] = {
    "task.accepted": "status",
    "task.planning": "status",
    "task.planned": "status",
    "task.replanned": "status",
    "task.started": "status",
    "task.waiting": "status",
    "task.approved": "status",
    "task.paused": "status",
    "task.resumed": "status",
    "task.instructed": "status",
    "task.extended": "status",
    "task.cancelled": "status",
    "task.progress": "progress",
    "step.started": "step",
    "step.completed": "step",
    "step.failed": "step",
    "step.skipped": "step",
    "task.completed": "result",
    "task.failed": "error",
}

_TASK_STATUS = {
    "task.accepted": "accepted",
    "task.planning": "planning",
    "task.planned": "planning",
    "task.replanned": "planning",
    "task.started": "running",
    "task.waiting": "waiting",
    "task.approved": "running",
    "task.paused": "paused",
    "task.resumed": "running",
    "task.completed": "completed",
    "task.failed": "failed",
    "task.cancelled": "cancelled",
}


def get_frame_type(event_type: str) -> FrameType:
    """Return the type of an event's frame."""
    # An event type of a newer version becomes a `status`: leaving it out would leave a gap in `seq`.
    return _FRAME_TYPES.get(event_type, "status")


class FrameBuilder:
    """Builds the frames of one client, in order.

    A frame inherits two values from those before it: ``seq``, the version of the last event, and ``progress``
    (0 to 100), which never falls.
    """

    def __init__(self, task_id: str) -> None:
        self.task_id = task_id
        self.seq = 0
        self.progress = 0.0

    def skip(self, event: Event) -> None:
        """Advance past an event that the client has received already."""
        self.seq = max(self.seq, event.version)
        self._raise_progress(event.data.get("progress"))
        if event.event_type == "task.completed":
            self._raise_progress(100.0)

    def build_event(self, event: Event) -> Frame:
        """Return the frame of an event. ``data`` is the event's, with its ``event_type`` and the task's ``status``."""
        self.skip(event)
        data: dict[str, object] = {"event_type": event.event_type}
        status = _TASK_STATUS.get(event.event_type)
        if status is not None:
            data["status"] = status
        return self._build(get_frame_type(event.event_type), event.timestamp, {**data, **event.data})

    def build_status(self, view: TaskView, timestamp: str) -> Frame:
        """Return the ``status`` frame of the present state: ``data`` is the task as in ``GET /tasks/{id}``."""
        self.seq = max(self.seq, view.version)
        self._raise_progress(view.progress)
        return self._build("status", timestamp, msgspec.to_builtins(view))

    def build_note(self, data: dict[str, object], timestamp: str) -> Frame:
        """Return a ``status`` frame with a note to the client (``data.note``) and no change."""
        return self._build("status", timestamp, {"note": data})

    def build_ping(self, timestamp: str) -> Frame:
        """Return a ``ping`` frame, which keeps an idle connection open."""
        return self._build("ping", timestamp, {})

    def build_token(self, chunk: TextChunk, timestamp: str) -> TokenFrame:
        """Return the frame of a chunk of text; ``data.text`` begins at ``offset``."""
        return TokenFrame(
            task_id=self.task_id,
            seq=self.seq,
            timestamp=timestamp,
            progress=self.progress,
            data={"text": chunk.text},
            step=chunk.step,
            attempt=chunk.attempt,
            run=chunk.run,
            offset=chunk.offset,
            reset=chunk.reset,
        )

    def _build(self, kind: FrameType, timestamp: str, data: dict[str, object]) -> Frame:
        return Frame(self.task_id, kind, self.seq, timestamp, self.progress, data)

    def _raise_progress(self, progress: object) -> None:
        if isinstance(progress, int | float) and not isinstance(progress, bool):
            # max() with a NaN first would keep it; this order drops it.
            self.progress = max(self.progress, min(float(progress), 100.0))
