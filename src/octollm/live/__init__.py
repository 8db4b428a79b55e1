"""Live updates of one task: the session of one client, its frames, and where it resumes.

Which frames a client receives is decided here, for every transport (WebSocket, server-sent events). Nothing here
knows HTTP, tokens or the rules of tasks: events and text come in, frames go out.
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
