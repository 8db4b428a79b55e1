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
from octollm.services.arms.executor.sandbox import Job, LimitReason, Limits, OutputFile, SandboxResult, find_name_fault

_CHUNK = 64 * 1024
_REAP_SECONDS = 5.0
_HEADER_BYTES = 64 * 1024
"""The line of JSON before the files that come back."""
_OUT_OF_MEMORY = re.compile(r"^(MemoryError\b|.*\bOut of Memory Error:)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class SandboxUser:
    """The user and group that a sandbox's process runs as, where the parent may choose."""

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
    """Return an unnamed file with the job, as the first process inside reads it."""
    whole = header | {
        "files": [[name, len(data)] for name, data in job.files.items()],
        "limits": asdict(job.limits),
    }
    head = json.dumps(whole).encode()
    return create_anonymous_file([len(head).to_bytes(4, "big"), head, *job.files.values()])


def create_anonymous_file(parts: Sequence[bytes]) -> FileIO:
    """Return a file, at its start, that has no name and holds ``parts``."""
    if hasattr(os, "memfd_create"):
        file = FileIO(os.memfd_create("octollm"), "r+")
    else:
        with tempfile.TemporaryFile() as named_by_nobody:
            file = FileIO(os.dup(named_by_nobody.fileno()), "r+")
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
    """Run one sandbox process to its end and return the outcome.

    ``command`` is told the descriptors of the result channel and of the lifeline (whose other end closes when this
    process dies) and returns the argument list. The process leads a session of its own and is killed with its
    group when it exceeds its wall time or output, and when this call is cancelled.
    Raises ``OctoError`` (``sandbox_failed``) when the sandbox did not come up.
    """
    started = clock.monotonic()
    setpriv = shutil.which("setpriv") if user else None
    forking = user if setpriv is None else None
    with contextlib.ExitStack() as stack:
        result_in, result_out = _open_pipe(stack)
        life_in, life_out = _open_pipe(stack)
        try:
            # In this thread: bubblewrap is told to die with the *thread* that started it, and the loop's lasts.
            process = subprocess.Popen(  # noqa: ASYNC220, S603
                [*_setpriv_prefix(setpriv, user), *command(result_out.fileno(), life_in.fileno())],
                stdin=job,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(result_out.fileno(), life_in.fileno(), *pass_fds),
                cwd="/",
                # Never this process's own environment, which has the settings of the service.
                env=env or {},
                start_new_session=True,
                user=forking.uid if forking else None,
                group=forking.gid if forking else None,
                extra_groups=[] if forking else None,
            )
        except (OSError, subprocess.SubprocessError) as exc:
            raise OctoError(f"the sandbox could not be started: {exc}", code="sandbox_failed") from exc
        # From here on the child alone holds these ends, so the result channel ends with the child.
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
    """Return what changes the user before the command.

    It costs a millisecond. Without it Python forks to do so itself, which for a large process takes a tenth of a
    second in which the loop stands still.
    """
    if setpriv is None or identity is None:
        return []
    return [setpriv, f"--reuid={identity.uid}", f"--regid={identity.gid}", "--clear-groups", "--"]


def _open_pipe(stack: contextlib.ExitStack) -> tuple[FileIO, FileIO]:
    reader, writer = os.pipe()
    return stack.enter_context(FileIO(reader, "r")), stack.enter_context(FileIO(writer, "w"))


async def _reap(process: subprocess.Popen[bytes]) -> None:
    """Collect a process that was killed; a thread goes on with it if this call is cancelled."""
    if process.poll() is None:
        await asyncio.to_thread(process.wait, _REAP_SECONDS)


class _ProcessMonitor:
    """Reads the three channels of one process up to their bounds."""

    def __init__(self, process: subprocess.Popen[bytes], limits: Limits) -> None:
        self._process = process
        self._limits = limits
        self.stdout, self.stderr, self.result = bytearray(), bytearray(), bytearray()
        self.reason: LimitReason = ""

    async def run(self, result: FileIO) -> None:
        """Read until all channels are closed, a bound is exceeded, or the wall time is over."""
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
        """Kill the process and its group, if it has not been collected yet."""
        # Once collected, its number may belong to another process group.
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
                    self.kill()  # the channels close with it
        finally:
            transport.close()


def parse_result(data: bytes, limits: Limits) -> tuple[SandboxReport, tuple[OutputFile, ...]] | None:
    """Return what the result channel says, or ``None`` when it does not say it whole and within the bounds."""
    line, _, rest = data.partition(b"\n")
    try:
        report = msgspec.json.decode(line, type=SandboxReport)
    except msgspec.DecodeError:
        return None
    made: list[OutputFile] = []
    if len(report.files) > limits.result_files:
        return None
    for name, size in report.files:
        # The sandbox wrote this, so no size and no name in it is believed.
        if not 0 <= size <= min(len(rest), limits.result_file_bytes):
            return None
        content, rest = rest[:size], rest[size:]
        if find_name_fault(name):
            continue
        try:
            made.append(OutputFile(name, content.decode()))
        except UnicodeDecodeError:
            continue
    return report, tuple(made)


def _build_result(watcher: _ProcessMonitor, returncode: int | None, limits: Limits, duration_ms: int) -> SandboxResult:
    stdout, stderr = (bytes(b).decode("utf-8", "replace") for b in (watcher.stdout, watcher.stderr))
    if watcher.reason:
        return SandboxResult(-signal.SIGKILL, stdout, stderr, (), watcher.reason, duration_ms)
    parsed = parse_result(bytes(watcher.result), limits)
    if parsed is None:
        said = stderr.strip().splitlines()
        detail = said[-1][:300] if said else f"it ended with {returncode}"
        raise OctoError(f"the sandbox did not finish its run: {detail}", code="sandbox_failed")
    report, files = parsed
    reason = report.reason or infer_limit_reason(report, stderr, limits)
    return SandboxResult(report.exit_code, stdout, stderr, files, reason, duration_ms)


def infer_limit_reason(report: SandboxReport, stderr: str, limits: Limits) -> LimitReason:
    """Say which limit ended a program, from its exit code, its use and the last thing that it said."""
    code = report.exit_code
    if code == 0:
        return ""
    # A program that ignores SIGXCPU is ended by SIGKILL a second later.
    if code == -signal.SIGXCPU or (code == -signal.SIGKILL and report.cpu_seconds >= limits.cpu_seconds):
        return "timeout"
    if code > 0:
        return "memory" if _OUT_OF_MEMORY.search(stderr[-2000:]) else ""
    # A failed allocation may end in any signal: with half of its memory in use, memory is the likely reason.
    if code == -signal.SIGKILL or report.peak_bytes > limits.memory_bytes // 2:
        return "memory"
    return "killed"
