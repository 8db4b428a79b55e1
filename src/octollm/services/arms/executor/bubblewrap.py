"""The sandbox by bubblewrap: namespaces without anything of the host in them, a system-call filter, and limits."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from octollm.clock import Clock, SystemClock
from octollm.errors import OctoError
from octollm.services.arms.executor import inside
from octollm.services.arms.executor.interpreter import (
    DUCKDB_HOME,
    ROOT_CACHES,
    BindMounts,
    Interpreter,
    find_duckdb,
    find_interpreter,
)
from octollm.services.arms.executor.names import check_names
from octollm.services.arms.executor.process import SandboxUser, create_anonymous_file, create_job_file, run_bounded
from octollm.services.arms.executor.sandbox import Job, Limits, SandboxResult
from octollm.services.arms.executor.seccomp import Architecture, build_filter, detect_architecture

WORK_FOLDER = "/work"
"""The work folder inside."""
TEMPORARY_FOLDER = "/tmp"  # noqa: S108 - the sandbox's own
SANDBOX_USER = SandboxUser(61717, 61717)
"""The user that a service which runs as root gives its sandbox; no system hands this number out."""


class Bubblewrap:
    """Runs each job in namespaces of its own.

    Nothing of the host can be written. Read-only are ``/usr``, the interpreter and, for SQL, the DuckDB package;
    ``/tmp`` and the work folder are in memory and sized; there is no ``/proc``. Made by :meth:`open`.
    """

    name = "bubblewrap"

    def __init__(
        self,
        executable: str,
        architecture: Architecture,
        interpreter: Interpreter,
        duckdb: BindMounts | None,
        user: SandboxUser | None,
        *,
        clock: Clock,
    ) -> None:
        self._executable = executable
        self._interpreter = interpreter
        self._duckdb = duckdb
        self._user = user
        self._clock = clock
        self._supervisor = Path(inside.__file__).read_text()
        self._base_filter = build_filter(architecture, allow_processes=True)
        self._program_filter = build_filter(architecture, allow_processes=False)

    @classmethod
    def open(
        cls, *, executable: str | None = None, clock: Clock | None = None, caches: tuple[Path, ...] = ROOT_CACHES
    ) -> Bubblewrap:
        """Find bubblewrap and an interpreter for it. Copies the interpreter where the sandbox's user cannot read it.

        Raises ``OctoError`` (``no_sandbox``) saying what is missing. Whether the kernel allows it shows in a run.
        """
        found = executable or shutil.which("bwrap")
        if found is None:
            raise OctoError("bubblewrap (bwrap) is not installed", code="no_sandbox")
        machine = detect_architecture()
        if machine is None:
            raise OctoError(f"no system-call filter for {os.uname().machine}", code="no_sandbox")
        identity = SANDBOX_USER if os.geteuid() == 0 else None
        interpreter = find_interpreter(identity, caches)
        duckdb = find_duckdb(identity, caches)
        return cls(found, machine, interpreter, duckdb, identity, clock=clock or SystemClock())

    async def run(self, job: Job) -> SandboxResult:
        """Run ``job``; see :class:`octollm.services.arms.executor.sandbox.Sandbox`."""
        check_names(job.files)
        env = {
            "PATH": "/usr/bin:/bin",
            "HOME": WORK_FOLDER,
            "LANG": "C.UTF-8",
            # Otherwise each thread reserves 64 MiB of the address space, which is what the limit counts.
            "MALLOC_ARENA_MAX": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONNOUSERSITE": "1",
            "PYTHONUNBUFFERED": "1",
            **dict(self._interpreter.env),
        }
        if job.needs_duckdb:
            if self._duckdb is None:
                raise OctoError("SQL needs the duckdb package", code="no_sandbox")
            env["PYTHONPATH"] = DUCKDB_HOME
        header = {
            "command": [self._interpreter.executable, *job.command],
            "env": env,
            "root": WORK_FOLDER,
            "folders": [WORK_FOLDER, TEMPORARY_FOLDER],
            "filter": self._program_filter.hex(),
        }
        with create_job_file(job, header) as input_file, create_anonymous_file([self._base_filter]) as filter_file:
            return await run_bounded(
                lambda result, life: self._arguments(job, filter_file.fileno(), result, life),
                job=input_file,
                limits=job.limits,
                clock=self._clock,
                user=self._user,
                pass_fds=(filter_file.fileno(),),
            )

    def _arguments(self, job: Job, filter_fd: int, result: int, life: int) -> Sequence[str]:
        return [
            self._executable,
            *("--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session"),
            *("--as-pid-1", "--cap-drop", "ALL", "--clearenv", "--hostname", "sandbox"),
            *("--uid", "1000", "--gid", "1000"),
            *_environment_options(self._interpreter),
            *self._file_system(job),
            *("--chdir", "/", "--seccomp", str(filter_fd)),
            *("--", self._interpreter.executable, "-I", "-S", "-c", self._supervisor, str(result), str(life)),
        ]

    def _file_system(self, job: Job) -> list[str]:
        options = ["--ro-bind", "/usr", "/usr"]
        for name in ("bin", "lib", "lib64", "lib32"):
            host = Path("/", name)
            if host.is_symlink():
                options += ["--symlink", str(host.readlink()), str(host)]
            elif host.is_dir():
                options += ["--ro-bind", str(host), str(host)]
        duckdb = self._duckdb or () if job.needs_duckdb else ()
        for source, place in (*self._interpreter.bind_mounts, *duckdb):
            options += ["--ro-bind", str(source), place]
        for folder in self._interpreter.masked_folders:
            options += ["--tmpfs", folder, "--remount-ro", folder]
        sizes = _tmpfs_sizes(job.limits, sum(map(len, job.files.values())))
        for folder, size in zip((WORK_FOLDER, TEMPORARY_FOLDER), sizes, strict=True):
            options += ["--size", str(size), "--tmpfs", folder]
        return [*options, "--dev", "/dev", "--remount-ro", "/dev", "--remount-ro", "/"]


def _environment_options(interpreter: Interpreter) -> list[str]:
    return [word for name, value in interpreter.env for word in ("--setenv", name, value)]


def _tmpfs_sizes(limits: Limits, input_bytes: int) -> tuple[int, int]:
    """Return the sizes of the work folder and of ``/tmp``; each file of the job takes whole pages."""
    return input_bytes + limits.disk_bytes + 64 * 4096, limits.disk_bytes
