from __future__ import annotations

from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octollm.errors import OctoError
from octollm.services.arms.executor.sandbox import MAX_JOB_FILES, check_names, find_name_fault


@pytest.mark.parametrize("name", ["main.py", "pkg/__init__.py", "a b.csv", "ünïcode.csv", ".hidden", "-x", "a..b"])
def test_good_names(name: str) -> None:
    assert find_name_fault(name) == ""


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/etc/passwd",
        "../x",
        "a/../b",
        "a//b",
        "a/",
        "./a",
        ".",
        "..",
        "a\0b",
        "a\nb",
        "a\\b",
        "x" * 201,
        "1/2/3/4/5/6/7/8/9",
    ],
)
def test_bad_names(name: str) -> None:
    assert find_name_fault(name)


def test_a_name_is_unicode() -> None:
    assert find_name_fault("\ud800")


@given(st.text(max_size=60))
def test_a_good_name_stays_inside(name: str) -> None:
    if not find_name_fault(name):
        path = PurePosixPath("/work") / name
        assert path.is_relative_to("/work")
        assert ".." not in path.parts
        assert str(path) == "/work/" + name


def test_a_file_cannot_be_a_folder() -> None:
    with pytest.raises(OctoError, match="both a file and a folder") as caught:
        check_names({"a": b"", "a/b": b""})
    assert caught.value.code == "file_invalid"


def test_files_are_bounded() -> None:
    with pytest.raises(OctoError):
        check_names({f"{i}": b"" for i in range(MAX_JOB_FILES + 1)})
    with pytest.raises(OctoError):
        check_names({"big": bytes(129 * 1024 * 1024)})
