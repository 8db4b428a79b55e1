"""The bubblewrap sandbox.

It combines namespaces, a system-call filter, resource limits, and a read-only Python interpreter with packages that the
sandbox's user can read.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from octollm import OctoError
from octollm.clock import Clock, SystemClock
from octollm.services.arms.executor import supervisor as inside
from octollm.services.arms.executor.process import SandboxUser, create_anonymous_file, create_job_file, run_bounded
from octollm.services.arms.executor.sandbox import Job, Limits, SandboxResult, check_names
from octollm.services.arms.executor.seccomp import Architecture, build_filter, detect_architecture

PYTHON_HOME = "/opt/python"
"""Mount point of an interpreter that is not under /usr."""
PACKAGES_HOME = "/opt/packages"
"""Mount point of the distributions of a job, the only third-party ones inside."""
SANDBOX_PACKAGES = ("duckdb", "msgspec", "charset-normalizer", "lxml", "pypdfium2", "python-calamine")
"""Distributions that a job may have."""

ROOT_CACHES = (Path("/var/cache/octollm"), Path("/tmp/octollm-sandbox"))  # noqa: S108 - its owner is checked
"""Caches for copies of the interpreter when the service runs as root; the first writable one is used."""

BindMounts = tuple[tuple[Path, str], ...]
"""Host path → path inside, read-only."""

_VERSION = f"python{sys.version_info.major}.{sys.version_info.minor}"
_EXCLUDED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "idlelib", "ensurepip", "turtledemo"})


@dataclass(frozen=True, slots=True)
class Interpreter:
    """The bind mounts (host path → path inside, read-only) that provide Python, and its executable inside."""

    executable: str
    bind_mounts: BindMounts
    masked_folders: tuple[str, ...]
    """Folders of third-party packages, hidden so that a program can import only the standard library."""
    env: tuple[tuple[str, str], ...]


def find_interpreter(user: SandboxUser | None, caches: tuple[Path, ...] = ROOT_CACHES) -> Interpreter:
    """Find the interpreter that runs this process, without its virtual environment.

    ``user`` is the user that the sandbox runs as, ``None`` for this process's own.
    Raises ``OctoError`` (``no_sandbox``) when it can be neither bound nor copied.
    """
    prefix = Path(sys.base_prefix).resolve()
    binary = f"bin/{_VERSION}"
    if prefix == Path("/usr") or prefix.is_relative_to("/usr"):
        home, binds = str(prefix), ()
    else:
        source = prefix
        if not can_read(user, prefix, prefix / binary, prefix / "lib" / _VERSION / "os.py"):
            source = copy_once(prefix, [f"bin/{_VERSION}", *_shared_libraries(prefix), f"lib/{_VERSION}"], caches)
        home, binds = PYTHON_HOME, ((source, PYTHON_HOME),)
    masked = [f"{home}/lib/{_VERSION}/site-packages", f"/usr/local/lib/{_VERSION}/dist-packages"]
    masked.append("/usr/lib/python3/dist-packages")
    sources = {inside: source for source, inside in binds}
    return Interpreter(
        executable=f"{home}/{binary}",
        bind_mounts=binds,
        masked_folders=tuple(m for m in masked if _host_path(m, sources).is_dir()),
        env=() if home == "/usr" else (("LD_LIBRARY_PATH", f"{home}/lib"),),
    )


def find_package(distribution: str, user: SandboxUser | None, caches: tuple[Path, ...] = ROOT_CACHES) -> BindMounts:
    """Return the binds that make a distribution importable from :data:`PACKAGES_HOME`; none if it is not installed.

    Raises ``OctoError`` (``no_sandbox``) when it can be neither bound nor copied.
    """
    try:
        found = importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ()
    folder = Path(str(found.locate_file("")))
    # The metadata goes along, because a package may ask for its own version.
    names = sorted({file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")})
    paths = [folder / name for name in names]
    if not can_read(user, *paths, *(path / "__init__.py" for path in paths if (path / "__init__.py").is_file())):
        folder = copy_once(folder, names, caches)
    return tuple((folder / name, f"{PACKAGES_HOME}/{name}") for name in names)


def _shared_libraries(prefix: Path) -> list[str]:
    return [f"lib/{file.name}" for file in sorted((prefix / "lib").glob("*.so*"))]


def _host_path(inside: str, sources: dict[str, Path]) -> Path:
    for home, source in sources.items():
        if Path(inside).is_relative_to(home):
            return source / Path(inside).relative_to(home)
    return Path(inside)


def can_read(user: SandboxUser | None, *paths: Path) -> bool:
    """Return whether ``user`` can traverse to ``paths`` and read them, by permission bits.

    The bits, because ``access(2)`` answers only for this process's own user.
    """
    if user is None:
        return all(os.access(path, os.R_OK) for path in paths)
    for path in paths:
        resolved = path.resolve()
        if not all(_has_permission(user, part, 0o1) for part in resolved.parents):
            return False
        if not _has_permission(user, resolved, 0o5 if resolved.is_dir() else 0o4):
            return False
    return True


def _has_permission(user: SandboxUser, path: Path, permission: int) -> bool:
    status = path.stat()
    shift = 6 if status.st_uid == user.uid else 3 if status.st_gid == user.gid else 0
    return (status.st_mode >> shift) & permission == permission


def copy_once(source: Path, names: list[str], caches: tuple[Path, ...]) -> Path:
    """Copy ``names`` of ``source`` into a cache, once per version of the files, and return the folder."""
    # Inode, size and time stand for the content: hashing a whole interpreter at each start would take seconds.
    state = hashlib.sha256(str(source).encode())
    for name in names:
        status = (source / name).stat()
        state.update(f"\n{name} {status.st_ino} {status.st_size} {status.st_mtime_ns}".encode())
    cache = _first_writable(caches)
    target = cache / state.hexdigest()[:32]
    if target.is_dir():
        return target
    # Copied beside the target and renamed, since a rename is atomic: no process ever sees half a copy.
    staging = Path(tempfile.mkdtemp(dir=cache))
    try:
        staging.chmod(0o755)
        for name in names:
            _copy_tree(source / name, staging / name)
        try:
            staging.rename(target)
        except OSError:
            if not target.is_dir():  # another process was first
                raise
    except OSError as exc:
        raise OctoError(f"{source} cannot be copied for the sandbox's user: {exc}", code="no_sandbox") from exc
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def _first_writable(caches: tuple[Path, ...]) -> Path:
    for cache in caches:
        try:
            cache.mkdir(mode=0o755, exist_ok=True)
            cache.chmod(0o755)
            status = cache.lstat()
        except OSError:
            continue
        # /tmp is writable by everyone: another user could create this folder first, with an interpreter of theirs.
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and os.access(cache, os.W_OK):
            return cache
    locations = ", ".join(map(str, caches))
    raise OctoError(
        f"the sandbox's user cannot reach the interpreter, and no copy can be kept in {locations}; "
        "install Python where every user can read it",
        code="no_sandbox",
    )


def _copy_tree(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if not source.is_dir():
        _link_or_copy(str(source), str(target))
        return
    shutil.copytree(source, target, ignore=_ignored_names, copy_function=_link_or_copy)
    for folder, _, _ in os.walk(target):
        Path(folder).chmod(0o755)


def _ignored_names(_: str, names: list[str]) -> set[str]:
    return {name for name in names if name in _EXCLUDED_FOLDERS or name.startswith("config-")}


def _link_or_copy(source: str, target: str) -> str:
    """Hard-link ``source`` if everyone may read it and the file system allows it, else copy it as readable."""
    path = Path(source).resolve()
    mode = path.stat().st_mode
    if mode & 0o004:
        try:
            Path(target).hardlink_to(path)
            return target
        except OSError:
            pass
    shutil.copy2(path, target)  # keeps the modification time, without which cached bytecode would be stale
    Path(target).chmod(0o755 if mode & 0o100 else 0o644)
    return target


WORK_FOLDER = "/work"
"""The program's working directory."""
TEMPORARY_FOLDER = "/tmp"  # noqa: S108 - the sandbox's own
SANDBOX_USER = SandboxUser(61717, 61717)
"""The sandbox's user when the service runs as root; distributions do not assign this number."""


