"""Reading files: text in this process, and binary formats by a program in the sandbox."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec

import octollm
from octollm import OctoError
from octollm.documents import model, reading
from octollm.documents.decoding import decode_text
from octollm.documents.detection import PLAIN_KINDS, detect_kind
from octollm.documents.model import Document, DocumentError, ReadLimits
from octollm.services.arms.executor import runner_read
from octollm.services.arms.executor.runner_read import ReadJob, ReadOutcome
from octollm.services.arms.executor.sandbox import MIB, Job, Limits, Sandbox, SandboxResult

READ_PACKAGES = ("msgspec", "charset-normalizer", "lxml", "pypdfium2", "python-calamine")
"""Distributions that the readers import."""
READ_LIMITS = ReadLimits(characters=8_000_000)
"""Bounds of a document whose text crosses a response of at most 32 MiB."""
SANDBOX_LIMITS = Limits(
    wall_seconds=60.0,
    cpu_seconds=60,
    memory_bytes=1536 * MIB,
    output_bytes=31 * MIB,
    file_bytes=1 * MIB,
    disk_bytes=1 * MIB,
    disk_entries=1000,
    result_files=0,
)
_FAILED_ALLOCATION = "memory allocation of"
"""What a library in Rust says before it aborts, for example over a sheet with a cell in its last row and column."""
_CODES = ("file_unreadable", "file_encrypted", "file_limit_exceeded")


async def read_in_sandbox(
    sandbox: Sandbox, name: str, data: bytes, *, tables: bool = False, limits: ReadLimits = READ_LIMITS
) -> Document:
    """Read a file of any kind; with ``tables`` also its tables.

    Text, source code and HTML are read in a thread of this process. Raises :class:`DocumentError` for what the file
    is, and ``no_sandbox`` or ``sandbox_failed``.
    """
    kind = await asyncio.to_thread(detect_kind, name, data)
    if kind in PLAIN_KINDS:
        return await asyncio.to_thread(reading.read_plain, name, data, limits)
    result = await sandbox.run(build_read_job(name, data, tables=tables, limits=limits))
    return await asyncio.to_thread(parse_read_result, result)


def to_utf8(data: bytes) -> bytes:
    """Return text in UTF-8. Windows-1252 stays as it is: the program that answers queries reads and states it itself.

    Bytes that are no text are returned unchanged; that program says what is wrong with them.
    """
    try:
        decoded = decode_text(data)
    except DocumentError:
        return data
    is_converted = any(note.startswith("read as") and "Windows-1252" not in note for note in decoded.notes)
    return decoded.text.encode() if is_converted else data


def build_read_job(name: str, data: bytes, *, tables: bool = False, limits: ReadLimits = READ_LIMITS) -> Job:
    """Return the job that reads one file. The readers' own source goes along, so only libraries are bound."""
    return Job(
        command=("runner_read.py",),
        files={
            "runner_read.py": Path(runner_read.__file__).read_bytes(),
            "request.json": msgspec.json.encode(ReadJob(name, limits, tables)),
            "data": data,
            **document_sources(),
        },
        limits=SANDBOX_LIMITS,
        packages=READ_PACKAGES,
    )


def document_sources() -> dict[str, bytes]:
    """Return the source of ``octollm.documents`` and of what it imports, by path in the working directory."""
    root = Path(octollm.__file__).parent
    names = ("__init__.py", "lazy_exports.py", "errors.py")
    paths = [*(root / name for name in names), *sorted(Path(model.__file__).parent.glob("*.py"))]
    return {f"octollm/{path.relative_to(root).as_posix()}": path.read_bytes() for path in paths}


def parse_read_result(result: SandboxResult) -> Document:
    """Return the document that a read job printed.

    Raises :class:`DocumentError` for the error that it printed, and when a limit ended it or a parser crashed;
    ``sandbox_failed`` when the program itself failed.
    """
    seconds, memory = SANDBOX_LIMITS.wall_seconds, SANDBOX_LIMITS.memory_bytes // MIB
    bounds = {
        "timeout": f"Reading the file took more than {seconds:g} seconds.",
        "memory": f"Reading the file needed more than {memory} MiB of memory.",
        "output": f"The text of the file has more than {SANDBOX_LIMITS.output_bytes // MIB} MiB.",
    }
    if result.reason in bounds:
        raise DocumentError(bounds[result.reason], code="file_limit_exceeded")
    if result.exit_code < 0 and _FAILED_ALLOCATION in result.stderr:
        raise DocumentError(bounds["memory"], code="file_limit_exceeded")
    if result.exit_code < 0:
        raise DocumentError("The file is damaged: the parser crashed.")
    if result.exit_code != 0:
        said = result.stderr.strip().splitlines() or [f"exit code {result.exit_code}"]
        raise OctoError(f"the reader failed: {said[-1][:300]}", code="sandbox_failed")
    try:
        outcome = msgspec.json.decode(result.stdout.encode(), type=ReadOutcome)
    except msgspec.DecodeError as exc:
        raise OctoError("the reader's output is not understood", code="sandbox_failed") from exc
    if outcome.error is not None:
        code = outcome.error.code if outcome.error.code in _CODES else "file_unreadable"
        raise DocumentError(outcome.error.detail, code=code)
    return model.decode_document(bytes(outcome.document))
