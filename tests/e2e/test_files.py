"""Files as users have them, through every real part: the answer cites the page, and says what was assumed."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import document_files as files
import pytest
from gateway_client import GatewayClient
from scripts import NOTES, SALES

pytestmark = pytest.mark.sandbox


@pytest.fixture
def gateway(shared_gateway: GatewayClient) -> GatewayClient:
    return shared_gateway


FACT = "The service retries a failed call three times."
QUESTION = "How often does the service retry a failed call?"
HIDDEN = f"<p>Cats sleep.</p><script>var said = '{FACT}';</script><p hidden>{FACT}</p>"
ANSWERED = [
    ("offer.pdf", files.pdf([["About cats."], [FACT], []], image_pages=[3]), "[offer.pdf, page 2]", "page 3 is"),
    ("offer.docx", files.word(["About cats.", FACT]), "[offer.docx:2]", ""),
    ("talk.pptx", files.presentation([("Cats", "sleep"), ("Calls", FACT)]), "[talk.pptx, slide 2]", ""),
    ("page.html", f"<script>{FACT} x</script><p>Cats</p><p>{FACT}</p>".encode(), "[page.html:3]", ""),
    ("notes.txt", f"Größe\r{FACT}\r".encode("cp1252"), "[notes.txt:2]", "read as Windows-1252"),
    ("wide.txt", f"{NOTES}".encode("utf-16-le"), "[wide.txt:3]", "read as UTF-16 without"),
    ("renamed.txt", files.pdf([[FACT]]), "[renamed.txt, page 1]", "read as PDF by its content"),
    ("mail.eml", files.message("See below.", attachments={"a.pdf": files.pdf([[FACT]])}), "a.pdf, page 1]", ""),
    ("all.zip", files.archive({"docs/a.md": NOTES.encode(), "b.png": b"\x89PNG"}), "docs/a.md]", "b.png was not"),
]
REFUSED = [
    ("a.xlsx", files.encrypted_office_file(), "file_encrypted"),
    ("a.txt", bytes(range(256)), "file_invalid"),
    ("a.pdf", b"\x89PNG\r\n\x1a\n" + bytes(20), "file_invalid"),
]
FAILED = [
    (files.encrypted_pdf(), "file_encrypted", "password"),
    (files.pdf_of_many_pages(100_000), "file_limit_exceeded", "2,000 pages"),
    (b"%PDF-1.7 and nothing more", "file_unreadable", "damaged"),
]


async def run_with_file(gateway: GatewayClient, name: str, data: bytes, goal: str = QUESTION) -> dict[str, Any]:
    """Run the question over a file and return the ended task, or the problem of one that was not accepted."""
    stored = await gateway.client.post("/files", content=data, headers={"X-File-Name": quote(name)})
    assert stored.status_code == 201, stored.text
    listed = [{"name": name, "digest": stored.json()["digest"]}]
    answer = await gateway.client.post("/tasks", json={"goal": goal, "context": {"files": listed}})
    if answer.status_code != 201:
        return answer.json()
    return await gateway.finished(answer.json()["task_id"])


async def test_a_question_over_a_file_is_answered_with_its_place(gateway: GatewayClient) -> None:
    for name, data, reference, note in ANSWERED:
        task = await run_with_file(gateway, name, data)
        assert task["status"] == "completed", (name, task["error"])
        assert FACT in task["output"], name
        assert reference in task["output"], name
        notes = task["steps"][0]["evidence"].get("notes", [])
        assert task["files"][0].get("notes", []) == [each.removeprefix(f"{name}: ") for each in notes], name
        assert any(note in each for each in notes) if note else not notes, (name, notes)


async def test_tables_of_any_format_are_queried(gateway: GatewayClient) -> None:
    rows = [[int(cell) if cell.isdigit() else cell for cell in line.split(",")] for line in SALES.split()]
    named = SALES.replace("north", "北方").replace("south", "南方的城市").replace("west", "西部地区")
    tables = [
        ("sales.xlsx", files.workbook({"Sales": rows}), ""),
        ("sales.xls", files.old_workbook(rows), ""),
        ("sales.csv", files.workbook({"Sales": rows}), "sales.csv: named as CSV, read as XLSX by its content"),
        ("sales.csv", named.encode("gb18030"), "sales.csv: read as GB 18030"),
        ("sales.csv", SALES.replace("\n", "\r").encode("utf-16"), "sales.csv: read as UTF-16"),
    ]
    for name, data, note in tables:
        task = await run_with_file(gateway, name, data, "How many rows have amount > 100, and their total?")
        assert task["status"] == "completed", (name, task["error"])
        assert "total: 400" in task["output"], name
        notes = task["steps"][0]["evidence"].get("notes", [])
        assert notes == ([note] if note else []), (name, notes)


async def test_files_without_an_answer_say_so(gateway: GatewayClient) -> None:
    task = await run_with_file(gateway, "page.html", HIDDEN.encode())
    assert "not found" in (task["output"] + str(task["error"])).lower()
    for name, data, code in REFUSED:
        problem = await run_with_file(gateway, name, data)
        assert problem["code"] == code, problem
        assert name in problem["detail"]
    for data, code, said in FAILED:
        task = await run_with_file(gateway, "a.pdf", data)
        assert (task["status"], task["error"]["code"]) == ("failed", code)
        assert "a.pdf" in task["error"]["detail"]
        assert said in task["error"]["detail"]
