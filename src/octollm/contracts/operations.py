"""Requests and results of the operations of executor, judge, retriever and memory, with the result sets of SQL runs."""

from __future__ import annotations

from typing import Literal

import msgspec

from octollm.contracts.task import Artifact, Assumption, Check, ExecuteResult, FileRef
from octollm.errors import OctoError, map_exceptions

Language = Literal["python", "sql", "read"]


class RunLimits(msgspec.Struct, frozen=True, omit_defaults=True):
    """Limits of one run; ``None`` means the executor's default, and its maximum caps every value."""

    wall_seconds: float | None = None
    memory_bytes: int | None = None
    output_bytes: int | None = None


class RunRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """``executor POST /run``.

    With ``python``, ``command`` is the argument list after the interpreter (``["-m", "unittest"]``, ``["main.py"]``),
    run in a folder with ``files``. With ``sql``, ``command`` is one query; each tabular file is a table, named by the
    stem of the file's name. With ``read``, the one file is read whatever its format; ``stdout`` of the result is then a
    JSON object with its ``text``, the ``locations`` in it and ``notes``.
    """

    language: Language
    command: tuple[str, ...]
    files: tuple[FileRef, ...] = ()
    limits: RunLimits = RunLimits()


class RunResult(msgspec.Struct, frozen=True, omit_defaults=False):
    """The result of a run. ``exit_code`` is negative for a signal; ``reason`` names the limit that ended it."""

    exit_code: int
    stdout: str
    stderr: str
    files: tuple[FileRef, ...] = ()
    reason: Literal["", "timeout", "output", "memory", "killed"] = ""
    sandbox: str = ""
    duration_ms: int = 0


class ValidateRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """``judge POST /validate``: code, and the tests that it must pass. Modules are named by the files' stems."""

    code: str
    language: str = "python"
    filename: str = "solution.py"
    tests: str = ""
    tests_filename: str = "test_solution.py"


class ExternalRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """``executor POST /http``: a request to a server on the tenant's allow-list. The body is text."""

    method: str
    url: str
    headers: dict[str, str] = {}
    body: str = ""


class ExternalResponse(msgspec.Struct, frozen=True):
    """The response of that server, at most 1 MiB. Redirects are not followed; header names are in lower case.

    ``body`` is text, or base64 for bytes that are not UTF-8: ``encoding`` says which.
    """

    status: int
    headers: dict[str, str]
    body: str
    encoding: Literal["utf-8", "base64"] = "utf-8"


class ValidateResult(msgspec.Struct, frozen=True):
    """Whether code is valid, and the reasons if not."""

    is_valid: bool
    reasons: tuple[str, ...] = ()
    checks: tuple[Check, ...] = ()
    failed_statements: tuple[str, ...] = ()
    """The statements of the tests that failed, each on one line."""


class AcceptRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """``judge POST /accept``: a step's result against its goal and criteria."""

    goal: str
    result: ExecuteResult
    criteria: tuple[str, ...] = ()
    files: tuple[FileRef, ...] = ()
    texts: dict[str, str] = {}
    """Texts of small artifacts of the result, by digest; the judge reads the others itself."""


class AcceptResult(msgspec.Struct, frozen=True):
    """The judge's verdict on a step; ``score`` is from 0 to 1. ``checks`` say what it stands on, and who checked it."""

    accepted: bool
    reasons: tuple[str, ...] = ()
    score: float = 0.0
    checks: tuple[Check, ...] = ()


class SearchFilters(msgspec.Struct, frozen=True, omit_defaults=True):
    """Restrictions of a search; an empty one is none. A passage has to fit all of them."""

    digests: tuple[str, ...] = ()
    """Only documents with these digests."""
    tasks: tuple[str, ...] = ()
    """Only documents that came with these tasks."""
    sources: tuple[str, ...] = ()
    """Only documents with these names."""
    media_types: tuple[str, ...] = ()
    """Only documents of these media types, such as ``text/markdown``."""
    languages: tuple[str, ...] = ()
    """Only documents in these languages (ISO 639-1, such as ``de``), as far as they were recognized."""


MAX_QUERY_CHARS = 4000


class SearchRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """``retriever POST /search`` and ``memory POST /search``; ``limit`` at most 50."""

    query: str
    limit: int = 5
    filters: SearchFilters = SearchFilters()


class Passage(msgspec.Struct, frozen=True, omit_defaults=True):
    """A passage of a document: 1-based lines, both included; a higher ``score`` is a better match.

    ``location`` is where it stands in a file that is no text itself, for example ``page 3``. ``matched`` says by what
    it was found. Vectors alone say that it is similar, not that it answers.
    """

    source: str
    digest: str
    line_start: int
    line_end: int
    text: str
    score: float
    location: str = ""
    matched: tuple[Literal["words", "vectors"], ...] = ()


