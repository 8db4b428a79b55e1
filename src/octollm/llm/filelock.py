"""A lock between processes, by a file that is never deleted. It ends with the process, however that ends."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import BinaryIO

_POLL_SECONDS = 0.1

if sys.platform == "win32":  # pragma: no cover
    import msvcrt

    def _try_lock(file: BinaryIO) -> bool:
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
else:
    import fcntl

    def _try_lock(file: BinaryIO) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


@asynccontextmanager
async def file_lock(path: Path, wait_seconds: float) -> AsyncGenerator[None]:
    """Hold the lock at ``path``. Raises :class:`LockTimeout` after ``wait_seconds``, and ``OSError``."""
    with path.open("ab") as file:
        try:
            async with asyncio.timeout(wait_seconds):
                while not _try_lock(file):  # noqa: ASYNC110 - another process cannot set our events
                    await asyncio.sleep(_POLL_SECONDS)
        except TimeoutError as exc:
            raise LockTimeout(str(path)) from exc
        yield  # closing the file gives the lock back


class LockTimeout(Exception):  # noqa: N818 - named for what happened, as the built-in TimeoutError is
    """Another process held the lock for longer than this one would wait."""
