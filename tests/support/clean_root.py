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
        self._root = f"{self.path}.root"
        for beside in (self._root, f"{self.path}.work"):
            Path(beside).mkdir()
        layers = f"lowerdir={need_clean_root()},upperdir={self.path},workdir={self.path}.work"
        self._mount = f"mount -t overlay overlay -o {layers} {self._root}"
        tried = subprocess.run(self._enter_command("/bin/true"), capture_output=True, timeout=60, check=False)
        if tried.returncode != 0:
            self._mount = f"mount --bind {self.path} {self._root}"
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

    def _enter_command(self, *words: str) -> list[str]:
        """Return what runs ``words`` in the root, in namespaces that end with it."""
        # As an engine does it: in a chroot the kernel refuses user namespaces, which the sandbox needs.
        enter = f"{self._mount} && cd {self._root} && mount -t proc proc proc && /usr/sbin/pivot_root . ."
        enter += ' && /usr/bin/umount --lazy . && cd / && exec "$@"'
        unshare = ("/usr/bin/unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
        return [*unshare, "/bin/sh", "-c", enter, "sh", *words]

    def command(self, *words: str, user: str = "0", folder: str = "/") -> list[str]:
        """Return what runs ``words`` in the root as a user."""
        become = f"exec /usr/bin/setpriv --reuid={user} --regid={user} --clear-groups"
        inner = f'cd "$1"; shift; {become} "$@"'
        return self._enter_command("/bin/sh", "-c", inner, "sh", folder, *words)

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
