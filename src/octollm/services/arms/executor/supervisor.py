"""The supervisor, process 1 inside the sandbox.

It unpacks the job's files, runs the program under rlimits and the system-call filter, and sends the results. It is sent
to the sandbox as text, so it imports only the standard library. As process 1 of its PID namespace it ignores signals
from the program, and the kernel kills the whole namespace when it exits. It trusts its input; the parent does not
trust its output.

Input: on descriptor 0, four bytes of length (big-endian), a JSON header, then the files' bytes.
Output: on the result descriptor, one line of JSON, then the files' bytes.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import signal
import stat
import sys
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

_TICK_MS = 50
_MAX_LISTED = 20_000
"""Directory entries scanned when results are collected."""
_MAX_DEPTH = 8
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _SECCOMP_MODE_FILTER = 22, 38, 2


def read_header(stream: BinaryIO) -> dict[str, Any]:
    """Read the job's header, up to the first file's bytes."""
    size = int.from_bytes(stream.read(4), "big")
    return json.loads(stream.read(size))


def unpack_files(stream: BinaryIO, files: Sequence[tuple[str, int]], root: str, keep: int) -> dict[str, bytes]:
    """Write the files under ``root`` and return those of at most ``keep`` bytes, to detect changes later."""
    contents: dict[str, bytes] = {}
    for name, size in files:
        data = stream.read(size)
        path = os.path.join(root, name)  # noqa: PTH118 - pathlib would double the start-up time
        os.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH103, PTH120
        with open(path, "xb") as file:  # noqa: PTH123
            file.write(data)
        if size <= keep:
            contents[name] = data
    return contents


def collect_files(root: str, before: Mapping[str, bytes], most: int, most_bytes: int) -> list[tuple[str, bytes]]:
    """Return the small UTF-8 text files under ``root`` that are new or changed, by name.

    Symbolic links, devices, pipes and bytecode caches are skipped.
    """
    changed: list[tuple[str, bytes]] = []
    folders, listed = [""], 0
    while folders and len(changed) < most:
        folder = folders.pop(0)
        try:
            with os.scandir(os.path.join(root, folder)) as entries:  # noqa: PTH118
                names: list[tuple[str, bool]] = []
                for entry in entries:
                    listed += 1
                    if listed > _MAX_LISTED:
                        return changed
                    names.append((entry.name, entry.is_dir(follow_symlinks=False)))
        except OSError:
            continue
        for name, is_folder in sorted(names):
            path = f"{folder}/{name}" if folder else name
            if is_folder:
                if name != "__pycache__" and path.count("/") < _MAX_DEPTH - 1:
                    folders.append(path)
                continue
            data = _read_text_file(os.path.join(root, path), most_bytes)  # noqa: PTH118
            if data is not None and before.get(path) != data and len(changed) < most:
                changed.append((path, data))
    return changed


def _read_text_file(path: str, most_bytes: int) -> bytes | None:
    try:
        path.encode()
        # O_NONBLOCK: opening a named pipe would block until it has a writer. O_NOFOLLOW: a link could lead anywhere.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError):
        return None
    with open(descriptor, "rb") as file:  # noqa: PTH123
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes or b"\0" in data:
        return None
    try:
        data.decode()
    except UnicodeDecodeError:
        return None
    return data


def send_report(descriptor: int, report: dict[str, Any], files: Sequence[tuple[str, bytes]]) -> None:
    """Write the report and the files to the result descriptor."""
    report["files"] = [[name, len(data)] for name, data in files]
    with open(descriptor, "wb") as out:
        out.write(json.dumps(report).encode() + b"\n")
        for _, data in files:
            out.write(data)


def exceeds_entry_limit(folders: Sequence[str], most: int) -> bool:
    """Return whether one of ``folders``, each its own file system, has more than ``most`` entries."""
    for folder in folders:
        room = os.statvfs(folder)
        if room.f_files - room.f_ffree > most:
            return True
    return False


class _FilterProgram(ctypes.Structure):
    """``struct sock_fprog`` of linux/filter.h."""

    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_void_p))


def _exec_program(header: dict[str, Any], libc: ctypes.CDLL) -> None:
    """Replace this child process by the program, under its limits."""
    limits = header["limits"]
    os.chdir(header["root"])
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    # The program must not inherit the result channel, to which it could write a forged report.
    os.closerange(3, 1024)
    for kind, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, limits["cpu_seconds"]),
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_NOFILE, limits["open_files"]),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        most = value + 1 if kind == resource.RLIMIT_CPU else value  # SIGXCPU first, SIGKILL a second later
        resource.setrlimit(kind, (value, most))
    code = ctypes.create_string_buffer(bytes.fromhex(header["filter"]))
    program = _FilterProgram((len(code) - 1) // 8, ctypes.cast(code, ctypes.c_void_p))
    # Without no_new_privs the kernel accepts no filter from an unprivileged process (seccomp(2)).
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0
    ):
        raise OSError(ctypes.get_errno(), "the system-call filter was refused")
    os.execve(header["command"][0], header["command"], header["env"])  # noqa: S606


def _supervise(child: int, life: int, header: dict[str, Any]) -> str:
    """Wait for the child to exit; kill it when it creates too many files, and exit when the parent is gone."""
    exit_fd = os.pidfd_open(child)
    poll = select.poll()
    poll.register(exit_fd, select.POLLIN)
    poll.register(life, select.POLLIN)
    reason = ""
    while True:
        ready = [descriptor for descriptor, _ in poll.poll(_TICK_MS)]
        if life in ready:
            # The parent died, so nobody waits for the result. The exit of process 1 ends everything in the sandbox.
            os._exit(1)
        if exit_fd in ready:
            return reason
        if not reason and exceeds_entry_limit(header["folders"], header["limits"]["disk_entries"]):
            reason = "killed"
            os.kill(child, signal.SIGKILL)
            os.write(2, b"\nended: too many files\n")


def main(result: int, life: int) -> None:
    """Run the job from descriptor 0."""
    stream = open(0, "rb", closefd=False)  # noqa: SIM115
    header = read_header(stream)
    limits = header["limits"]
    before = unpack_files(stream, header["files"], header["root"], limits["result_file_bytes"])
    libc = ctypes.CDLL(None, use_errno=True)
    child = os.fork()
    if child == 0:
        try:
            _exec_program(header, libc)
        except BaseException as error:  # this child must not go on as its parent
            os.write(2, f"the program could not be started: {error}\n".encode())
        os._exit(127)
    os.close(0)
    reason = _supervise(child, life, header)
    _, status, usage = os.wait4(child, 0)
    files = collect_files(header["root"], before, limits["result_files"], limits["result_file_bytes"])
    report = {
        "exit_code": os.waitstatus_to_exitcode(status),
        "reason": reason,
        "peak_bytes": usage.ru_maxrss * 1024,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
    }
    send_report(result, report, files)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
