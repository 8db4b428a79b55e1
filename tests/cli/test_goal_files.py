"""What may be sent with a goal is decided before anything is sent."""

from __future__ import annotations

import pytest

from octollm.cli.goals import read_goal_files, validate_goal
from octollm.cli.runtime import EXIT_USAGE, exit_code_for
from octollm.contracts.task import MAX_FILE_BYTES, MAX_FILES, MAX_GOAL
from octollm.errors import OctoError


def refused(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(OctoError) as caught:
        read_goal_files([path])
    assert caught.value.code == "file_invalid"
    assert name in caught.value.detail
    assert exit_code_for(caught.value) == EXIT_USAGE
    return caught.value.detail


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("notes.txt", "Käse\n".encode()),
        ("notes.md", b""),
        ("README", b"plain"),
        ("rows.csv", b"a,b\n1,2\n"),
        ("rows.jsonl", b'{"a": 1}\n'),
        ("rows.parquet", b"PAR1\x00\xff\x00PAR1"),
        ("code.unknown", b"text after all\n"),
        ("picture.png", b"\x89PNG\r\n\x1a\n\x00"),
        ("shop.sqlite3", b"SQLite format 3\x00"),
        ("latin.md", "Käse".encode("latin-1")),
        ("wide.csv", "a,b".encode("utf-16")),
        ("offer.pdf", b"%PDF-1.7 and more"),
    ],
)
def test_texts_tables_and_what_an_arm_may_read_are_taken(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    [file] = read_goal_files([path])
    assert (file.name, file.content) == (name, content)
    assert "/" in file.media_type


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("notes.txt", bytes(range(256))),
        ("rows.csv", b"\x7fELF\x02\x01"),
        ("not.parquet", b"PAR1 and no more"),
    ],
)
def test_other_bytes_than_the_name_says_are_refused(tmp_path, name, content):
    refused(tmp_path, name, content)


def test_the_limit_is_exact(tmp_path):
    path = tmp_path / "big.txt"
    path.write_bytes(b"a" * MAX_FILE_BYTES)
    assert len(read_goal_files([path])[0].content) == MAX_FILE_BYTES
    assert "20 MiB" in refused(tmp_path, "bigger.txt", b"a" * (MAX_FILE_BYTES + 1))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(OctoError, match=r"There is no file .*gone\.txt"):
        read_goal_files([tmp_path / "gone.txt"])


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(OctoError, match="is a folder"):
        read_goal_files([tmp_path])


def test_two_files_of_one_name_are_told_apart_by_their_folders(tmp_path):
    (tmp_path / "a").mkdir()
    for path in (tmp_path / "x.txt", tmp_path / "a" / "x.txt"):
        path.write_text("x")
    files = read_goal_files([tmp_path / "x.txt", tmp_path / "a" / "x.txt"])
    assert [file.name for file in files] == [f"{tmp_path.name}-x.txt", "a-x.txt"]


def test_one_file_given_twice_is_refused(tmp_path):
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(OctoError, match=r"Two files are called .*x\.txt"):
        read_goal_files([tmp_path / "x.txt", tmp_path / "x.txt"])


def test_too_many_files_are_refused(tmp_path):
    with pytest.raises(OctoError, match=str(MAX_FILES)):
        read_goal_files([tmp_path / str(number) for number in range(MAX_FILES + 1)])


def test_a_goal_is_stripped():
    assert validate_goal("  do it\n") == "do it"


@pytest.mark.parametrize("goal", ["", " \n", "x" * (MAX_GOAL + 1)])
def test_a_bad_goal_is_refused(goal):
    with pytest.raises(OctoError) as caught:
        validate_goal(goal)
    assert caught.value.code == "goal_invalid"
    assert exit_code_for(caught.value) == EXIT_USAGE
