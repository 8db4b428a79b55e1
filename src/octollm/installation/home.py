"""The folder of one installation: its data, keys and logs, used by one process at a time."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from octollm.clock import IdGenerator
from octollm.concurrency import LockTimeout, file_lock
from octollm.errors import OctoError, SettingError, map_exceptions, map_file_errors

KEYS_LOCK_SECONDS = 20.0
"""How long a start waits for another process that creates the keys."""
HOME_LOCK_SECONDS = 1.0
"""How long a start waits for the home: longer than :func:`find_running` holds the lock."""


class RunningInstallation(msgspec.Struct, frozen=True):
    """The process that uses a home, and the address of its gateway."""

    pid: int
    url: str


@dataclass(frozen=True, slots=True)
class Home:
    """The paths of one installation. ``root`` is ``OCTOLLM_HOME``."""

    root: Path

    @property
    def data(self) -> Path:
        """The folder of the databases."""
        return self.root / "data"

    @property
    def keys(self) -> Path:
        """The folder of the keys, accessible to its owner only."""
        return self.root / "keys"

    @property
    def local_key_file(self) -> Path:
        """The file of the owner's API key."""
        return self.keys / "local.key"

    @property
    def log_file(self) -> Path:
        """The log of every service of the process, one JSON object a line."""
        return self.root / "logs" / "octollm.jsonl"

    @property
    def lock_file(self) -> Path:
        """The file that is locked while the home is in use."""
        return self.root / "lock"

    @property
    def keys_lock_file(self) -> Path:
        """The file that is locked while keys are read or created."""
        return self.root / "keys.lock"

    @property
    def running_file(self) -> Path:
        """The file that names the process that uses the home; valid only while the lock is held."""
        return self.root / "running.json"


def write_private(path: Path, content: bytes, ids: IdGenerator) -> None:
    """Write ``content`` to ``path`` atomically, readable by its owner only.

    Raises ``home_unusable`` when it cannot be written.
    """
    # A new file replaces the old one: a crash leaves one of the two, never half of the new one.
    fresh = path.with_name(f".{path.name}.{ids.hex()}")
    try:
        with map_file_errors(path, "written", code="home_unusable"):
            descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def check_private(path: Path) -> None:
    """Raise :class:`SettingError` when others than the owner may read or write ``path``."""
    if os.name != "posix":
        return
    state = path.lstat()
    kind = "link" if stat.S_ISLNK(state.st_mode) else ""
    if kind or state.st_uid != os.geteuid():
        raise SettingError(
            f"{path} holds secrets and belongs to another user or is a link. Make it yours"
            f" (`chown -R {os.geteuid()} {path}`), or set OCTOLLM_HOME to another folder."
        )
    if state.st_mode & 0o077:
        raise SettingError(
            f"{path} holds secrets and others may read it. Run `chmod -R go-rwx {path}`, then start again."
        )


def read_private(path: Path) -> str:
    """Read the text of a secret file. Raises ``setting_invalid`` when others may read it."""
    check_private(path)
    return path.read_text(encoding="utf-8").strip()


def read_local_key(root: Path) -> str | None:
    """Read the API key of the home's owner; ``None`` when it is missing or unreadable."""
    try:
        return read_private(Home(root).local_key_file)
    except OSError:
        return None


def _make_folders(home: Home) -> None:
    with map_exceptions(
        lambda error: OctoError(
            f"The home {home.root} cannot be used ({error.strerror}). Set OCTOLLM_HOME to a writable folder.",
            code="home_unusable",
        ),
        OSError,
    ):
        home.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for folder in (home.data, home.keys, home.log_file.parent):
            folder.mkdir(mode=0o700, exist_ok=True)
        home.lock_file.touch(0o600)
        home.keys_lock_file.touch(0o600)
    check_private(home.keys)


def _clean_keys(home: Home) -> None:
    for leftover in home.keys.glob(".*"):
        # write_private() of a process that died left it.
        leftover.unlink(missing_ok=True)


@contextlib.asynccontextmanager
async def open_keys(root: Path) -> AsyncGenerator[Home]:
    """Create the folders of a home and lock its keys while the context is open, to read or create them.

    Unlike :func:`open_home` it does not lock the home, which services in separate processes share. Raises
    ``home_in_use`` when another process holds the lock for too long, and as :func:`open_home`.
    """
    home = Home(root)
    await asyncio.to_thread(_make_folders, home)
    try:
        async with file_lock(home.keys_lock_file, KEYS_LOCK_SECONDS):
            await asyncio.to_thread(_clean_keys, home)
            yield home
    except LockTimeout as error:
        raise OctoError(
            f"Another process has held the keys of {root} for more than {KEYS_LOCK_SECONDS:g} s.", code="home_in_use"
        ) from error


@contextlib.asynccontextmanager
async def open_home(root: Path) -> AsyncGenerator[Home]:
    """Create the folders of a home and lock it for this process.

    Raises ``home_in_use`` when another process has locked it, ``home_unusable`` when it cannot be written, and
    ``setting_invalid`` when others may read its keys.
    """
    home = Home(root)
    await asyncio.to_thread(_make_folders, home)
    async with contextlib.AsyncExitStack() as stack:
        try:
            await stack.enter_async_context(file_lock(home.lock_file, HOME_LOCK_SECONDS))
        except LockTimeout as error:
            raise OctoError(_in_use_message(home), code="home_in_use") from error
        stack.callback(home.running_file.unlink, missing_ok=True)
        yield home


def _in_use_message(home: Home) -> str:
    running = _read_running(home)
    who = f"process {running.pid} uses it, at {running.url}" if running else "another process uses it"
    return (
        f"The home {home.root} is in use: {who}. Give your goal to that one with `octollm run`, stop it, or set"
        " OCTOLLM_HOME to another folder."
    )


def _read_running(home: Home) -> RunningInstallation | None:
    try:
        return msgspec.json.decode(home.running_file.read_bytes(), type=RunningInstallation)
    except (OSError, msgspec.DecodeError):
        return None


async def find_running(root: Path) -> RunningInstallation | None:
    """Return the installation that uses the home at ``root`` now; ``None`` when none does."""
    home = Home(root)
    if not await asyncio.to_thread(home.lock_file.exists):
        return None
    try:
        async with file_lock(home.lock_file, 0):
            return None
    except LockTimeout:
        return _read_running(home)
    except OSError:
        return None
