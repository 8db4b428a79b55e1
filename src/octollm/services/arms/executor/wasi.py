"""The sandbox by WebAssembly: CPython for WASI under wasmtime, in a worker process of its own."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
from pathlib import Path

from octollm.clock import Clock, SystemClock
from octollm.errors import OctoError
from octollm.services.arms.executor.bubblewrap import SANDBOX_USER
from octollm.services.arms.executor.names import check_names
from octollm.services.arms.executor.process import SandboxUser, create_job_file, run_bounded
from octollm.services.arms.executor.sandbox import Job, SandboxResult
from octollm.services.arms.executor.wasi_python import compile_wasi_python, fetch_wasi_python, find_wasi_python

_WORKER = "octollm.services.arms.executor.wasi_inside"


class Wasi:
    """Runs each job in an interpreter that has no system calls but those of WASI.

    It has the standard library without threads, processes and sockets, and no DuckDB. Made by :meth:`open`.
    """

    name = "wasi"

    def __init__(self, module: Path, *, clock: Clock | None = None) -> None:
        self._module = module
        self._clock = clock or SystemClock()
        self._user = SANDBOX_USER if os.geteuid() == 0 else None

    @classmethod
    async def open(cls, cache_dir: Path, *, fetch: bool = True, clock: Clock | None = None) -> Wasi:
        """Find the interpreter in ``cache_dir``, or ``fetch`` it, and compile it once.

        Raises ``OctoError`` (``no_sandbox``) when there is none.
        """
        source = await asyncio.to_thread(find_wasi_python, cache_dir)
        if source is None:
            if not fetch:
                raise OctoError(f"there is no CPython for WASI in {cache_dir}", code="no_sandbox")
            source = await fetch_wasi_python(cache_dir)
        return cls(await asyncio.to_thread(compile_wasi_python, source, cache_dir), clock=clock)

    async def run(self, job: Job) -> SandboxResult:
        """Run ``job``; see :class:`octollm.services.arms.executor.sandbox.Sandbox`."""
        if job.needs_duckdb:
            raise OctoError(
                "SQL needs the bubblewrap sandbox; the WASI sandbox in use runs Python alone", code="no_sandbox"
            )
        check_names(job.files)
        folder = await asyncio.to_thread(_create_run_folder, self._user)
        try:
            header = {
                "command": ["python", *job.command],
                "env": {"HOME": "/", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"},
                "module": str(self._module),
                "folder": str(folder),
                "identity": [self._user.uid, self._user.gid] if self._user else None,
            }
            with create_job_file(job, header) as input_file:
                return await run_bounded(
                    lambda result, life: [sys.executable, "-sP", "-m", _WORKER, str(result), str(life)],
                    job=input_file,
                    limits=job.limits,
                    clock=self._clock,
                    # The worker finds its modules where this process does, and takes nothing else over.
                    env={"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                )
        finally:
            await asyncio.shield(asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True))


def _create_run_folder(user: SandboxUser | None) -> Path:
    """Make the run's folder, with the two folders that its program sees; these are the sandbox's user's own."""
    folder = Path(tempfile.mkdtemp(prefix="octollm-run-"))
    folder.chmod(0o711)  # that user walks through it
    for name in ("work", "tmp"):
        place = folder / name
        place.mkdir(mode=0o700)
        if user:
            os.chown(place, user.uid, user.gid)
    return folder
