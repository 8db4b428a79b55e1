"""Files as users have them, through every real part: the answer cites the page, and says what was assumed."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import document_files as files
import pytest
from whole import NOTES, Door

pytestmark = pytest.mark.sandbox

FACT = "The service retries a failed call three times."
QUESTION = "How often does the service retry a failed call?"


async def run_with_file(door: Door, name: str, data: bytes, goal: str = QUESTION) -> dict[str, Any]:
    stored = await door.client.post("/files", content=data, headers={"X-File-Name": quote(name)})
    assert stored.status_code == 201, stored.text
    listed = [{"name": name, "digest": stored.json()["digest"]}]
    answer = await door.client.post("/tasks", json={"goal": goal, "context": {"files": listed}})
    if answer.status_code != 201:
        return answer.json()
    return await door.finished(answer.json()["task_id"])


@pytest.mark.parametrize(
    ("name", "data", "reference", "note"),
    [
        (
            "offer.pdf",
            files.pdf([["About cats."], [FACT], []], image_pages=[3]),
            "[offer.pdf, page 2]",
            "page 3 is",
        ),
        ("offer.docx", files.word(["About cats.", FACT]), "[offer.docx:2-2]", ""),
        ("talk.pptx", files.presentation([("Cats", "sleep"), ("Calls", FACT)]), "[talk.pptx, slide 2]", ""),
        ("page.html", f"<script>{FACT} x</script><p>Cats</p><p>{FACT}</p>".encode(), "[page.html:3-3]", ""),
        ("notes.txt", f"Größe\r{FACT}\r".encode("cp1252"), "[notes.txt:2-2]", "read as Windows-1252"),
        ("wide.txt", f"{NOTES}".encode("utf-16-le"), "[wide.txt:3-3]", "read as UTF-16 without"),
        ("notes.txt", files.pdf([[FACT]]), "[notes.txt, page 1]", "read as PDF by its content"),
        (
            "mail.eml",
            files.message("See below.", attachments={"a.pdf": files.pdf([[FACT]])}),
            "a.pdf, page 1]",
            "",
        ),
        ("all.zip", files.archive({"docs/a.md": NOTES.encode(), "b.png": b"\x89PNG"}), "docs/a.md]", "b.png was not"),
    ],
)
async def test_a_question_over_a_file_is_answered_with_its_place(
    door: Door, name: str, data: bytes, reference: str, note: str
) -> None:
    task = await run_with_file(door, name, data)
    assert task["status"] == "completed", task["error"]
    assert FACT in task["output"]
    assert reference in task["output"]
    notes = task["steps"][0]["evidence"].get("notes", [])
    assert task["files"][0].get("notes", []) == [each.removeprefix(f"{name}: ") for each in notes]
    assert any(note in each for each in notes) if note else not notes


async def test_a_price_in_a_script_is_no_answer(door: Door) -> None:
    page = f"<p>Cats sleep.</p><script>var said = '{FACT}';</script><p hidden>{FACT}</p>".encode()
    task = await run_with_file(door, "page.html", page)
    assert "not found" in (task["output"] + str(task["error"])).lower()


@pytest.mark.parametrize(
    ("name", "data", "code"),
    [
        ("a.xlsx", files.encrypted_office_file(), "file_encrypted"),
        ("a.txt", bytes(range(256)), "file_invalid"),
        ("a.pdf", b"\x89PNG\r\n\x1a\n" + bytes(20), "file_invalid"),
    ],
)
async def test_a_file_that_is_not_read_is_refused_at_once(door: Door, name: str, data: bytes, code: str) -> None:
    problem = await run_with_file(door, name, data)
    assert problem["code"] == code
    assert name in problem["detail"]


@pytest.mark.parametrize(
    ("data", "code", "said"),
    [
        (files.encrypted_pdf(), "file_encrypted", "password"),
        (files.pdf_of_many_pages(100_000), "file_limit_exceeded", "2000 pages"),
        (b"%PDF-1.7 and nothing more", "file_unreadable", "damaged"),
    ],
)
async def test_a_file_that_cannot_be_read_fails_the_task(door: Door, data: bytes, code: str, said: str) -> None:
    task = await run_with_file(door, "a.pdf", data)
    assert task["status"] == "failed"
    assert task["error"]["code"] == code
    assert "a.pdf" in task["error"]["detail"]
    assert said in task["error"]["detail"]
