"""Binary formats are read inside the sandbox; what a parser does there ends as an error of the file."""

from __future__ import annotations

import io
from datetime import date

import document_files as files
import msgspec
import openpyxl
import pytest

from octollm import OctoError
from octollm.contracts.operations import RunRequest
from octollm.documents.model import DocumentError, FlatDocument, ReadLimits, decode_document, encode_document
from octollm.documents.reading import read_document
from octollm.services.arms.executor.bubblewrap import Bubblewrap
from octollm.services.arms.executor.reader import build_read_job, parse_read_result, read_in_sandbox
from octollm.services.arms.executor.runner import Runner
from octollm.services.arms.executor.sandbox import LimitReason, SandboxResult

pytestmark = pytest.mark.sandbox

SAMPLES = {
    "a.pdf": files.pdf([["One."], ["Two."]]),
    "a.docx": files.word(["One."], [["a", "b"]], heading="Head"),
    "a.pptx": files.presentation([("One", "a")]),
    "a.xlsx": files.workbook({"S": [["n", "d"], [1.5, date(2026, 3, 1)]]}),
    "a.xls": files.old_workbook([["n"], [1.5]]),
    "a.ods": files.open_document([["n"], [1.5]]),
    "a.eml": files.message("Hello.", attachments={"b.pdf": files.pdf([["Inner."]])}),
    "a.zip": files.archive({"b.txt": "Müller".encode("cp1252"), "c.html": b"<p>x<script>y</script>"}),
}


@pytest.fixture(scope="module")
def sandbox() -> Bubblewrap:
    return Bubblewrap.open()


@pytest.mark.parametrize("name", SAMPLES)
async def test_the_sandbox_reads_what_this_process_reads(sandbox: Bubblewrap, name: str):
    assert await read_in_sandbox(sandbox, name, SAMPLES[name], tables=True) == read_document(name, SAMPLES[name])


async def test_errors_of_the_file_come_out(sandbox: Bubblewrap):
    with pytest.raises(DocumentError) as caught:
        await read_in_sandbox(sandbox, "a.pdf", files.encrypted_pdf())
    assert caught.value.code == "file_encrypted"
    with pytest.raises(DocumentError, match="1 pages"):
        await read_in_sandbox(sandbox, "a.pdf", SAMPLES["a.pdf"], limits=ReadLimits(pages=1))


async def test_a_sheet_of_17_billion_empty_cells_ends_at_the_limit_of_memory(sandbox: Bubblewrap):
    book = openpyxl.Workbook()
    book.worksheets[0]["XFD1048576"] = book.worksheets[0]["A1"] = 1
    out = io.BytesIO()
    book.save(out)
    with pytest.raises(DocumentError, match="1536 MiB") as caught:
        await read_in_sandbox(sandbox, "a.xlsx", out.getvalue())
    assert caught.value.code == "file_limit_exceeded"


async def test_text_needs_no_sandbox():
    class MissingSandbox:
        name = "none"

        async def run(self, job: object) -> SandboxResult:
            raise OctoError("there is none", code="no_sandbox")

    document = await read_in_sandbox(MissingSandbox(), "a.html", b"<p>x<script>y</script>")
    assert document.text == "x"
    with pytest.raises(OctoError, match="there is none"):
        await read_in_sandbox(MissingSandbox(), "a.pdf", SAMPLES["a.pdf"])


async def test_a_run_that_reads_gives_text_with_locations(sandbox: Bubblewrap):
    runner = Runner(sandbox)
    result = await runner.run(RunRequest("read", ()), {"a.pdf": SAMPLES["a.pdf"]})
    flat = msgspec.json.decode(result.stdout, type=FlatDocument)
    assert flat == FlatDocument("a.pdf", "pdf", "One.\nTwo.", ((1, "page 1"), (2, "page 2")))
    with pytest.raises(OctoError, match="one file"):
        await runner.run(RunRequest("read", ()), {})


@pytest.mark.parametrize(
    ("reason", "exit_code", "code"),
    [
        ("timeout", -9, "file_limit_exceeded"),
        ("memory", -9, "file_limit_exceeded"),
        ("output", -9, "file_limit_exceeded"),
        ("killed", -11, "file_unreadable"),
        ("", 1, "sandbox_failed"),
        ("", 0, "sandbox_failed"),
    ],
)
def test_an_ended_parser_is_an_error(reason: LimitReason, exit_code: int, code: str):
    with pytest.raises(OctoError) as caught:
        parse_read_result(SandboxResult(exit_code, "", "", (), reason))
    assert caught.value.code == code


def test_a_document_survives_its_encoding():
    document = read_document("a.xlsx", SAMPLES["a.xlsx"])
    assert decode_document(encode_document(document)) == document
    with pytest.raises(DocumentError):
        decode_document(b'{"name": 1}')


def test_no_name_takes_the_place_of_the_reader():
    job = build_read_job("runner_read.py", b"print('taken over')")
    assert job.files["data"] == b"print('taken over')"
    assert b"read_document" in job.files["runner_read.py"]
