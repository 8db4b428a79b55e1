"""Packing and unpacking the work folder, with the tricks that a program may leave there."""

from __future__ import annotations

import io
import os
from pathlib import Path

from octollm.services.arms.executor.supervisor import collect_files, exceeds_entry_limit, unpack_files


def made(root: Path, before: dict[str, bytes] | None = None, most: int = 16) -> dict[str, bytes]:
    return dict(collect_files(str(root), before or {}, most, 1024))


def test_unpack_and_collect(tmp_path: Path) -> None:
    before = unpack_files(io.BytesIO(b"onetwo"), [("a.txt", 3), ("pkg/b.txt", 3)], str(tmp_path), 1024)
    assert before == {"a.txt": b"one", "pkg/b.txt": b"two"}
    assert made(tmp_path, before) == {}
    (tmp_path / "a.txt").write_text("changed")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "c.txt").write_text("grüße")
    assert made(tmp_path, before) == {"a.txt": b"changed", "new/c.txt": "grüße".encode()}


def test_large_inputs_are_not_kept(tmp_path: Path) -> None:
    assert unpack_files(io.BytesIO(bytes(2000)), [("a", 2000)], str(tmp_path), 1024) == {}


def test_links_and_special_files_are_passed_over(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key.txt").write_text("secret")
    root = tmp_path / "root"
    root.mkdir()
    (root / "link.txt").symlink_to(secret / "key.txt")
    (root / "folder").symlink_to(secret)
    (root / "loop").symlink_to(root)
    os.mkfifo(root / "pipe")
    (root / "locked.txt").write_text("x")
    (root / "binary").write_bytes(b"\xff\xfe")
    (root / "nul").write_bytes(b"a\0b")
    (root / "large.txt").write_text("x" * 1025)
    (root / "__pycache__").mkdir()
    (root / "__pycache__" / "a.txt").write_text("x")
    (root / os.fsdecode(b"bad\xff.txt")).write_text("x")
    assert made(root) == {"locked.txt": b"x"}


def test_bounds(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number:02}.txt").write_text("x")
    assert sorted(made(tmp_path)) == [f"{number:02}.txt" for number in range(16)]
    deep = tmp_path / "z"
    for _ in range(12):
        deep /= "d"
    deep.mkdir(parents=True)
    (deep / "far.txt").write_text("x")
    assert not any("far" in name for name in made(tmp_path, most=100))


def test_a_folder_that_vanishes(tmp_path: Path) -> None:
    assert made(tmp_path / "nothing") == {}


def test_full(tmp_path: Path) -> None:
    assert exceeds_entry_limit([str(tmp_path)], -1)
    assert not exceeds_entry_limit([str(tmp_path)], 2**62)
