"""Alignment of two documents by code: which fields, sections and lines differ, and where each side says it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from octollm.services.arms.retriever.chunks import SourceText
from octollm.text.lexical import stems

_FIELD = re.compile(
    r"^\s*(?:[-*+•]\s+|\d{1,2}[.)]\s+)?[*_]{0,2}(?P<label>[^\W\d_](?:[^:|\n]{0,48}[^\s:|"
    r"*_])?)[*_]{0,2}\s*:[*_]{0,2}\s+(?P<value>\S.*?)\s*$"
)
_ROW = re.compile(r"^\s*\|?\s*(?P<label>[^|\d\s][^|]{0,60}?)\s*\|\s*(?P<value>[^|]*[^|\s])\s*\|?\s*$")
_HEADING = re.compile(
    r"^\s*(?:#{1,6}\s+(?P<marked>\S.*?)\s*#*|"
    r"(?P<numbered>(?:§\s*)?\d{1,2}(?:\.\d{1,2})*\.?\s+[^\W\d_][^.:;]{0,60}))\s*$"
)
_MAX_LINES = 20_000
"""Lines of a document that are aligned; what is behind them is not compared."""
MIN_LINE_RATIO = 0.5
"""How alike two lines are that are two versions of one, from 0 to 1."""

_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\d\.)\s+(?=[A-ZÀ-ÖØ-Þ\d\"“(])|(?<=[。！？])")

DifferenceKind = Literal["field", "line", "only_first", "only_second"]


@dataclass(frozen=True, slots=True)
class Side:
    """What one document says: its text, and its lines from ``first`` to ``last``."""

    text: str
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Difference:
    """A difference of two documents. A side is ``None`` if that document has nothing of it.

    ``label`` is the name of the field, or the heading of the section that it stands in.
    """

    kind: DifferenceKind
    label: str
    one: Side | None
    two: Side | None


@dataclass(frozen=True, slots=True)
class _Unit:
    """A sentence of a line with the heading that it stands below; ``label`` is set for a field."""

    text: str
    line: int
    section: str
    label: str
    value: str


def find_labelled_value(line: str) -> tuple[str, str] | None:
    """Return the label and the value of a line such as ``Term: 24 months`` or a table row of two cells."""
    match = _FIELD.match(line) or _ROW.match(line)
    if match is None:
        return None
    label, value = match["label"].strip("*_ "), match["value"].strip("*_ ")
    # A sentence with a colon in it is no field.
    if len(label.split()) > 6 or not value or set(value) <= set("-: "):
        return None
    return label, value


def _read_units(source: SourceText) -> list[_Unit]:
    units: list[_Unit] = []
    section = ""
    for number, line in enumerate(source.shown[:_MAX_LINES], start=1):
        if not line.strip():
            continue
        heading = _HEADING.match(line)
        if heading is not None:
            section = re.sub(r"^[§\d.\s]+", "", " ".join((heading["marked"] or heading["numbered"]).split()))
            continue
        field = find_labelled_value(line)
        if field is not None:
            units.append(_Unit(line.strip(), number, section, *field))
            continue
        units += [_Unit(text.strip(), number, section, "", "") for text in _SENTENCE_END.split(line) if text.strip()]
    return units


def normalise(text: str) -> str:
    """Return a text as comparisons see it: without differences of case, white space, and marks of Markdown."""
    return " ".join(re.sub(r"[*_`#|]+|^\s*[-+•]\s+", " ", text).split()).casefold().rstrip(".")


def find_differences(one: SourceText, two: SourceText) -> list[Difference]:
    """Return the differences of two documents, in the order of the first, then what only the second has.

    Fields of the same label are compared by their values, wherever they stand; other lines by their order, and two
    lines that are alike are two versions of one.
    """
    left, right = _read_units(one), _read_units(two)
    differences = _pair_fields(left, right)
    paired = _field_keys(left).keys() & _field_keys(right).keys()
    rest_left = _without_fields(left, paired)
    rest_right = _without_fields(right, paired)
    differences += _align_lines(rest_left, rest_right)
    return sorted(differences, key=lambda each: (each.one is None, (each.one or each.two or Side("", 0, 0)).first))


def _field_keys(units: Sequence[_Unit]) -> dict[tuple[str, int], _Unit]:
    """Return the fields by label and occurrence; a label that repeats is told apart by its number."""
    seen: dict[str, int] = {}
    keys: dict[tuple[str, int], _Unit] = {}
    for unit in units:
        if unit.label:
            label = normalise(unit.label)
            seen[label] = seen.get(label, -1) + 1
            keys[label, seen[label]] = unit
    return keys


def _pair_fields(left: Sequence[_Unit], right: Sequence[_Unit]) -> list[Difference]:
    ours, theirs = _field_keys(left), _field_keys(right)
    return [
        Difference("field", ours[key].label, _side(ours[key]), _side(theirs[key]))
        for key in ours.keys() & theirs.keys()
        if normalise(ours[key].value) != normalise(theirs[key].value)
    ]


def _without_fields(units: Sequence[_Unit], keys: Collection[tuple[str, int]]) -> list[_Unit]:
    """Return the units without the fields of these labels, which are compared by their values."""
    fields = _field_keys(units)
    lines = {fields[key].line for key in keys}
    return [unit for unit in units if not (unit.label and unit.line in lines)]


def _side(unit: _Unit) -> Side:
    return Side(unit.value if unit.label else unit.text, unit.line, unit.line)


def _align_lines(left: Sequence[_Unit], right: Sequence[_Unit]) -> list[Difference]:
    matcher = difflib.SequenceMatcher(
        None, [normalise(unit.text) for unit in left], [normalise(unit.text) for unit in right], autojunk=False
    )
    gone: list[_Unit] = []
    come: list[_Unit] = []
    differences: list[Difference] = []
    for tag, start, end, other_start, other_end in matcher.get_opcodes():
        if tag == "equal":
            continue
        paired, alone, others = _pair_alike(left[start:end], right[other_start:other_end])
        differences += paired
        gone += alone
        come += others
    # What moved to another place is no difference of what the documents say.
    moved = {normalise(unit.text) for unit in gone} & {normalise(unit.text) for unit in come}
    # A line may have moved and changed.
    paired, gone, come = _pair_alike(
        [unit for unit in gone if normalise(unit.text) not in moved],
        [unit for unit in come if normalise(unit.text) not in moved],
    )
    differences += paired
    differences += [Difference("only_first", unit.label or unit.section, _side(unit), None) for unit in gone]
    differences += [Difference("only_second", unit.label or unit.section, None, _side(unit)) for unit in come]
    return differences


_MAX_PAIRS = 40_000
"""Pairs of lines whose likeness is measured."""


def _pair_alike(left: Sequence[_Unit], right: Sequence[_Unit]) -> tuple[list[Difference], list[_Unit], list[_Unit]]:
    """Return pairs of lines that are alike as differences, and the lines of both sides that are left over."""
    if len(left) * len(right) > _MAX_PAIRS:
        return [], list(left), list(right)
    scored = sorted(
        ((_likeness(one, two), -a, -b) for a, one in enumerate(left) for b, two in enumerate(right)), reverse=True
    )
    used_left: set[int] = set()
    used_right: set[int] = set()
    found: list[Difference] = []
    for likeness, a, b in scored:
        if likeness < MIN_LINE_RATIO:
            break
        if -a in used_left or -b in used_right:
            continue
        used_left.add(-a)
        used_right.add(-b)
        one, two = left[-a], right[-b]
        label = one.section or two.section
        found.append(Difference("line", label, Side(one.text, one.line, one.line), Side(two.text, two.line, two.line)))
    return (
        found,
        [unit for at, unit in enumerate(left) if at not in used_left],
        [unit for at, unit in enumerate(right) if at not in used_right],
    )


def _likeness(one: _Unit, two: _Unit) -> float:
    """Return how alike two lines are: the share of their words, and a little for the same section."""
    ours, theirs = stems(one.text), stems(two.text)
    if not ours or not theirs:
        return 0.0
    shared = 2 * len(ours & theirs) / (len(ours) + len(theirs))
    same_section = bool(one.section) and normalise(one.section) == normalise(two.section)
    return shared + (0.15 if same_section else 0.0)
