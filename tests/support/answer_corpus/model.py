"""What a case of the corpus is: files, what a person reads in them, and questions with their answers."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, time
from typing import Any


@dataclass(frozen=True)
class Table:
    """A table as a person reads it: the names of its columns, and typed rows."""

    names: tuple[str, ...]
    rows: Sequence[tuple[Any, ...]]

    def column(self, name: str) -> list[Any]:
        at = self.names.index(name)
        return [row[at] for row in self.rows]

    def pairs(self, one: str, other: str) -> list[tuple[Any, Any]]:
        return list(zip(self.column(one), self.column(other), strict=True))


@dataclass(frozen=True)
class Question:
    """A question and its answer.

    ``rows`` is the answer of a table: each row with the cells that it must have. ``values`` is that of a text: each of
    them must be in the answer; ``a|b`` allows both. Neither means that the files do not have the answer. ``place`` is
    the label of the location that should be cited, ``never`` what an answer must not say.
    """

    text: str
    rows: tuple[tuple[Any, ...], ...] = ()
    values: tuple[str, ...] = ()
    place: str = ""
    never: tuple[str, ...] = ()

    @property
    def is_absent(self) -> bool:
        return not self.rows and not self.values


@dataclass(frozen=True)
class Case:
    """Files that belong together. ``kind`` is the row of the report in which it is counted.

    ``tables`` are by the name in SQL. ``texts`` are pairs of a location's label and a text that stands there;
    ``hidden`` are texts that no reader sees. ``refusals`` are the codes with which a file must be refused; ``is_open``
    marks files that do not settle how they are read, so that it must be told.
    """

    id: str
    kind: str
    files: Mapping[str, bytes]
    tables: Mapping[str, Table] = field(default_factory=dict[str, Table])
    texts: tuple[tuple[str, str], ...] = ()
    hidden: tuple[str, ...] = ()
    refusals: tuple[str, ...] = ()
    is_open: bool = False
    note: str = ""
    """A text that the notes or assumptions must have."""
    questions: tuple[Question, ...] = ()
    is_plain: bool = True
    """Whether the bytes are the same on every machine; libraries write the time into the others."""


def scalar(text: str, value: Any) -> Question:
    return Question(text, rows=((value,),))


def said(text: str, *values: str, place: str = "", never: tuple[str, ...] = ()) -> Question:
    return Question(text, values=values, place=place, never=never)


def absent(text: str, *never: str) -> Question:
    return Question(text, never=never)


def _plain(value: Any) -> Any:
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    return repr(value) if isinstance(value, float) else value


def describe(case: Case) -> dict[str, Any]:
    """Return what the manifest has of a case: everything that decides about an answer."""
    return {
        "id": case.id,
        "kind": case.kind,
        "files": {name: hashlib.sha256(data).hexdigest() if case.is_plain else "" for name, data in case.files.items()},
        "tables": {
            name: [list(table.names), [[_plain(cell) for cell in row] for row in table.rows]]
            for name, table in case.tables.items()
        },
        "texts": case.texts,
        "hidden": case.hidden,
        "refusals": case.refusals,
        "is_open": case.is_open,
        "note": case.note,
        "questions": [
            [each.text, [[_plain(cell) for cell in row] for row in each.rows], each.values, each.place, each.never]
            for each in case.questions
        ],
    }


def digest(cases: Sequence[Case]) -> str:
    """Return the SHA-256 of the manifest of all cases."""
    manifest = json.dumps([describe(case) for case in cases], ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(manifest.encode()).hexdigest()


def table_name(file: str, sheet: str = "") -> str:
    """Return the name of a table in SQL, as the documentation has it."""
    words = file.rsplit(".", 1)[0] + (f"_{sheet}" if sheet else "")
    name = re.sub(r"\W+", "_", words.lower()).strip("_")
    return "t_" + name if name[0].isdigit() else name
