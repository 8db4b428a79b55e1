"""Live updates of one task, or of all that a caller may see: the session of a client, its frames, where it resumes.

Which frames a client receives is decided here, for every transport (WebSocket, server-sent events). Nothing here
knows HTTP, tokens or the rules of tasks: events and text come in, frames go out.
"""

from octollm.live.broadcast import BroadcastMember, TaskBroadcast
from octollm.live.dashboard import DashboardFeeds, DashboardSession, DashboardSource
from octollm.live.feed import FeedReader, TaskFeed, TaskFeeds
from octollm.live.frames import FINAL_EVENTS, FrameBuilder, LiveFrame, get_frame_type
from octollm.live.session import LiveSession, SessionTiming, TaskSource, TextSource, is_transient
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
    "BroadcastMember",
    "DashboardFeeds",
    "DashboardSession",
    "DashboardSource",
    "EntryResult",
    "FeedReader",
    "FrameBuilder",
    "LiveFrame",
    "LiveSession",
    "ResumePosition",
    "SessionTiming",
    "StepTextTracker",
    "TaskBroadcast",
    "TaskFeed",
    "TaskFeeds",
    "TaskSource",
    "TextChunk",
    "TextOffset",
    "TextSource",
    "get_frame_type",
    "is_transient",
    "parse_resume_position",
]
