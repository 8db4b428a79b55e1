"""The parent's side of a sandbox run.

Starts the sandbox process, enforces wall time and output limits, and parses the result channel.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from io import FileIO
from typing import IO, Any

import msgspec

from octollm import OctoError
from octollm.clock import Clock
from octollm.errors import map_exceptions
from octollm.services.arms.executor.sandbox import Job, LimitReason, Limits, OutputFile, SandboxResult, find_name_fault

_CHUNK = 64 * 1024
_REAP_SECONDS = 5.0
_HEADER_BYTES = 64 * 1024
"""Bytes of the JSON line before the result files."""
_OUT_OF_MEMORY = re.compile(r"^(MemoryError\b|.*\bOut of Memory Error:)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class SandboxUser:
    """User and group of a sandbox's process; only a service that runs as root can choose them."""

    uid: int
    gid: int


class SandboxReport(msgspec.Struct, frozen=True):
    """The first line of the result channel: how the program ended, and the files that follow with their sizes."""

    exit_code: int
    reason: LimitReason
    peak_bytes: int
    cpu_seconds: float
    files: tuple[tuple[str, int], ...]


def create_job_file(job: Job, header: dict[str, Any]) -> FileIO:
    """Return an anonymous file with the job, in the format that the sandbox's first process reads."""
    document = header | {
        "files": [[name, len(data)] for name, data in job.files.items()],
        "limits": asdict(job.limits),
    }
    encoded = json.dumps(document).encode()
    return create_anonymous_file([len(encoded).to_bytes(4, "big"), encoded, *job.files.values()])


def create_anonymous_file(parts: Sequence[bytes]) -> FileIO:
    """Return a file without a name that contains ``parts``, positioned at its start."""
    if hasattr(os, "memfd_create"):
        file = FileIO(os.memfd_create("octollm"), "r+")
    else:
        with tempfile.TemporaryFile() as temporary:
            file = FileIO(os.dup(temporary.fileno()), "r+")
    try:
        for part in parts:
            rest = memoryview(part)
            while rest:
                rest = rest[file.write(rest) :]
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file


async def run_bounded(
    command: Callable[[int, int], Sequence[str]],
    *,
    job: FileIO,
    limits: Limits,
    clock: Clock,
    user: SandboxUser | None = None,
    pass_fds: Sequence[int] = (),
    env: Mapping[str, str] | None = None,
) -> SandboxResult:
    """Run one sandbox process to its end and return the result.

    ``command`` maps the descriptors of the result channel and of the lifeline (whose other end closes when this
    process dies) to the argument list. The process leads its own session. It is killed with its process group when it
    exceeds its wall time or output, or when this call is cancelled.
    Raises ``OctoError`` (``sandbox_failed``) when the sandbox does not start.
    """
    started = clock.monotonic()
    setpriv = shutil.which("setpriv") if user else None
    popen_user = user if setpriv is None else None
    with contextlib.ExitStack() as stack:
        result_in, result_out = _open_pipe(stack)
        life_in, life_out = _open_pipe(stack)
        with map_exceptions(
            lambda error: OctoError(f"the sandbox could not be started: {error}", code="sandbox_failed"),
            OSError,
            subprocess.SubprocessError,
        ):
            # Not in a worker thread: --die-with-parent (PR_SET_PDEATHSIG) kills the sandbox when the *thread* that
            # started it ends. The event loop's thread lives as long as the service.
            process = subprocess.Popen(  # noqa: ASYNC220, S603
                [*_setpriv_prefix(setpriv, user), *command(result_out.fileno(), life_in.fileno())],
                stdin=job,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(result_out.fileno(), life_in.fileno(), *pass_fds),
                cwd="/",
                # Never this process's own environment: it contains the service's settings and secrets.
                env=env or {},
                start_new_session=True,
                user=popen_user.uid if popen_user else None,
                group=popen_user.gid if popen_user else None,
                extra_groups=[] if popen_user else None,
            )
        # Only the child has these ends from here on, so the result channel reaches its end when the child dies.
        result_out.close()
        life_in.close()
        watcher = _ProcessMonitor(process, limits)
        try:
            await watcher.run(result_in)
        finally:
            watcher.kill()
            life_out.close()
            await _reap(process)
    return _build_result(watcher, process.returncode, limits, int((clock.monotonic() - started) * 1000))


def _setpriv_prefix(setpriv: str | None, identity: SandboxUser | None) -> list[str]:
    """Return the ``setpriv`` command that changes the user, or nothing.

    It takes a millisecond. With ``user=``, ``Popen`` cannot use ``vfork``; copying the page tables of a large process
    blocks the event loop for a tenth of a second.
    """
    if setpriv is None or identity is None:
        return []
    return [setpriv, f"--reuid={identity.uid}", f"--regid={identity.gid}", "--clear-groups", "--"]


