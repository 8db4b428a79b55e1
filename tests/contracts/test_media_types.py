from __future__ import annotations

import mimetypes

import pytest

from octollm.contracts.media_types import DEFAULT_MEDIA_TYPE, accepts_file, file_kind, media_type_of


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
        ("drawing.svg", None, "text"),
        ("page.xhtml", None, "text"),
        ("never.heard", None, "text"),
        ("program.exe", None, "binary"),
        ("shop.sqlite3", None, "binary"),
    ],
)
def test_kinds_of_files(name: str, head: bytes | None, kind: str) -> None:
    assert file_kind(name, head) == kind


@pytest.mark.parametrize(
    ("accepted", "name", "accepts"),
    [
        (("application/vnd.sqlite3",), "a/Shop.SQLITE3", True),
        (("application/vnd.sqlite3",), "shop.csv", False),
        (("image/*",), "photo.png", True),
        (("image/*",), "image", False),
        (("application/octet-stream",), "never.heard", True),
        ((), "photo.png", False),
    ],
)
def test_files_that_an_arm_accepts(accepted: tuple[str, ...], name: str, accepts: bool) -> None:
    assert accepts_file(accepted, name) == accepts


def test_what_a_name_means_does_not_depend_on_the_machine() -> None:
    mimetypes.add_type("text/x-of-this-machine", ".glossary")
    assert media_type_of("terms.glossary") == DEFAULT_MEDIA_TYPE