class Bubblewrap:
    """Runs each job in its own namespaces.

    The program can write nothing of the host. ``/usr``, the interpreter and the packages of the job are read-only;
    ``/tmp`` and the working directory are size-limited tmpfs. There is no ``/proc``: started by root, a program could
    write ``/proc/sys/kernel/core_pattern`` through it. Created by :meth:`open`.
    """

    name = "bubblewrap"

    def __init__(
        self,
        executable: str,
        architecture: Architecture,
        interpreter: Interpreter,
        packages: Mapping[str, BindMounts],
        user: SandboxUser | None,
        *,
        clock: Clock,
    ) -> None:
        self._executable = executable
        self._interpreter = interpreter
        self._packages = packages
        self._user = user
        self._clock = clock
        self._supervisor = Path(inside.__file__).read_text()
        # In a container /proc/sys is read-only, and bubblewrap ends when it cannot set the limit of user namespaces to
        # zero there. The filter alone refuses new namespaces, too.
        is_read_only = os.statvfs("/proc/sys/user").f_flag & os.ST_RDONLY
        self._user_namespaces = () if is_read_only else ("--disable-userns",)
        # Two filters, because the supervisor must fork to start the program, which itself must not fork.
        self._base_filter = build_filter(architecture, allow_processes=True)
        self._program_filter = build_filter(architecture, allow_processes=False)

    @classmethod
    def open(
        cls, *, executable: str | None = None, clock: Clock | None = None, caches: tuple[Path, ...] = ROOT_CACHES
    ) -> Bubblewrap:
        """Find bubblewrap and an interpreter for it. Copies the interpreter where the sandbox's user cannot read it.

        Raises ``OctoError`` (``no_sandbox``) that names what is missing. Whether the kernel permits namespaces is only
        known after a run; see :func:`octollm.services.arms.executor.selection.probe_sandbox`.
        """
        bwrap = executable or shutil.which("bwrap")
        if bwrap is None:
            raise OctoError("bubblewrap (bwrap) is not installed", code="no_sandbox")
        machine = detect_architecture()
        if machine is None:
            raise OctoError(f"no system-call filter for {os.uname().machine}", code="no_sandbox")
        identity = SANDBOX_USER if os.geteuid() == 0 else None
        interpreter = find_interpreter(identity, caches)
        packages = {name: find_package(name, identity, caches) for name in SANDBOX_PACKAGES}
        return cls(bwrap, machine, interpreter, packages, identity, clock=clock or SystemClock())

    async def run(self, job: Job) -> SandboxResult:
        """Run ``job``; see :class:`octollm.services.arms.executor.sandbox.Sandbox`."""
        check_names(job.files)
        env = {
            "PATH": "/usr/bin:/bin",
            "HOME": WORK_FOLDER,
            "LANG": "C.UTF-8",
            # Otherwise glibc reserves 64 MiB of address space for each thread, and RLIMIT_AS counts address space.
            "MALLOC_ARENA_MAX": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONNOUSERSITE": "1",
            "PYTHONUNBUFFERED": "1",
            **dict(self._interpreter.env),
        }
        missing = [name for name in job.packages if not self._packages.get(name)]
        if missing:
            raise OctoError(f"the job needs {', '.join(missing)}, which is not installed", code="no_sandbox")
        if job.packages:
            env["PYTHONPATH"] = PACKAGES_HOME
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
            *("--unshare-all", "--unshare-user", *self._user_namespaces, "--die-with-parent", "--new-session"),
            *("--as-pid-1", "--cap-drop", "ALL", "--clearenv", "--hostname", "sandbox"),
            *("--uid", "1000", "--gid", "1000"),
            *_environment_options(self._interpreter),
            *self._file_system(job),
            *("--chdir", "/", "--seccomp", str(filter_fd)),
            # Isolated (-I -S): the supervisor imports neither files of the job nor third-party packages.
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
        packages = [bind for name in job.packages for bind in self._packages[name]]
        for source, place in (*self._interpreter.bind_mounts, *packages):
            options += ["--ro-bind", str(source), place]
        for folder in self._interpreter.masked_folders:
            options += ["--tmpfs", folder, "--remount-ro", folder]
        sizes = _tmpfs_sizes(job.limits, sum(map(len, job.files.values())))
        for folder, size in zip((WORK_FOLDER, TEMPORARY_FOLDER), sizes, strict=True):
            options += ["--size", str(size), "--tmpfs", folder]
        # The root becomes read-only last: bubblewrap creates the mount points of all mounts above in it.
        return [*options, "--dev", "/dev", "--remount-ro", "/dev", "--remount-ro", "/"]


def _environment_options(interpreter: Interpreter) -> list[str]:
    return [word for name, value in interpreter.env for word in ("--setenv", name, value)]


def _tmpfs_sizes(limits: Limits, input_bytes: int) -> tuple[int, int]:
    """Return the sizes of the working directory and of ``/tmp``; 64 pages extra, since tmpfs rounds each file up."""
    return input_bytes + limits.disk_bytes + 64 * 4096, limits.disk_bytes
