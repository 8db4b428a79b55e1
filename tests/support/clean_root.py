"""A clean Debian in a folder, in which the steps of an image can be carried out without a container engine."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CACHE = Path.home() / ".cache" / "octollm" / "test-roots"
# python:3-slim-bookworm has the interpreter, pip and certificates; these are Debian's own in their place.
PACKAGES = "python3,python3-venv,python3-pip,ca-certificates"
FROM_HOST = (
    "/etc/apt/sources.list",
    "/etc/apt/sources.list.d",
    "/etc/apt/apt.conf.d",
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pip.conf",
)


def need_clean_root() -> Path:
    """Return a root to copy, made once for this machine; where it cannot be made skip, or fail under CI."""
    if os.geteuid() != 0 or shutil.which("debootstrap") is None:
        _without("root and debootstrap are needed to make a clean Debian")
    made = CACHE / "bookworm-python"
    if not (made / ".complete").exists():
        shutil.rmtree(made, ignore_errors=True)
        made.parent.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(made), *_mirror()],
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        if done.returncode != 0:
            _without(f"debootstrap failed: {done.stdout[-600:]}")
        (made / ".complete").touch()
    return made


def _mirror() -> list[str]:
    """Return this machine's own source of packages, if its apt names one."""
    for path in [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*.sources"))]:
        for line in path.read_text().splitlines() if path.is_file() else []:
            words = line.split()
            if words[:1] == ["URIs:"]:
                return [words[1]]
            if words[:1] == ["deb"]:
                return [next(word for word in words if "://" in word)]
    return []


def _without(reason: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


class CleanRoot:
    """A Debian to change. Commands in it see its files, this machine's network, and nothing else.

    ``path`` has the files that were changed or added. Every command runs in an overlay (overlayfs) of it over the clean
    Debian, which so is neither copied nor deleted; where the kernel refuses that, ``path`` is a whole copy.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self._is_copy = False
        self._mount = [f"{self.path}.root", "overlay", f"lowerdir={need_clean_root()},upperdir={self.path}"]
        self._mount[2] += f",workdir={self.path}.work"
        for beside in (".root", ".work"):
            Path(f"{self.path}{beside}").mkdir()
        tried = subprocess.run(self._entering("/bin/true"), capture_output=True, timeout=60, check=False)
        self._is_copy = tried.returncode != 0
        if self._is_copy:
            copy = ["cp", "-a", "--reflink=auto", f"{need_clean_root()}/.", str(folder)]
            subprocess.run(copy, check=True, timeout=120)
        (folder / "etc/ssl/certs").mkdir(parents=True, exist_ok=True)
        shutil.copyfile("/etc/resolv.conf", folder / "etc/resolv.conf")
        for name in FROM_HOST:
            # How this machine reaches package indexes is not what is tested.
            if Path(name).is_dir():
                shutil.copytree(name, folder / name[1:], dirs_exist_ok=True)
            elif Path(name).exists():
                (folder / name[1:]).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(name, folder / name[1:])

    def _entering(self, *words: str) -> list[str]:
        """Return what runs ``words`` in the root, in namespaces that end with it."""
        unshare = ("/usr/bin/unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
        if self._is_copy:
            return [*unshare, "/usr/sbin/chroot", str(self.path), *words]
        mounted = '/usr/bin/mount -t "$2" "$2" -o "$3" "$1" && root=$1 && shift 3 && exec /usr/sbin/chroot "$root" "$@"'
        return [*unshare, "/bin/sh", "-c", mounted, "sh", *self._mount, *words]

    def command(self, *words: str, user: str = "0", folder: str = "/") -> list[str]:
        """Return what runs ``words`` in the root as a user."""
        become = f"exec /usr/bin/setpriv --reuid={user} --regid={user} --clear-groups"
        inner = f'/bin/mount -t proc proc /proc; cd "$1"; shift; {become} "$@"'
        return self._entering("/bin/sh", "-c", inner, "sh", folder, *words)

    def run(self, *words: str, environment: dict[str, str], user: str = "0", folder: str = "/", seconds: float = 400):
        """Run a command to its end; a failure has its last words."""
        done = subprocess.run(
            self.command(*words, user=user, folder=folder),
            env=environment,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert done.returncode == 0, f"{words}: {done.stdout[-1500:]}{done.stderr[-1500:]}"
        return done.stdout
