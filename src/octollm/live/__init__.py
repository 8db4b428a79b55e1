"""Live updates of one task: frames, resume, and the session of one watcher.

What a watcher is sent, and from where it goes on, is decided here, whatever carries it (WebSocket, SSE).
Nothing here knows of HTTP, of tokens or of the tasks' rules: events and text come in, frames go out.
"""

from octollm.live.frames import FINAL_EVENTS, FrameBuilder, LiveFrame, get_frame_type
from octollm.live.session import LiveSession, SessionTiming, TaskSource, TextSource
from octollm.live.step_text import (
    EntryResult,
    ResumePosition,
    StepTextTracker,
    TextChunk,
    TextOffset,
    parse_resume_position,
)

__all__ = [
    "FINAL_EVENTS",
    "EntryResult",
    "FrameBuilder",
    "LiveFrame",
    "LiveSession",
    "ResumePosition",
    "SessionTiming",
    "StepTextTracker",
    "TaskSource",
    "TextChunk",
    "TextOffset",
    "TextSource",
    "get_frame_type",
    "parse_resume_position",
]
