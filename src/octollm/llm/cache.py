"""The model cache: files named by their SHA-256, which is verified once and then remembered by a stamp file.

The stamp holds size, modification time and inode of the verified file, so that a start need not hash a gigabyte.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec

from octollm.errors import OctoError, map_exceptions
from octollm.llm.catalogue import MODEL_CATALOGUE, ModelEntry

_BLOCK = 4 * 1024 * 1024
T = TypeVar("T")


class _Stamp(msgspec.Struct, frozen=True):
    """The file state at the time of a successful verification."""

    size: int
    mtime_ns: int
    inode: int


def _stamp_of(path: Path) -> _Stamp:
    state = path.stat()
    return _Stamp(state.st_size, state.st_mtime_ns, state.st_ino)


def _hash(path: Path, stop: threading.Event) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while not stop.is_set() and (block := file.read(_BLOCK)):
            digest.update(block)
    return digest.hexdigest()


async def run_in_thread(work: Callable[[threading.Event], T]) -> T:
    """Run ``work`` in a thread. A cancelled caller sets the event that ``work`` receives, and waits until it stops."""
    stop = threading.Event()
    task = asyncio.ensure_future(asyncio.to_thread(work, stop))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        stop.set()
        await asyncio.wait({task})
        raise


async def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in lower-case hex without blocking the event loop. Raises ``OSError``."""
    return await run_in_thread(lambda stop: _hash(path, stop))


class ModelCache:
    """A folder of model files, each ``<sha256>.gguf``; by default ``~/.cache/octollm/models``."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = Path.home() / ".cache" / "octollm" / "models" if root is None else root

    def path_of(self, entry: ModelEntry) -> Path:
        """Return the path of the file of ``entry``, whether it exists or not."""
        return self.root / f"{entry.digest}.gguf"

    def parts_of(self, entry: ModelEntry) -> Path:
        """Return the folder for partial downloads of ``entry``."""
        return self.root / "parts" / entry.digest

    def has(self, entry: ModelEntry) -> bool:
        """Return whether ``entry`` has a file, verified or not."""
        return self.path_of(entry).is_file()

    def available(self, catalogue: tuple[ModelEntry, ...] = MODEL_CATALOGUE) -> tuple[ModelEntry, ...]:
        """Return the entries of ``catalogue`` that have a file, in its order."""
        return tuple(entry for entry in catalogue if self.has(entry))

    def largest(self, catalogue: tuple[ModelEntry, ...] = MODEL_CATALOGUE) -> ModelEntry | None:
        """Return the largest entry that has a file, or ``None`` when the cache is empty."""
        return max(self.available(catalogue), key=lambda entry: entry.size, default=None)

    async def verify(self, entry: ModelEntry) -> Path:
        """Verify the file of ``entry`` and return its path.

        Raises ``no_model`` when there is no file, and ``model_damaged`` when size or digest are wrong.
        """
        path = self.path_of(entry)
        try:
            state = _stamp_of(path)
        except FileNotFoundError as exc:
            raise OctoError(
                f"The model {entry.name} is not on this machine. Fetch it with `octollm models pull {entry.name}`.",
                code="no_model",
            ) from exc
        except OSError as exc:
            raise _unreadable_error(path, exc) from exc
        if state.size == entry.size and self._read_stamp(entry) == state:
            return path
        if state.size != entry.size:
            raise damaged_error(path, entry, f"it has {state.size:,} bytes instead of {entry.size:,}")
        with map_exceptions(lambda error: _unreadable_error(path, error), OSError):
            digest = await sha256_of(path)
        if digest != entry.digest:
            raise damaged_error(path, entry, f"its SHA-256 is {digest}")
        await asyncio.to_thread(self._write_stamp, entry, state)
        return path

    def adopt(self, entry: ModelEntry, file: Path) -> Path:
        """Move a verified ``file`` (on the same file system) into the cache, atomically, and stamp it."""
        path = self.path_of(entry)
        file.replace(path)
        self._write_stamp(entry, _stamp_of(path))
        return path

    def _stamp_path(self, entry: ModelEntry) -> Path:
        return self.root / f"{entry.digest}.verified"

    def _read_stamp(self, entry: ModelEntry) -> _Stamp | None:
        try:
            return msgspec.json.decode(self._stamp_path(entry).read_bytes(), type=_Stamp)
        except (OSError, msgspec.DecodeError):
            return None

    def _write_stamp(self, entry: ModelEntry, stamp: _Stamp) -> None:
        path = self._stamp_path(entry)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        with contextlib.suppress(OSError):  # without a stamp the next start hashes the file again; nothing else is lost
            temporary.write_bytes(msgspec.json.encode(stamp))
            temporary.replace(path)


def damaged_error(path: Path, entry: ModelEntry, why: str) -> OctoError:
    """Return ``model_damaged`` for a file whose content does not match ``entry``."""
    return OctoError(
        f"The model file {path} is damaged: {why}. Delete it and run `octollm models pull {entry.name}`.",
        code="model_damaged",
    )


def _unreadable_error(path: Path, exc: OSError) -> OctoError:
    return OctoError(f"The model file {path} cannot be read: {exc.strerror}.", code="model_damaged")
