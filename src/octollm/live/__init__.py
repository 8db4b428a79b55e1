"""Live updates of one task: frames, resume, and the session of one watcher.

What a watcher is sent, and from where it goes on, is decided here, whatever carries it (WebSocket, SSE).
Nothing here knows of HTTP, of tokens or of the tasks' rules: events and text come in, frames go out.
"""

from octollm.live.frames import FINAL_EVENTS, FrameMaker, LiveFrame, frame_type
from octollm.live.resume import Offset, Resume, parse_resume
from octollm.live.session import Policy, Session, TaskSource, TokenSource
from octollm.live.texts import Piece, TextBook, Verdict

__all__ = [
    "FINAL_EVENTS",
    "FrameMaker",
    "LiveFrame",
    "Offset",
    "Piece",
    "Policy",
    "Resume",
    "Session",
    "TaskSource",
    "TextBook",
    "TokenSource",
    "Verdict",
    "frame_type",
    "parse_resume",
]
