"""A task's files are read before it is planned: texts for memory, notes on the files, errors with the file's name."""

from __future__ import annotations

import document_files as files
import pytest

from octollm.contracts.operations import TextLocation
from octollm.contracts.task import ArmInfo, Evidence, ExecuteResult, FileRef, Task, TaskContext
from octollm.documents.model import DocumentError, FlatDocument, flatten
from octollm.documents.reading import read_document
from octollm.errors import OctoError
from octollm.tasks.documents import TaskDocuments, add_notes, read_task_files

STORED = {
    "d1": "Größe".encode("cp1252"),
    "d2": files.pdf([["One."], ["Two."]]),
    "d3": files.workbook({"S": [[1]]}),
    "d4": files.encrypted_pdf(),
}


async def read(*listed: FileRef, arms: tuple[ArmInfo, ...] = (), assigned: str | None = None) -> TaskDocuments:
    async def load(tenant: str, digest: str) -> bytes:
        assert tenant == "t"
        return STORED[digest]

    async def read_binary(file: FileRef) -> FlatDocument:
        return flatten(read_document(file.name, STORED[file.digest or ""]))

    contract = Task(goal="g", context=TaskContext(files=listed), assigned_arm=assigned)
    return await read_task_files(contract, "t", arms, load, read_binary)


async def test_texts_go_to_memory_with_their_locations_and_notes_stay_on_the_files():
    found = await read(FileRef("a.txt", "d1", kind="text"), FileRef("b.pdf", "d2", kind="text"))
    assert [document.text for document in found.documents] == ["Größe", "One.\nTwo."]
    assert found.documents[1].locations == (TextLocation(1, "page 1"), TextLocation(2, "page 2"))
    assert [file.notes for file in found.files] == [("read as Windows-1252",), ()]


async def test_a_workbook_is_left_to_the_query_and_its_wrong_name_is_noted():
    found = await read(FileRef("a.csv", "d3", kind="table"))
    assert found.documents == ()
    assert found.files[0].notes == ("named as CSV, read as XLSX by its content",)


async def test_a_file_that_cannot_be_read_is_named():
    with pytest.raises(OctoError, match=r"offer\.pdf: The PDF is encrypted") as caught:
        await read(FileRef("offer.pdf", "d4", kind="text"))
    assert not isinstance(caught.value, DocumentError)
    assert caught.value.code == "file_encrypted"


@pytest.mark.parametrize(
    ("arms", "assigned"), [((ArmInfo("reader", "Reads", ("application/pdf",)),), None), ((), "reader")]
)
async def test_an_arm_of_the_users_own_gets_it_all_the_same(arms: tuple[ArmInfo, ...], assigned: str | None):
    found = await read(FileRef("offer.pdf", "d4", kind="text"), arms=arms, assigned=assigned)
    assert found.files[0].notes == ("not read: The PDF is encrypted: it opens with a password only.",)
    assert found.documents == ()


def test_notes_are_evidence_of_the_step():
    contract = Task(goal="g", context=TaskContext(files=(FileRef("a.txt", "d1", notes=("read as Windows-1252",)),)))
    result = add_notes(ExecuteResult("x", evidence=Evidence(kind="documents")), contract)
    assert result.evidence == Evidence(kind="documents", notes=("a.txt: read as Windows-1252",))
    assert add_notes(ExecuteResult("x"), Task(goal="g")) == ExecuteResult("x")
