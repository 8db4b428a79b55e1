"""One session for many clients: a frame is made and encoded once, and written to everybody who is up to date.

A client reads by a session of its own until it has what the broadcast has, and then joins. One that reads too slowly
leaves again with a session of its own, in which each frame waits for the client.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

from octollm.contracts.api import StepTexts, TaskView
from octollm.contracts.events import Event
from octollm.errors import OctoError
from octollm.live.feed import FeedReader, TaskFeed
from octollm.live.frames import LiveFrame
from octollm.live.session import LiveSession, TaskSource, is_transient

MAX_LAG_BYTES = 64 * 1024
"""Bytes that may wait for a client after a round of frames; past it the client leaves the broadcast."""
MAX_BURST_BYTES = 1024 * 1024
"""Bytes that may wait for a client within one round; past it the client is dropped."""

T = TypeVar("T")


class BroadcastMember(Protocol):
    """A client of a broadcast."""

    @property
    def reader(self) -> FeedReader:
        """The feed of the task, as this client may read it."""
        ...

    @property
    def pending_bytes(self) -> int:
        """What was written and not yet taken by the client's connection."""
        ...

    def write(self, payload: bytes) -> None:
        """Write an encoded frame, without waiting."""
        ...

    def leave(self, session: LiveSession | None, error: BaseException | None) -> None:
        """Go on without the broadcast: by ``session``, or not at all, because of ``error`` or after the last frame."""
        ...


class TaskBroadcast:
    """The frames of one task to its members. ``encode`` makes the bytes of a frame."""

    def __init__(self, feed: TaskFeed, encode: Callable[[LiveFrame], bytes]) -> None:
        self._feed = feed
        self._encode = encode
        self._members: dict[BroadcastMember, None] = {}
        self._session: LiveSession | None = None
        self._reader: FeedReader | None = None
        self._task: asyncio.Task[None] | None = None
        self._is_polling = False

    def __len__(self) -> int:
        return len(self._members)

    def join(self, session: LiveSession, member: BroadcastMember) -> bool:
        """Send ``member`` all frames from now on, in place of its ``session``; return whether it could join.

        It cannot while ``session`` has not what the broadcast has. It is woken when another attempt may succeed.
        """
        state = session.state
        if state is None or session.has_ended or self._is_polling:
            return False
        if self._session is None:
            self._start(session)
        elif self._session.state != state:
            return False
        self._members[member] = None
        return True

    def remove(self, member: BroadcastMember) -> None:
        """Send ``member`` no more frames. The broadcast ends with its last member."""
        self._members.pop(member, None)
        if not self._members:
            self._stop()

    def build_note(self, note: dict[str, object]) -> bytes:
        """Return the encoded frame of a note to one member."""
        assert self._session is not None
        return self._encode(self._session.build_note(note))

    # The broadcast as the source of its session: whichever member may still read the task.

    async def view(self) -> TaskView:
        """Return the task as it is now."""
        return await self._ask(lambda source: source.view())

    async def history(self, after: int, limit: int) -> Sequence[Event]:
        """Return events after version ``after``."""
        return await self._ask(lambda source: source.history(after, limit))

    async def texts(self) -> StepTexts:
        """Return the text of each step as last saved."""
        return await self._ask(lambda source: source.texts())

    async def _ask(self, ask: Callable[[TaskSource], Awaitable[T]]) -> T:
        while True:
            member = next(iter(self._members), None)
            if member is None:
                raise OctoError("Nobody watches the task any more.", code="unavailable")
            try:
                return await ask(member.reader.source)
            except OctoError as error:
                if is_transient(error):
                    raise
                # This client may no longer read the task. The others may.
                if member in self._members:
                    del self._members[member]
                    member.leave(None, error)

    def _start(self, session: LiveSession) -> None:
        reader = FeedReader(self._feed, self)
        self._feed.readers[reader] = None
        self._reader, self._session = reader, session.fork(reader, reader)
        self._task = asyncio.create_task(self._run(self._session, reader), name="task broadcast")

    def _stop(self) -> None:
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
        if self._reader is not None:
            self._feed.readers.pop(self._reader, None)
        self._session = self._reader = self._task = None
        self._is_polling = False

    async def _run(self, session: LiveSession, reader: FeedReader) -> None:
        error: BaseException | None = OctoError("The broadcast was ended.", code="unavailable", retry_after=1)
        try:
            while self._members and not session.has_ended:
                hint = await session.wait(reader)
                self._is_polling = True
                async with contextlib.aclosing(session.poll(hint, reader)) as frames:
                    async for frame in frames:
                        self._write(self._encode(frame))
                self._is_polling = False
                self._drop_slow(session)
                self._wake_others(reader)
            error = None
        except Exception as failure:  # A defect, too, is each member's to report.
            error = failure
        finally:
            # After a cancellation, another broadcast may have begun already.
            if self._session is session:
                members = list(self._members)
                self._members.clear()
                self._stop()
                for member in members:
                    member.leave(None, error)

    def _write(self, payload: bytes) -> None:
        slow: list[BroadcastMember] = []
        for member in self._members:
            member.write(payload)
            if member.pending_bytes > MAX_BURST_BYTES:
                slow.append(member)
        for member in slow:
            del self._members[member]
            member.leave(None, OctoError("The client reads too slowly.", code="overloaded", retry_after=1))

    def _drop_slow(self, session: LiveSession) -> None:
        for member in [member for member in self._members if member.pending_bytes > MAX_LAG_BYTES]:
            del self._members[member]
            member.leave(session.fork(member.reader, member.reader), None)

    def _wake_others(self, own: FeedReader) -> None:
        """Wake the sessions that are not in the broadcast: they may have what it has now."""
        for reader in self._feed.readers:
            if reader is not own:
                reader.notify(events=False, text=False)
