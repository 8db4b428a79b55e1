"""The sandbox interface: jobs, limits, results, and the file names that may enter a work folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal, Protocol

from octollm import OctoError

MAX_NAME = 200
"""Bytes of a relative path."""
MAX_DEPTH = 8
"""Components of a relative path."""
MAX_JOB_FILES = 64
MAX_JOB_BYTES = 128 * 1024 * 1024
"""All files of a job together."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f\\]")


def find_name_fault(name: str) -> str:
    """Return the fault of a relative file name, or an empty string."""
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
    """Raise ``OctoError`` (``file_invalid``) unless ``files`` can be written into one working directory."""
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
    """Bounds of one run. The defaults apply to a run that requests no limits."""

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
    """Bytes in the working directory in addition to the job's files, and the same again in ``/tmp``."""
    disk_entries: int = 10_000
    """Files and folders in the working directory, and the same again in ``/tmp``."""
    open_files: int = 64
    result_files: int = 16
    """Files that are returned."""
    result_file_bytes: int = 64 * KIB
    """Bytes of one returned file; larger files are not returned."""

    def clamp(self, maxima: Limits) -> Limits:
        """Return these limits, each capped at that of ``maxima``."""
        return Limits(**{f.name: min(getattr(self, f.name), getattr(maxima, f.name)) for f in fields(self)})


MAX_LIMITS = Limits(wall_seconds=60.0, cpu_seconds=120, memory_bytes=2048 * MIB, output_bytes=1 * MIB)
"""Upper bounds for what a run can request: time, memory and output. The other limits are the defaults."""


@dataclass(frozen=True, slots=True)
class Job:
    """One program to run: ``command`` are the interpreter's arguments, ``files`` the working directory by path.

    The names have passed :func:`octollm.services.arms.executor.sandbox.check_names`. The
    distributions of ``packages`` can be imported.
    """

    command: tuple[str, ...]
    files: Mapping[str, bytes] = field(default_factory=dict[str, bytes])
    limits: Limits = Limits()
    packages: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A small text file that the program created or changed."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class SandboxResult:
    """The result of a run. ``exit_code`` is negative for a signal; ``reason`` is the limit that ended it, if any."""

    exit_code: int
    stdout: str
    stderr: str
    files: tuple[OutputFile, ...] = ()
    reason: LimitReason = ""
    duration_ms: int = 0


class Sandbox(Protocol):
    """Runs an untrusted program in isolation."""

    @property
    def name(self) -> str:
        """Return the kind of sandbox, e.g. ``bubblewrap``."""
        ...

    async def run(self, job: Job) -> SandboxResult:
        """Run ``job`` within its limits and return the result.

        Whatever the program does is a result. ``OctoError`` is raised only for faults of the sandbox:
        ``sandbox_failed`` (it did not start), ``no_sandbox`` (it cannot run this kind of job). When the call is
        cancelled, the program is killed before the cancellation propagates.
        """
        ...
