"""NDJSON events of a streamed call, and the frames of a task's live updates."""

from __future__ import annotations

from typing import Literal

import msgspec

from octollm.contracts.problems import Problem

NDJSON = "application/x-ndjson"
HEARTBEAT_SECONDS = 5.0
"""The longest time without an event."""


class StreamEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of a stream: ``progress``, ``token`` and ``heartbeat``, then one ``result`` or ``problem``.

    ``text`` of a token event is the text written since the last one; ``reset`` voids the earlier text of this call.
    ``progress`` is from 0 to 100, with a short ``message``. ``result`` is raw JSON.
    """

    type: Literal["progress", "token", "heartbeat", "result", "problem"]
    text: str = ""
    reset: bool = False
    progress: float = 0.0
    message: str = ""
    result: msgspec.Raw = msgspec.Raw()
    problem: Problem | None = None


FrameType = Literal["status", "progress", "step", "result", "error", "token", "ping"]


class Frame(msgspec.Struct, frozen=True, omit_defaults=False):
    """One frame of ``/ws/tasks/{task_id}``. ``seq`` is the task's version; ``progress`` 0 to 100, never falling."""

    task_id: str
    type: FrameType
    seq: int
    timestamp: str
    progress: float
    data: dict[str, object]


class TokenFrame(msgspec.Struct, frozen=True, omit_defaults=False):
    """A ``token`` frame; ``offset`` counts code points of the step's text in this attempt and run."""

    task_id: str
    seq: int
    timestamp: str
    progress: float
    data: dict[str, object]
    step: str
    attempt: int
    run: int
    offset: int
    reset: bool = False
    type: Literal["token"] = "token"