class SearchResult(msgspec.Struct, frozen=True):
    """Passages, best first, and whether vectors were compared besides words.

    ``partial``: some passages have no vectors yet. ``unused``: words alone were compared, and ``reason`` is the code of
    the error that kept the vectors away, ``pending`` while there are none, or ``loading`` while they are read.
    """

    passages: tuple[Passage, ...]
    vectors: Literal["used", "partial", "unused"] = "unused"
    reason: str = ""


class TextLocation(msgspec.Struct, frozen=True):
    """From the line ``line_start`` (from 1) on, a text stands in ``label``, for example ``page 3``."""

    line_start: int
    label: str


class DocumentIn(msgspec.Struct, frozen=True, omit_defaults=True):
    """``memory POST /documents``: a text to store. ``digest`` is that of the original file.

    ``locations`` are in the order of their lines. No passage crosses from one to the next.
    """

    name: str
    text: str
    digest: str
    locations: tuple[TextLocation, ...] = ()


class DocumentOut(msgspec.Struct, frozen=True):
    """A stored document. ``vectors`` are ``pending`` until all of its passages have one.

    ``language`` (ISO 639-1) is recognized from the text, empty where that is not possible.
    """

    name: str
    digest: str
    passages: int
    lines: int
    language: str = ""
    media_type: str = ""
    vectors: Literal["pending", "ready"] = "pending"


FILE_NAME_DESCRIPTION = "The file's name, percent-encoded (RFC 3986)."
"""What the header ``X-File-Name`` is for."""


class StoredFile(msgspec.Struct, frozen=True):
    """``POST /files``: the address of a stored file."""

    name: str
    digest: str
    size: int
    media_type: str


def to_artifact(file: StoredFile) -> Artifact:
    """Return the artifact that names a stored file."""
    return Artifact(name=file.name, digest=file.digest, size=file.size, media_type=file.media_type)


Cell = str | int | float | bool | list[object] | dict[str, object] | None


class ResultSet(msgspec.Struct, frozen=True):
    """The result of a query. A row has a cell for each column; ``row_count`` includes rows that were left out.

    ``assumptions`` are those of the tables and columns that the query reads.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    row_count: int
    assumptions: tuple[Assumption, ...] = ()


def parse_result_set(stdout: str) -> ResultSet:
    """Parse the output of an SQL run. Raises ``OctoError`` (``peer_protocol``) for any other form."""
    with map_exceptions(
        OctoError("The executor's output is not a result set.", code="peer_protocol"), msgspec.DecodeError
    ):
        table = msgspec.json.decode(stdout.encode(), type=ResultSet)
    if any(len(row) != len(table.columns) for row in table.rows):
        raise OctoError("A row of the executor's result set has the wrong number of cells.", code="peer_protocol")
    return table


def format_cell(cell: Cell) -> str:
    """Return a cell as text: SQL's NULL as ``NULL``, a float to twelve digits, so that 0.1 + 0.2 reads 0.3."""
    if cell is None:
        return "NULL"
    if isinstance(cell, bool):
        return "true" if cell else "false"
    if isinstance(cell, float):
        return str(int(cell)) if cell.is_integer() and abs(cell) < 1e15 else f"{cell:.12g}"
    if isinstance(cell, list | dict):
        return msgspec.json.encode(cell).decode()
    return " ".join(str(cell).split("\n"))


MAX_SHOWN_ASSUMPTIONS = 20


def format_assumptions(assumptions: tuple[Assumption, ...]) -> str:
    """Return the assumptions as lines for a reader, those that are not decided first; empty without any."""
    lines: list[str] = []
    for title, decided in (("Not decided by the file, so the answer may be wrong:", False), ("Assumptions:", True)):
        texts = list(dict.fromkeys(each.text for each in assumptions if each.decided is decided))
        if texts:
            lines += [title, *(f"- {text}" for text in texts[:MAX_SHOWN_ASSUMPTIONS])]
        if len(texts) > MAX_SHOWN_ASSUMPTIONS:
            lines.append(f"- and {len(texts) - MAX_SHOWN_ASSUMPTIONS} more")
    return "\n".join(lines)


MAX_NAME = 255
"""Characters of a document's or fact's name, and of a fact's source."""


class DocumentList(msgspec.Struct, frozen=True):
    """A page of documents, newest first. ``cursor`` asks for the next page; ``None`` on the last."""

    documents: tuple[DocumentOut, ...]
    cursor: str | None = None
