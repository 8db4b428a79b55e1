"""The worker process that runs one program in CPython for WASI.

It loads the machine code, drops its privileges, and runs the program with no system calls but WASI's.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import sys
import threading
import time
from typing import Any

import wasmtime

from octollm.services.arms.executor.supervisor import collect_files, read_header, send_report, unpack_files
from octollm.services.arms.executor.wasi import new_engine

_TICK_MS = 50
_CPU_GRACE = 5
"""Seconds by which the kernel's limit exceeds the monitor's, so that the monitor can report the reason first."""
_PAGE = 64 * 1024


def drop_privileges(user: tuple[int, int]) -> None:
    """Change to the sandbox's user."""
    # The user last: without root privileges the groups could not be changed any more.
    os.setgroups([])
    os.setgid(user[1])
    os.setuid(user[0])


def apply_rlimits(limits: dict[str, Any]) -> None:
    """Apply the kernel's limits, as a second line of defence behind the engine's."""
    cpu = limits["cpu_seconds"] + _CPU_GRACE
    for kind, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_NOFILE, limits["open_files"]),
    ):
        most = resource.getrlimit(kind)[1]
        value = value if most == resource.RLIM_INFINITY else min(value, most)  # noqa: PLW2901
        resource.setrlimit(kind, (value, value))


def measure_usage(folders: tuple[str, ...], most_entries: int) -> tuple[int, int]:
    """Return the bytes and entries under ``folders``; counting stops after ``most_entries``."""
    size = entries = 0
    pending = list(folders)
    while pending and entries <= most_entries:
        try:
            with os.scandir(pending.pop()) as entries_iterator:
                for entry in entries_iterator:
                    entries += 1
                    if entries > most_entries:
                        break
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                    else:
                        size += entry.stat(follow_symlinks=False).st_blocks * 512
        except OSError:
            continue  # the program removed it during the scan
    return size, entries


class ResourceMonitor(threading.Thread):
    """Interrupts the program when it exceeds its disk or CPU limit; ends the process when the parent is gone."""

    def __init__(self, engine: wasmtime.Engine, life: int, limits: dict[str, Any], most_bytes: int) -> None:
        super().__init__(daemon=True)
        self._engine = engine
        self._life = life
        self._limits = limits
        self._most_bytes = most_bytes
        self.reason = ""

    def run(self) -> None:
        """Check the limits every ``_TICK_MS`` until one is exceeded."""
        poll = select.poll()
        poll.register(self._life, select.POLLIN)
        while not self.reason:
            if poll.poll(_TICK_MS):
                os._exit(1)
            size, entries = measure_usage(("work", "tmp"), self._limits["disk_entries"])
            if size > self._most_bytes or entries > self._limits["disk_entries"]:
                self.reason = "killed"
                os.write(2, b"\nended: the work folder is full\n")
            elif time.process_time() > self._limits["cpu_seconds"]:
                self.reason = "timeout"
        self._engine.increment_epoch()


def run_program(engine: wasmtime.Engine, module: wasmtime.Module, header: dict[str, Any]) -> tuple[int, int, bool]:
    """Run the program to its end; return its exit code, its memory in bytes, and whether it was interrupted."""
    store = wasmtime.Store(engine)
    store.set_limits(memory_size=header["limits"]["memory_bytes"])
    store.set_epoch_deadline(1)
    wasi = wasmtime.WasiConfig()
    wasi.argv = header["command"]
    wasi.env = list(header["env"].items())
    wasi.inherit_stdout()
    wasi.inherit_stderr()
    wasi.preopen_dir("work", "/")
    wasi.preopen_dir("tmp", "/tmp")  # noqa: S108 - the program's own
    store.set_wasi(wasi)
    linker = wasmtime.Linker(engine)
    linker.define_wasi()
    instance = linker.instantiate(store, module)
    start, memory = instance.exports(store)["_start"], instance.exports(store)["memory"]
    assert isinstance(start, wasmtime.Func)
    assert isinstance(memory, wasmtime.Memory)
    code, interrupted = 0, False
    try:
        start(store)
    except wasmtime.ExitTrap as exit_trap:
        code = exit_trap.code
    except wasmtime.Trap as trap:
        interrupted = trap.trap_code == wasmtime.TrapCode.INTERRUPT
        code = -signal.SIGKILL if interrupted else -signal.SIGABRT
        if not interrupted:
            os.write(2, f"\n{trap.message}\n".encode())
    return code, memory.size(store) * _PAGE, interrupted


def main(result: int, life: int) -> None:
    """Run the job from descriptor 0."""
    stream = open(0, "rb", closefd=False)  # noqa: SIM115
    header = read_header(stream)
    limits = header["limits"]
    engine = new_engine()
    # Before dropping privileges, because only the service's own user can read the cache.
    module = wasmtime.Module.deserialize_file(engine, header["module"])
    os.chdir(header["folder"])
    if header["identity"]:
        drop_privileges(header["identity"])
    before = unpack_files(stream, header["files"], "work", limits["result_file_bytes"])
    os.close(0)
    # After unpacking, because a file of the job may be larger than the program may write (RLIMIT_FSIZE).
    apply_rlimits(limits)
    size, _ = measure_usage(("work",), limits["disk_entries"])
    monitor = ResourceMonitor(engine, life, limits, size + limits["disk_bytes"])
    monitor.start()
    code, peak, interrupted = run_program(engine, module, header)
    files = collect_files("work", before, limits["result_files"], limits["result_file_bytes"])
    report = {
        "exit_code": code,
        # A program that exited by itself just before the interrupt was not ended by the limit.
        "reason": monitor.reason if interrupted else "",
        "peak_bytes": peak,
        "cpu_seconds": time.process_time(),
    }
    send_report(result, report, files)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