def _open_pipe(stack: contextlib.ExitStack) -> tuple[FileIO, FileIO]:
    reader, writer = os.pipe()
    return stack.enter_context(FileIO(reader, "r")), stack.enter_context(FileIO(writer, "w"))


async def _reap(process: subprocess.Popen[bytes]) -> None:
    """Wait for a killed process, so that it does not stay a zombie; if this call is cancelled, the thread continues."""
    if process.poll() is None:
        await asyncio.to_thread(process.wait, _REAP_SECONDS)


class _ProcessMonitor:
    """Reads standard output, standard error and the result channel of one process, up to their bounds."""

    def __init__(self, process: subprocess.Popen[bytes], limits: Limits) -> None:
        self._process = process
        self._limits = limits
        self.stdout, self.stderr, self.result = bytearray(), bytearray(), bytearray()
        self.reason: LimitReason = ""

    async def run(self, result: FileIO) -> None:
        """Read until all channels are closed, a bound is exceeded, or the wall time has passed."""
        most = _HEADER_BYTES + self._limits.result_files * self._limits.result_file_bytes
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        try:
            async with asyncio.timeout(self._limits.wall_seconds), asyncio.TaskGroup() as group:
                group.create_task(self._read(self._process.stdout, self.stdout, self._remaining_output))
                group.create_task(self._read(self._process.stderr, self.stderr, self._remaining_output))
                group.create_task(self._read(result, self.result, lambda: most - len(self.result)))
        except TimeoutError:
            self.reason = "timeout"

    def kill(self) -> None:
        """Kill the process and its group, unless it was waited for already."""
        # After a wait, the kernel may reuse the number for another process group.
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _remaining_output(self) -> int:
        return self._limits.output_bytes - len(self.stdout) - len(self.stderr)

    async def _read(self, file: IO[bytes] | FileIO, into: bytearray, room: Callable[[], int]) -> None:
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), file
        )
        try:
            while chunk := await reader.read(_CHUNK):
                left = room()
                into += chunk[: max(0, left)]
                if len(chunk) > left:
                    self.reason = "output"
                    self.kill()  # closes the channels, which ends this loop and the other two
        finally:
            transport.close()


def parse_result(data: bytes, limits: Limits) -> tuple[SandboxReport, tuple[OutputFile, ...]] | None:
    """Return the report and files from the result channel, or ``None`` when they are incomplete or exceed a bound."""
    line, _, rest = data.partition(b"\n")
    try:
        report = msgspec.json.decode(line, type=SandboxReport)
    except msgspec.DecodeError:
        return None
    files: list[OutputFile] = []
    if len(report.files) > limits.result_files:
        return None
    for name, size in report.files:
        # The sandbox is not trusted: a program that broke out of the supervisor's control could have written this.
        if not 0 <= size <= min(len(rest), limits.result_file_bytes):
            return None
        content, rest = rest[:size], rest[size:]
        if find_name_fault(name):
            continue
        try:
            files.append(OutputFile(name, content.decode()))
        except UnicodeDecodeError:
            continue
    return report, tuple(files)


def _build_result(watcher: _ProcessMonitor, returncode: int | None, limits: Limits, duration_ms: int) -> SandboxResult:
    stdout, stderr = (bytes(b).decode("utf-8", "replace") for b in (watcher.stdout, watcher.stderr))
    if watcher.reason:
        return SandboxResult(-signal.SIGKILL, stdout, stderr, (), watcher.reason, duration_ms)
    parsed = parse_result(bytes(watcher.result), limits)
    if parsed is None:
        lines = stderr.strip().splitlines()
        detail = lines[-1][:300] if lines else f"it exited with status {returncode}"
        raise OctoError(f"the sandbox did not finish its run: {detail}", code="sandbox_failed")
    report, files = parsed
    reason = report.reason or infer_limit_reason(report, stderr, limits)
    return SandboxResult(report.exit_code, stdout, stderr, files, reason, duration_ms)


def infer_limit_reason(report: SandboxReport, stderr: str, limits: Limits) -> LimitReason:
    """Return which limit ended a program, inferred from its exit code, its usage and its last output."""
    code = report.exit_code
    if code == 0:
        return ""
    # A program that ignores SIGXCPU is killed by SIGKILL a second later (the hard limit).
    if code == -signal.SIGXCPU or (code == -signal.SIGKILL and report.cpu_seconds >= limits.cpu_seconds):
        return "timeout"
    if code > 0:
        return "memory" if _OUT_OF_MEMORY.search(stderr[-2000:]) else ""
    # A failed allocation may end in any signal (SIGSEGV, SIGABRT). With more than half of its memory in use, that is
    # the likely cause.
    if code == -signal.SIGKILL or report.peak_bytes > limits.memory_bytes // 2:
        return "memory"
    return "killed"
