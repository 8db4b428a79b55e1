"""Extraction of fields and lists from documents.

Labels and tables of the document are read by code. The model is asked for the rest, and what it gives counts only if
the document has it word for word.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import msgspec

from octollm import Check, ExecuteResult, Message, OctoError
from octollm.services.arms.document_goals import MAX_FIELDS, find_fields, wants_row_per_entry
from octollm.services.arms.retriever.alignment import find_labelled_value, normalise
from octollm.services.arms.retriever.chunks import (
    Chunk,
    SourceText,
    WorkTools,
    array_schema,
    ask_json,
    cut_chunks,
    describe_coverage,
    document_messages,
    map_chunks,
    object_schema,
    select_readable,
)
from octollm.services.arms.retriever.summary import build_result, nothing_found
from octollm.services.arms.retriever.support import split_sentences
from octollm.services.arms.retriever.typed_table import Cell, CitedTable
from octollm.text.lexical import stems
from octollm.text.passages import LineSpan

MAX_VALUE_CHARS = 160
MAX_ROWS = 500
_MAX_ROWS_PER_CHUNK = 12
_MAX_ROW_LINES = 8
"""How many lines the values of one row may stand apart."""
_TOKENS_PER_VALUE = 24
_EMPTY_VALUES = frozenset(
    {"", "-", "n/a", "na", "none", "null", "unknown", "not found", "not stated", "not given", "empty"}
)

# What a value must look like, by the name of its field.
_VALUE_RULES = tuple(
    (re.compile(name, re.IGNORECASE), re.compile(value, re.IGNORECASE))
    for name, value in (
        (r"e-?mail", r"@"),
        (r"phone|tel(?:ephone|efon|\b)|fax|mobil", r"\d.*\d.*\d"),
        (
            r"\bdates?\b|datum|deadline|\bdue\b|frist|fällig|\bday\b|fecha|birth",
            r"\d|\b(?:mon|tues|wednes|thurs|fri|satur|sun)day\b",
        ),
        (
            r"total|amount|price|cost|fee|salary|sum\b|betrag|preis|summe|gesamt|kosten|gebühr|netto|brutto|montant|"
            r"precio|quantity|menge"
            r"|anzahl|\bnumber\b|\bno\.?\b|nummer|\bid\b|\biban\b|percent|rate\b|discount|rabatt|duration|\bterm\b|"
            r"laufzeit",
            r"\d|\b(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|thirty|ein|zwei|drei|"
            r"vier|fünf|sechs|free)\b",
        ),
    )
)


def fits_field(field: str, value: str) -> bool:
    """Return whether a value looks like one of its field: a date has a digit, an address an ``@``."""
    return all(rule.search(value) for name, rule in _VALUE_RULES if name.search(field))


async def extract_table(goal: str, sources: Sequence[SourceText], tools: WorkTools) -> ExecuteResult:
    """Extract the fields that a goal names: a row for each document, or for each entry in them.

    The result has the table as text, and as artifacts in CSV and JSON. A cell is empty where the document has no value.
    Raises what the tools raise, for a used up budget only if nothing was read.
    """
    read, notes = select_readable(sources)
    if not read:
        return nothing_found("table", "the documents have no text", notes)
    fields = find_fields(goal) or await _ask_fields(goal, tools)
    if not fields:
        return nothing_found("table", "the goal names no fields to extract", notes)
    per_entry = wants_row_per_entry(goal, documents=len(read))
    rows: list[tuple[Cell, ...]] = []
    files: list[str] = []
    by_model = 0
    for number, source in enumerate(read):
        try:
            found, asked, missing = await (
                _read_entries(goal, fields, source, tools) if per_entry else _read_row(fields, source, tools)
            )
        except OctoError as error:
            if error.code != "budget_exhausted" or not rows:
                raise
            notes.append(f"covers {', '.join(dict.fromkeys(files))}: the token budget ended there")
            break
        await tools.progress(5 + 90 * (number + 1) / len(read), f"document {number + 1} of {len(read)}")
        rows += found[: MAX_ROWS - len(rows)]
        files += [source.name] * (len(rows) - len(files))
        by_model += asked
        notes += missing
    table = CitedTable(tuple(fields), tuple(rows), tuple(files))
    if not table.citations:
        return nothing_found("table", f"the documents do not state {', '.join(fields)}", notes)
    columns, open_choices = table.typed()
    artifacts = (
        await tools.write("table.csv", table.to_csv(columns), "text/csv"),
        await tools.write("table.json", table.to_json(columns), "application/json"),
    )
    cells = len(rows) * len(fields)
    filled = len(table.citations)
    checks = [Check("cells", True, f"{filled} of {cells} cells are filled, each with the document's own words")]
    if by_model:
        chosen = "1 value was" if by_model == 1 else f"{by_model} values were"
        checks.append(Check("choice", True, f"{chosen} chosen by the model", checked_by="model"))
    if per_entry and by_model:
        checks.append(Check("complete", False, "whether there are further entries", checked_by="nobody"))
    result = build_result("table", table.render(), table.citations, checks, [*notes, *open_choices])
    return msgspec.structs.replace(result, artifacts=artifacts)


class _Fields(msgspec.Struct, frozen=True):
    fields: tuple[str, ...]


async def _ask_fields(goal: str, tools: WorkTools) -> list[str]:
    """Return the fields that the model reads out of a goal that does not list them; only words of the goal count."""
    schema = object_schema({"fields": array_schema({"type": "string", "minLength": 2, "maxLength": 40}, MAX_FIELDS)})
    answer = await ask_json(
        [
            Message.system("Name the columns of the table that is asked for. Reply with JSON."),
            Message.user(goal[:1500]),
        ],
        schema,
        200,
        tools,
    )
    try:
        named = msgspec.json.decode(answer.encode(), type=_Fields).fields if answer else ()
    except msgspec.DecodeError:
        named = ()
    return list(dict.fromkeys(field.strip() for field in named if stems(field) & stems(goal)))[:MAX_FIELDS]


# A row for a document


async def _read_row(
    fields: Sequence[str], source: SourceText, tools: WorkTools
) -> tuple[list[tuple[Cell, ...]], int, list[str]]:
    """Return the row of a document, how many of its cells the model chose, and notes."""
    cells = find_labelled_fields(fields, source)
    missing = [field for field in fields if field not in cells]
    asked = 0
    notes: list[str] = []
    if missing:
        chunks = cut_chunks(source, tools.chunk_chars)

        async def read_chunk(chunk: Chunk) -> list[dict[str, Cell]]:
            left = [field for field in missing if field not in cells]
            if not left:
                return []
            found = await _ask_values(left, chunk, tools)
            # What stands behind the label of another field is the value of that field.
            taken = {(cell.citation, cell.text) for cell in cells.values()}
            cells.update({field: cell for field, cell in found.items() if (cell.citation, cell.text) not in taken})
            return [found]

        tokens = _TOKENS_PER_VALUE * len(missing) + 40
        done, why = await map_chunks(chunks, read_chunk, tools, answer_tokens=tokens, what=f"{source.name}, chunk")
        asked = sum(field in cells for field in missing)
        notes = [describe_coverage(chunks, len(done), why)] if why else []
    return [tuple(cells.get(field, Cell()) for field in fields)], asked, notes


def find_labelled_fields(fields: Sequence[str], source: SourceText) -> dict[str, Cell]:
    """Return the fields that a document states with their labels, such as ``Invoice number: 4711``.

    The same label decides, else one that has all words of the field. A field with two values of equally good labels is
    left to the model.
    """
    found: dict[str, Cell] = {}
    for field in fields:
        best: dict[str, tuple[float, Cell]] = {}
        for number, line in enumerate(source.shown, start=1):
            labelled = find_labelled_value(line)
            if labelled is None:
                continue
            label, value = labelled
            score = _label_score(field, label)
            if score > 0 and fits_field(field, value) and len(value) <= MAX_VALUE_CHARS:
                key = normalise(value)
                if key not in best or best[key][0] < score:
                    best[key] = score, Cell(value, source.cite(number, number))
        if best:
            top = max(score for score, _ in best.values())
            candidates = [cell for score, cell in best.values() if score == top]
            if len(candidates) == 1:
                found[field] = candidates[0]
    return found


def _label_score(field: str, label: str) -> float:
    if normalise(field) == normalise(label):
        return 2.0
    wanted, given = stems(field), stems(label)
    if not wanted or not given or not wanted <= given:
        return 0.0
    return 1.0 if wanted == given else len(wanted) / len(given)


async def _ask_values(fields: Sequence[str], chunk: Chunk, tools: WorkTools) -> dict[str, Cell]:
    """Return the values of fields that the model finds in a chunk, as far as the chunk has them word for word."""
    value = {"type": "string", "maxLength": MAX_VALUE_CHARS}
    schema = object_schema({f"field_{number}": value for number in range(len(fields))})
    listed = "\n".join(f"field_{number}: {field}" for number, field in enumerate(fields))
    instruction = (
        f"Copy these fields from the document, exactly as it has them:\n{listed}\nGive an empty string for a field "
        f"that the document does not state. Reply with JSON."
    )
    answer = await ask_json(document_messages(chunk, instruction), schema, _TOKENS_PER_VALUE * len(fields) + 40, tools)
    try:
        given = msgspec.json.decode(answer.encode("utf-8", "surrogatepass"), type=dict[str, str]) if answer else {}
    except msgspec.DecodeError:
        given = {}
    cells: dict[str, Cell] = {}
    for number, field in enumerate(fields):
        cell = locate_value(given.get(f"field_{number}", ""), chunk)
        if cell is not None and fits_field(field, cell.text):
            cells[field] = cell
    return cells


def locate_value(value: str, chunk: Chunk) -> Cell | None:
    """Return a value with the lines that have it word for word; ``None`` if the chunk has not."""
    text = " ".join(value.split()).strip("\"'“” ")
    if text.casefold() in _EMPTY_VALUES or len(text) > MAX_VALUE_CHARS:
        return None
    pattern = re.compile(r"(?<!\w)" + r"\s+".join(re.escape(part) for part in text.split()) + r"(?!\w)", re.IGNORECASE)
    match = pattern.search(chunk.span.text)
    if match is None:
        return None
    first = chunk.span.line_start
    if chunk.span.line_end > chunk.span.line_start:
        first += chunk.span.text.count("\n", 0, match.start())
    last = min(first + match.group().count("\n"), chunk.span.line_end)
    return Cell(" ".join(match.group().split()), chunk.source.cite(first, last))


# A row for each entry


async def _read_entries(
    goal: str, fields: Sequence[str], source: SourceText, tools: WorkTools
) -> tuple[list[tuple[Cell, ...]], int, list[str]]:
    rows = find_labelled_entries(fields, source)
    if rows:
        return rows, 0, []
    chunks = cut_chunks(source, tools.chunk_chars)

    async def read_chunk(chunk: Chunk) -> list[tuple[Cell, ...]]:
        return await _ask_rows(goal, fields, chunk, tools)

    tokens = min(900, _TOKENS_PER_VALUE * len(fields) * _MAX_ROWS_PER_CHUNK)
    done, why = await map_chunks(chunks, read_chunk, tools, answer_tokens=tokens, what=f"{source.name}, chunk")
    notes = [describe_coverage(chunks, len(done), why)] if why else []
    found = {tuple(normalise(cell.text) for cell in row): row for rows in done for row in rows}
    return list(found.values()), sum(bool(cell.text) for row in found.values() for cell in row), notes


def find_labelled_entries(fields: Sequence[str], source: SourceText) -> list[tuple[Cell, ...]]:
    """Return the rows that a document has as a table with a header, or as blocks of the same labels."""
    return _read_pipe_tables(fields, source) or _read_blocks(fields, source)


def _read_pipe_tables(fields: Sequence[str], source: SourceText) -> list[tuple[Cell, ...]]:
    rows: list[tuple[Cell, ...]] = []
    columns: dict[str, int] = {}
    for number, line in enumerate(source.shown, start=1):
        if line.count("|") < 2 and "\t" not in line:
            columns = {}
            continue
        cells = [cell.strip(" *_`") for cell in re.split(r"(?<!\\)\||\t", line.strip().strip("|"))]
        if all(set(cell) <= set("-: ") for cell in cells):
            continue
        if not columns:
            columns = _match_columns(fields, cells)
            continue
        row = tuple(
            Cell(cells[columns[field]], source.cite(number, number))
            if field in columns and columns[field] < len(cells) and cells[columns[field]]
            else Cell()
            for field in fields
        )
        if any(cell.text for cell in row):
            rows.append(row)
    return rows


def _match_columns(fields: Sequence[str], header: Sequence[str]) -> dict[str, int]:
    """Return the column of each field by the header; none unless at least half of the fields are in it."""
    columns: dict[str, int] = {}
    for field in fields:
        scores = [_label_score(field, name) for name in header]
        if scores and max(scores) > 0:
            columns[field] = scores.index(max(scores))
    return columns if 2 * len(columns) >= len(fields) else {}


def _read_blocks(fields: Sequence[str], source: SourceText) -> list[tuple[Cell, ...]]:
    """Return the entries of blocks of labelled lines, each of which begins with the same label."""
    found: list[tuple[str, Cell]] = []
    for number, line in enumerate(source.shown, start=1):
        labelled = find_labelled_value(line)
        if labelled is None:
            continue
        scored = {field: _label_score(field, labelled[0]) for field in fields}
        best = max(scored, key=lambda field: scored[field])
        if scored[best] > 0:
            found.append((best, Cell(labelled[1], source.cite(number, number))))
    names = [name for name, _ in found]
    # One entry is no list, and a field of one entry is no proof that the others have none.
    if not names or names.count(names[0]) < 2 or 2 * len(set(names)) < len(fields):
        return []
    rows: list[dict[str, Cell]] = []
    for name, cell in found:
        if name == names[0] or not rows:
            rows.append({})
        rows[-1].setdefault(name, cell)
    return [tuple(row.get(field, Cell()) for field in fields) for row in rows]


class _Rows(msgspec.Struct, frozen=True):
    rows: tuple[dict[str, str], ...]


async def _ask_rows(goal: str, fields: Sequence[str], chunk: Chunk, tools: WorkTools) -> list[tuple[Cell, ...]]:
    value = {"type": "string", "maxLength": MAX_VALUE_CHARS}
    row = object_schema({f"field_{number}": value for number in range(len(fields))})
    schema = object_schema({"rows": {"type": "array", "maxItems": _MAX_ROWS_PER_CHUNK, "items": row}})
    listed = "\n".join(f"field_{number}: {field}" for number, field in enumerate(fields))
    instruction = (
        f"The task is: {goal[:400]}\nGive a row for each such entry in the document, with these fields, exactly as "
        f"the document has them:\n{listed}\nGive an empty string for what it does not state, and no row if there is no "
        f"such entry. Reply with JSON."
    )
    tokens = min(900, _TOKENS_PER_VALUE * len(fields) * _MAX_ROWS_PER_CHUNK)
    answer = await ask_json(document_messages(chunk, instruction), schema, tokens, tools)
    try:
        given = msgspec.json.decode(answer.encode("utf-8", "surrogatepass"), type=_Rows).rows if answer else ()
    except msgspec.DecodeError:
        given = ()
    rows = [_locate_row(fields, row, chunk) for row in given]
    return [row for row in rows if sum(bool(cell.text) for cell in row) * 2 >= min(2, len(fields))]


def _locate_row(fields: Sequence[str], given: Mapping[str, str], chunk: Chunk) -> tuple[Cell, ...]:
    """Return a row whose values stand together; a value that stands elsewhere belongs to another entry.

    The longest value is the anchor. In prose the others stand in its sentence, in a block of lines near its line.
    """
    values = [given.get(f"field_{number}", "") for number in range(len(fields))]
    order = sorted(range(len(fields)), key=lambda at: (-len(values[at].split()), at))
    cells = [Cell()] * len(fields)
    near: Chunk | None = None
    for at in order:
        cell = locate_value(values[at], near or chunk)
        if cell is None or cell.citation is None or not fits_field(fields[at], cell.text):
            continue
        cells[at] = cell
        near = near or _surroundings(chunk, cell.text, cell.citation.line_start)
    return tuple(cells)


def _surroundings(chunk: Chunk, value: str, line: int) -> Chunk:
    """Return the sentence of a value if its line has several, else the lines around it."""
    is_one_line = chunk.span.line_end == chunk.span.line_start
    sentences = split_sentences(chunk.span.text if is_one_line else chunk.source.shown[line - 1])
    if len(sentences) > 1:
        own = next((each for each in sentences if value.casefold() in " ".join(each.split()).casefold()), "")
        if own:
            return Chunk(chunk.source, LineSpan(line, line, own))
    if is_one_line:
        return chunk
    first = max(chunk.span.line_start, line - _MAX_ROW_LINES // 2)
    last = min(chunk.span.line_end, line + _MAX_ROW_LINES)
    # A blank line ends the block that an entry is.
    text = chunk.span.text.split("\n")[first - chunk.span.line_start : last - chunk.span.line_start + 1]
    while text and line > first and "" in [each.strip() for each in text[: line - first]]:
        text, first = text[1:], first + 1
    end = next((at for at, each in enumerate(text) if at > line - first and not each.strip()), len(text))
    text = text[:end]
    return Chunk(chunk.source, LineSpan(first, first + len(text) - 1, "\n".join(text)))
