"""The sandbox interface: jobs, limits, results, and the file names that may enter a work folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal, Protocol

from octollm import OctoError

MAX_NAME = 200
"""Bytes of a whole relative name."""
MAX_DEPTH = 8
"""Parts of a relative name."""
MAX_JOB_FILES = 64
MAX_JOB_BYTES = 128 * 1024 * 1024
"""All files of a job together."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f\\]")


def find_name_fault(name: str) -> str:
    """Say what is wrong with a relative file name, or return the empty string."""
    if not name:
        return "a file needs a name"
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return "the name is not Unicode text"
    if size > MAX_NAME:
        return f"the name is longer than {MAX_NAME} bytes"
    if _CONTROL.search(name):
        return "the name has a control character or a backslash"
    if name.startswith("/"):
        return "the name is not relative"
    parts = name.split("/")
    if len(parts) > MAX_DEPTH:
        return f"the name has more than {MAX_DEPTH} parts"
    if any(part in ("", ".", "..") for part in parts):
        return "the name has an empty part, '.' or '..'"
    return ""


def check_names(files: Mapping[str, bytes]) -> None:
    """Raise ``OctoError`` (``file_invalid``) unless ``files`` may enter a work folder together."""
    if len(files) > MAX_JOB_FILES:
        raise OctoError(f"a run takes at most {MAX_JOB_FILES} files", code="file_invalid")
    if sum(map(len, files.values())) > MAX_JOB_BYTES:
        raise OctoError(f"a run takes at most {MAX_JOB_BYTES} bytes of files", code="file_invalid")
    for name in files:
        fault = find_name_fault(name)
        if fault:
            raise OctoError(f"file {name[:MAX_NAME]!r}: {fault}", code="file_invalid")
    for name in files:
        parts = name.split("/")
        for end in range(1, len(parts)):
            folder = "/".join(parts[:end])
            if folder in files:
                raise OctoError(f"{folder!r} is both a file and a folder", code="file_invalid")


LimitReason = Literal["", "timeout", "output", "memory", "killed"]

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of one run. The defaults are those of a run that asks for nothing."""

    wall_seconds: float = 10.0
    cpu_seconds: int = 10
    """Seconds of processor time, over all threads."""
    memory_bytes: int = 512 * MIB
    """Address space of the program."""
    output_bytes: int = 256 * KIB
    """Standard output and standard error together."""
    file_bytes: int = 16 * MIB
    """One file that the program writes."""
    disk_bytes: int = 64 * MIB
    """What the work folder may hold besides the job's files; the same again for ``/tmp``."""
    disk_entries: int = 10_000
    """Files and folders in the work folder, and again in ``/tmp``."""
    open_files: int = 64
    result_files: int = 16
    """Files that come back."""
    result_file_bytes: int = 64 * KIB
    """One file that comes back; a larger one stays behind."""

    def clamp(self, maxima: Limits) -> Limits:
        """Return these limits, each cut to that of ``maxima``."""
        return Limits(**{f.name: min(getattr(self, f.name), getattr(maxima, f.name)) for f in fields(self)})


MAX_LIMITS = Limits(
    wall_seconds=60.0,
    cpu_seconds=120,
    memory_bytes=2048 * MIB,
    output_bytes=1 * MIB,
    file_bytes=64 * MIB,
    disk_bytes=256 * MIB,
    disk_entries=20_000,
    open_files=256,
    result_files=64,
    result_file_bytes=256 * KIB,
)
"""The most that any run may have."""


@dataclass(frozen=True, slots=True)
class Job:
    """One program to run: ``command`` is what follows the interpreter, ``files`` the work folder by relative name.

    The names have passed :func:`octollm.services.arms.executor.sandbox.check_names`. A job that ``needs_duckdb``
    finds the DuckDB package importable.
    """

    command: tuple[str, ...]
    files: Mapping[str, bytes] = field(default_factory=dict[str, bytes])
    limits: Limits = Limits()
    needs_duckdb: bool = False


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A small text file that the program made or changed."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class SandboxResult:
    """How a run ended. ``exit_code`` is negative for a signal; ``reason`` says which limit ended it, if one did."""

    exit_code: int
    stdout: str
    stderr: str
    files: tuple[OutputFile, ...] = ()
    reason: LimitReason = ""
    duration_ms: int = 0


class Sandbox(Protocol):
    """A place where a stranger's program runs without reaching anything."""

    @property
    def name(self) -> str:
        """Return which kind it is, e.g. ``bubblewrap``."""
        ...

    async def run(self, job: Job) -> SandboxResult:
        """Run ``job`` within its limits and return how it ended.

        Whatever the program does is an outcome. ``OctoError`` is raised only where the sandbox could not do its
        part: ``sandbox_failed`` (it did not start), ``no_sandbox`` (it cannot run this kind of job). When the
        call is cancelled the program is killed before the cancellation goes on.
        """
        ...
