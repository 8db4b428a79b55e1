from __future__ import annotations

import pytest

from octollm.contracts.goals import wants_program
from octollm.contracts.kinds import file_kind


@pytest.mark.parametrize(
    ("name", "head", "kind"),
    [
        ("sales.CSV", None, "table"),
        ("events.jsonl", None, "table"),
        ("a/b.parquet", None, "table"),
        ("notes.md", None, "text"),
        ("README", None, "text"),
        ("main.py", None, "text"),
        ("photo.png", None, "binary"),
        ("data.xyz", b"plain \xc3\xa4", "text"),
        ("data.xyz", b"cut in a character \xc3", "text"),
        ("data.xyz", b"\x00\x01", "binary"),
        ("data.xyz", b"\xff\xfe\xff then much more of it", "binary"),
        ("notes", None, "text"),
    ],
)
def test_kinds_of_files(name: str, head: bytes | None, kind: str) -> None:
    assert file_kind(name, head) == kind


@pytest.mark.parametrize(
    ("goal", "program"),
    [
        ("Write a Python function that adds", True),
        ("Implement quicksort", True),
        ("mean(numbers) please", True),
        ("I need a class for a queue", True),
        ("Explain how a function is called", False),
        ("What is a class?", False),
        ("Write a poem about the sea", False),
        ("Translate 'good night' to Spanish", False),
    ],
)
def test_goals_that_want_a_program(goal: str, program: bool) -> None:
    assert wants_program(goal) == program


def test_with_files_something_must_be_made() -> None:
    assert not wants_program("the connect function and its timeout", with_files=True)
    assert wants_program("Write tests for this module", with_files=True)
