"""What the sandbox's user can reach, and the copy of what it cannot."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from octollm.errors import OctoError
from octollm.services.arms.executor.bubblewrap import can_read, copy_once, find_interpreter, find_package
from octollm.services.arms.executor.process import SandboxUser

STRANGER = SandboxUser(61717, 61717)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    (source / "lib" / "site-packages").mkdir(parents=True)
    (source / "lib" / "site-packages" / "other.py").write_text("x")
    (source / "lib" / "open.py").write_text("open")
    (source / "lib" / "closed.py").write_text("closed")
    (source / "lib" / "closed.py").chmod(0o600)
    (source / "program").write_text("run")
    (source / "program").chmod(0o700)
    return source


def test_reaches(tmp_path: Path) -> None:
    assert can_read(STRANGER, Path("/usr"), Path("/usr/bin"))
    assert can_read(None, Path("/usr"))
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o700)
    (folder / "file").write_text("x")
    (folder / "file").chmod(0o644)
    assert not can_read(STRANGER, folder)
    assert not can_read(STRANGER, folder / "file")
    assert not can_read(SandboxUser(os.getuid() + 1, os.getgid() + 1), folder / "file")


def test_a_copy_can_be_read_by_all(tree: Path, tmp_path: Path) -> None:
    copy = copy_once(tree, ["program", "lib"], (tmp_path / "cache",))
    assert sorted(str(path.relative_to(copy)) for path in copy.rglob("*")) == [
        "lib",
        "lib/closed.py",
        "lib/open.py",
        "program",
    ]
    assert (copy / "lib" / "closed.py").read_text() == "closed"
    for path in [copy, *copy.rglob("*")]:
        assert path.stat().st_mode & 0o004
    assert (copy / "program").stat().st_mode & 0o001
    assert (tree / "lib" / "closed.py").stat().st_mode & 0o777 == 0o600


def test_it_is_made_once(tree: Path, tmp_path: Path) -> None:
    caches = (tmp_path / "cache",)
    first = copy_once(tree, ["program", "lib"], caches)
    assert copy_once(tree, ["program", "lib"], caches) == first
    (tree / "program").write_text("run differently")
    assert copy_once(tree, ["program", "lib"], caches) != first
    assert len(list(caches[0].iterdir())) == 2


def test_the_first_cache_that_can_be_written(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    copy = copy_once(tree, ["program"], (tmp_path / "file" / "below", tmp_path / "file", tmp_path / "good"))
    assert copy.parent == tmp_path / "good"
    with pytest.raises(OctoError, match="every user can read") as caught:
        copy_once(tree, ["program"], (tmp_path / "file",))
    assert caught.value.code == "no_sandbox"


def test_a_cache_of_another_user_is_not_used(tree: Path, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to give a folder away")
    cache = tmp_path / "cache"
    cache.mkdir()
    os.chown(cache, 61717, 61717)
    with pytest.raises(OctoError):
        copy_once(tree, ["program"], (cache,))


def test_a_link_is_not_a_cache(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "cache").symlink_to(tmp_path / "real")
    with pytest.raises(OctoError):
        copy_once(tree, ["program"], (tmp_path / "cache",))


def test_this_interpreter(tmp_path: Path) -> None:
    found = find_interpreter(STRANGER, (tmp_path / "cache",))
    assert found.executable.endswith(f"python{sys.version_info.major}.{sys.version_info.minor}")
    for source, inside in found.bind_mounts:
        assert (source / Path(found.executable).relative_to(inside)).is_file()


def test_duckdb(tmp_path: Path) -> None:
    found = find_package("duckdb", STRANGER, (tmp_path / "cache",))
    assert found is not None
    names = {Path(inside).name.split(".")[0].split("-")[0] for _, inside in found}
    assert names >= {"duckdb", "_duckdb"}
    assert all(source.exists() for source, _ in found)
