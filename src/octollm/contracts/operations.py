"""Bodies and answers of the operations of executor, judge, retriever and memory."""

from __future__ import annotations

from typing import Literal

import msgspec

from octollm.contracts.task import Artifact, Check, ExecuteResult, FileRef

Language = Literal["python", "sql"]


class RunLimits(msgspec.Struct, frozen=True, omit_defaults=True):
    """Bounds of one run; ``None`` means the executor's default, and more than its maximum is cut to it."""

    wall_seconds: float | None = None
    memory_bytes: int | None = None
    output_bytes: int | None = None


class RunRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """``executor POST /run``.

    With ``python`` the ``command`` is the argument list after the interpreter (``["-m", "unittest"]``, or
    ``["main.py"]``), run in a folder that holds ``files``. With ``sql`` the ``command`` is one query; each
    tabular file is a table (``tables`` names them, by default the stem of the file's name).
    """

    language: Language
    command: tuple[str, ...]
    files: tuple[FileRef, ...] = ()
    limits: RunLimits = RunLimits()


class RunResult(msgspec.Struct, frozen=True, omit_defaults=False):
    """How a run ended. ``exit_code`` is negative for a signal; ``reason`` says which limit ended it, if one did."""

    exit_code: int
    stdout: str
    stderr: str
    files: tuple[FileRef, ...] = ()
    reason: Literal["", "timeout", "output", "memory", "killed"] = ""
    sandbox: str = ""
    duration_ms: int = 0


class ValidateRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """``judge POST /validate``: code, and the tests that it has to pass (module names are the files' stems)."""

    code: str
    language: str = "python"
    filename: str = "solution.py"
    tests: str = ""
    tests_filename: str = "test_solution.py"


class ValidateResult(msgspec.Struct, frozen=True):
    """Whether code is valid, with the reasons when it is not."""

    is_valid: bool
    reasons: tuple[str, ...] = ()
    checks: tuple[Check, ...] = ()


class AcceptRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """``judge POST /accept``: a step's result against its goal and criteria."""

    goal: str
    result: ExecuteResult
    criteria: tuple[str, ...] = ()
    files: tuple[FileRef, ...] = ()


class AcceptResult(msgspec.Struct, frozen=True):
    """The verdict on a step; ``score`` from 0 to 1."""

    accepted: bool
    reasons: tuple[str, ...] = ()
    score: float = 0.0


class SearchFilters(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a search is narrowed to."""

    digests: tuple[str, ...] = ()
    """Only documents with these digests; empty means all of the tenant."""


class SearchRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """``retriever POST /search`` and ``memory POST /search``; ``limit`` at most 50."""

    query: str
    limit: int = 5
    filters: SearchFilters = SearchFilters()


class Passage(msgspec.Struct, frozen=True):
    """A piece of a document: 1-based lines, both included; a higher ``score`` is a better match."""

    source: str
    digest: str
    line_start: int
    line_end: int
    text: str
    score: float


class SearchResult(msgspec.Struct, frozen=True):
    """Passages, best first."""

    passages: tuple[Passage, ...]


class DocumentIn(msgspec.Struct, frozen=True, omit_defaults=True):
    """``memory POST /documents``: a text to remember. ``digest`` is of the bytes it came from."""

    name: str
    text: str
    digest: str


class DocumentOut(msgspec.Struct, frozen=True):
    """A remembered document."""

    name: str
    digest: str
    passages: int
    lines: int


FILE_NAME_DESCRIPTION = "The file's name, percent-encoded (RFC 3986)."
"""What the header ``X-File-Name`` is for."""


class StoredFile(msgspec.Struct, frozen=True):
    """``orchestrator POST /files``: a stored file's address."""

    name: str
    digest: str
    size: int
    media_type: str


def to_artifact(file: StoredFile) -> Artifact:
    """Return the artifact that names a stored file."""
    return Artifact(name=file.name, digest=file.digest, size=file.size, media_type=file.media_type)
