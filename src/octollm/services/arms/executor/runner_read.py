"""The program that reads one file; it runs inside the sandbox, because the parsers of binary formats take any bytes.

It finds the file as ``data`` beside it, and its name and limits in ``request.json``. It prints one JSON object:
``document``, or ``error`` with ``code`` and ``detail``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from octollm.documents.model import DocumentError, ReadLimits, encode_document
from octollm.documents.reading import read_document


class ReadJob(msgspec.Struct, frozen=True):
    """What is read, and within which limits. Without ``tables`` the text alone is returned."""

    name: str
    limits: ReadLimits = ReadLimits()
    tables: bool = False


class ReadFailure(msgspec.Struct, frozen=True):
    """Why a file was not read."""

    code: str
    detail: str


class ReadOutcome(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the program prints."""

    document: msgspec.Raw = msgspec.Raw()
    error: ReadFailure | None = None


def main() -> None:
    """Read the file and print the outcome."""
    job = msgspec.json.decode(Path("request.json").read_bytes(), type=ReadJob)
    try:
        document = read_document(job.name, Path("data").read_bytes(), job.limits)
    except DocumentError as error:
        outcome = ReadOutcome(error=ReadFailure(error.code, error.detail))
    else:
        document = document if job.tables else msgspec.structs.replace(document, tables=())
        outcome = ReadOutcome(document=msgspec.Raw(encode_document(document)))
    sys.stdout.buffer.write(msgspec.json.encode(outcome))


if __name__ == "__main__":
    main()
