"""The level without a model: what the readers make of each file, against what a person reads in it."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
from answer_corpus.model import Case, Table
from table_corpus import equal

from octollm.documents.detection import PLAIN_KINDS, TABLE_KINDS, detect_kind
from octollm.documents.model import Document, DocumentError, RawTable, encode_cells
from octollm.documents.reading import read_document
from octollm.documents.tables import quote_name
from octollm.services.arms.executor import runner_sql
from octollm.services.arms.executor.reader import to_utf8
from octollm.services.arms.executor.runner import derive_tables, find_kinds, is_spreadsheet, is_text_table

VERDICTS = ("right", "told", "refused", "wrong", "not read")


@dataclass(frozen=True)
class Outcome:
    """How a case was read.

    ``right``: as a person reads it. ``told``: with an assumption that is undecided. ``refused``: with a reason, where
    that is expected. ``wrong``: differently, and nothing says so. ``not read``: refused where it should be read.
    """

    case: str
    kind: str
    verdict: str
    seconds: float
    detail: str = ""


@dataclass(frozen=True)
class LoadedTable:
    """A table as queries see it."""

    names: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    open_columns: frozenset[str]
    """The columns with an undecided assumption; an empty name is the whole table."""
    notes: tuple[str, ...]


def load_tables(files: Mapping[str, bytes]) -> dict[str, LoadedTable]:
    """Load tables as the executor does, in this process.

    Raises ``DocumentError``, ``RefusedError`` or ``duckdb.Error`` for a file that is no table.
    """
    sheets: dict[str, Sequence[RawTable]] = {}
    notes: dict[str, tuple[str, ...]] = {}
    for name, data in files.items():
        if is_spreadsheet(name, data):
            document = read_document(name, data)
            sheets[name], notes[name] = document.tables, document.notes
    loaded: dict[str, LoadedTable] = {}
    with tempfile.TemporaryDirectory() as folder, duckdb.connect(config={"threads": 1}) as connection:
        for number, table in enumerate(derive_tables(files, sheets, find_kinds(files))):
            path = Path(folder, str(number))
            name = table.file.split(", sheet ")[0]
            data = files[name]
            if table.sheet:
                data = encode_cells(table.sheet)
            elif is_text_table(name):
                data = to_utf8(data)
            path.write_bytes(data)
            assumptions = runner_sql.load(connection, table.table, path, table.kind)
            found = connection.execute(f"FROM {quote_name(table.table)}")
            names = tuple(str(column[0]) for column in found.description or ())
            texts = tuple(each.text for each in assumptions)
            open_columns = frozenset(each.column for each in assumptions if not each.decided)
            loaded[table.table] = LoadedTable(names, found.fetchall(), open_columns, (*notes.get(name, ()), *texts))
    return loaded


def read_case(case: Case) -> Outcome:
    """Read the files of a case and compare them with its truth."""
    began = time.perf_counter()
    try:
        verdict, detail = _judge(case)
    except DocumentError as error:
        verdict, detail = _judge_refusal(case, error.code, error.detail)
    except (runner_sql.RefusedError, duckdb.Error) as error:
        verdict, detail = _judge_refusal(case, "file_invalid", str(error))
    return Outcome(case.id, case.kind, verdict, time.perf_counter() - began, detail)


def _judge_refusal(case: Case, code: str, detail: str) -> tuple[str, str]:
    # A task calls a file that it cannot take `file_invalid`, whatever the reader's own code is.
    known = {code, *(("file_invalid",) if code == "file_unreadable" else ())}
    return ("refused" if known & set(case.refusals) else "not read"), f"{code}: {detail}"


def _judge(case: Case) -> tuple[str, str]:
    kinds = {name: detect_kind(name, data) for name, data in case.files.items()}
    is_table = bool(case.tables) or case.is_open or (bool(case.refusals) and set(kinds.values()) <= TABLE_KINDS)
    if not is_table:
        return _judge_texts(case, [read_document(name, data) for name, data in case.files.items()])
    notes = [
        note
        for name, data in case.files.items()
        if kinds[name] in PLAIN_KINDS
        for note in read_document(name, data).notes
    ]
    loaded = load_tables(case.files)
    if case.refusals or case.is_open:
        told = any(table.open_columns for table in loaded.values())
        return ("told" if told else "wrong"), "; ".join(note for table in loaded.values() for note in table.notes)
    verdict = "right"
    for name, expected in case.tables.items():
        if name not in loaded:
            return "wrong", f"no table {name}, but {list(loaded)}"
        table = loaded[name]
        difference, column = _find_difference(table, expected)
        if difference:
            told = "" in table.open_columns or column in table.open_columns
            return ("told" if told else "wrong"), f"{difference}; {'; '.join(table.notes)}"
        notes += table.notes
        verdict = "told" if table.open_columns else verdict
    if case.note and not any(case.note in note for note in notes):
        return "wrong", f"no note says {case.note!r}: {notes}"
    return verdict, "; ".join(notes)


def _find_difference(table: LoadedTable, expected: Table) -> tuple[str, str]:
    """Return the first difference and its column; both are empty when there is none."""
    if table.names != expected.names or len(table.rows) != len(expected.rows):
        return f"{table.names} × {len(table.rows)}, not {expected.names} × {len(expected.rows)}", ""
    for at, name in enumerate(table.names):
        for row, wanted in zip(table.rows, expected.rows, strict=True):
            if not equal(float(row[at]) if type(row[at]).__name__ == "Decimal" else row[at], wanted[at]):
                return f"{name}: {row[at]!r}, not {wanted[at]!r}", name
    return "", ""


def _judge_texts(case: Case, documents: Sequence[Document]) -> tuple[str, str]:
    if case.refusals:
        return "wrong", f"read as text of {sum(len(each.text) for each in documents)} characters"
    sections = [(section.location.label(), _collapse(section.text)) for each in documents for section in each.sections]
    for label, text in case.texts:
        if not any(_collapse(text) in found and label in (where, "") for where, found in sections):
            return "wrong", f"{text!r} is not at {label!r}"
    for text in case.hidden:
        if any(text in found for _, found in sections):
            return "wrong", f"{text!r} is read, but not shown"
    notes = [note for each in documents for note in each.notes]
    if case.note and not any(case.note in note for note in notes):
        return "wrong", f"no note says {case.note!r}: {notes}"
    return "right", "; ".join(notes)


def _collapse(text: str) -> str:
    return re.sub(r"[\s|]+", " ", text).strip()
