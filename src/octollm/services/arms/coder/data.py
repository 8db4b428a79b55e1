"""Answers a question over tables: ask for a query, run it, repair it.

Several drafts are written; a result that two of them agree on is the answer (self-consistency).
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from octollm import Check, Evidence, ExecuteResult, Message, OctoError
from octollm.contracts.operations import Cell, ResultSet, RunResult, format_assumptions, format_cell, parse_result_set
from octollm.services.arms.coder.question_check import find_contradictions
from octollm.services.arms.coder.question_rules import plain_query
from octollm.services.arms.coder.sql_heuristics import QueryIssue, find_query_issues, required_functions_hint
from octollm.services.arms.coder.table_schema import (
    RunSql,
    TableSchema,
    describe_tables,
    extract_query,
    format_schema,
    join_missing_table,
    missing_column_hint,
    quote_identifier,
    quote_names,
    quote_reserved_names,
)
from octollm.services.arms.completion import PromptFunction, ask_draft
from octollm.services.arms.document_goals import find_document_work
from octollm.text.lexical import stems

OnText = Callable[[str], Awaitable[None]]

MAX_QUERY_TOKENS = 220
"""Tokens of one answer of the model."""
MAX_REPAIRS = 2
"""Repairs of one draft."""
MAX_DRAFTS = 3
"""Drafts at most; two that agree are enough."""
MAX_NOTES = 2000
MAX_SHOWN_ROWS = 50
"""Rows in the text of the answer."""
QUESTION_CHECK = "question"
"""The name of the check whether the query fits the question."""
NO_ROWS_TEXT = "No rows match."
"""The text of an empty result."""
_TEMPERATURES = (0.0, 0.6, 0.9)
_SQL_PROMPT = (
    "You write DuckDB SQL. Answer every part of the question with one query over the tables: a column for each value "
    "that is asked for. Reply with the SQL only."
)
_PROMPT_VARIANTS = (
    "",
    "Reply with exactly one SELECT statement that computes what is asked, and selects only that.",
    "Think about which rows count, then reply with one DuckDB query.",
)
"""Appended to the prompt, so that drafts differ and the model's prefix cache still covers everything before it."""


@dataclass(frozen=True, slots=True)
class QueryDraft:
    """A query that ran, its rows, and the issues found in it."""

    query: str
    table: ResultSet
    issues: tuple[QueryIssue, ...]

    @property
    def is_sound(self) -> bool:
        """Return whether the query has no fatal issue."""
        return not any(doubt.is_fatal for doubt in self.issues)

    @property
    def rank(self) -> tuple[bool, int, int]:
        """Return what drafts are ordered by, the best first."""
        return not self.is_sound, sum(not doubt.is_note for doubt in self.issues), len(self.issues)


async def answer_data(
    goal: str,
    ask: PromptFunction,
    run_sql: RunSql,
    *,
    notes: str = "",
    reasons: Sequence[str] = (),
    on_text: OnText | None = None,
) -> ExecuteResult:
    """Answer ``goal`` with the output of a query over all rows; the answer includes the query.

    ``notes`` are results of earlier steps; ``reasons`` say why an earlier answer was rejected. Raises ``OctoError``:
    ``not_accepted`` when no query runs or the drafts disagree, ``step_stopped`` for a goal that is no question,
    ``file_invalid`` when a file is not a table, and what ``ask`` and ``run_sql`` raise.
    """
    tables = await describe_tables(run_sql)
    if find_document_work(goal) in ("translation", "rewrite"):
        raise OctoError(_NOT_FOR_TABLES, code="step_stopped")
    draft = None if reasons else await _answer_by_rule(goal, tables, run_sql)
    if draft is not None:
        return _build_result(draft, Check("rule", True, "every word of the question is known, so no model was asked"))
    schema, wanted = format_schema(tables), required_functions_hint(goal, tables)
    drafts: list[QueryDraft] = []
    failures: list[str] = []
    runs = _QueryRuns(run_sql)
    for number in range(MAX_DRAFTS):
        if len(drafts) + MAX_DRAFTS - number < 2:
            break  # no two drafts can agree any more
        messages = [
            Message.system(_SQL_PROMPT),
            Message.user(_question_prompt(schema, goal, notes, reasons, [wanted, _PROMPT_VARIANTS[number]])),
        ]
        draft = await _write_draft(goal, tables, messages, ask, runs, number, failures, on_text)
        if draft is None:
            continue
        for other in drafts:
            best = min(other, draft, key=lambda one: (*one.rank, -len(one.table.columns)))
            if best.is_sound and results_agree(other.table, draft.table):
                why = f"{len(drafts) + 1} drafts were compared, two agree"
                return _build_result(best, Check("agreement", True, why, checked_by="model"))
        drafts.append(draft)
    if absent := await _find_absent_value(goal, tables, drafts, run_sql):
        return absent
    raise OctoError(_failure_message(drafts, failures), code="not_accepted")


def _find_issues(goal: str, query: str, table: ResultSet, tables: tuple[TableSchema, ...]) -> tuple[QueryIssue, ...]:
    issues = [*find_query_issues(goal, query, table, tables), *find_contradictions(goal, query, table, tables)]
    return tuple(dict.fromkeys(issues))


async def _find_absent_value(
    goal: str, tables: tuple[TableSchema, ...], drafts: Sequence[QueryDraft], run_sql: RunSql
) -> ExecuteResult | None:
    """Return "Not found" if every draft looks for a value of the question that no text of the tables contains."""
    looked_for = [{doubt.unknown_value for doubt in draft.issues if doubt.unknown_value} for draft in drafts]
    shared = looked_for[0].intersection(*looked_for[1:]) if looked_for else set[str]()
    value = next((each for each in sorted(shared) if each.casefold() in goal.casefold()), "")
    literal = "'" + value.replace("'", "''") + "'"
    selects = [
        f"SELECT {quote_identifier(column.name)} AS found FROM {quote_identifier(table.table)} "  # noqa: S608
        f"WHERE contains(lower({quote_identifier(column.name)}), lower({literal}))"
        for table in tables
        for column in table.columns
        if column.is_text
    ]
    if not value or not selects:
        return None
    query = " UNION ALL ".join(selects)
    ran = await run_sql(query)
    if ran.exit_code != 0 or parse_result_set(ran.stdout).rows:
        return None
    columns = sorted({doubt.text for draft in drafts for doubt in draft.issues if doubt.unknown_value == value})
    return ExecuteResult(
        output=f"Not found: no row has “{value}”. {' '.join(columns)}\n\nQuery:\n```sql\n{query}\n```",
        evidence=Evidence(
            kind="data",
            query=query,
            columns=("found",),
            rows=0,
            checks=(Check("absent", True, f"no text of the tables has “{value}”"),),
            found=False,
        ),
    )


async def _answer_by_rule(goal: str, tables: tuple[TableSchema, ...], run_sql: RunSql) -> QueryDraft | None:
    """Return the query of a rule and its rows; ``None`` where no rule applies, or the rows speak against it."""
    query = plain_query(goal, tables) or _summary_query(goal, tables)
    ran = await run_sql(query) if query else None
    if query is None or ran is None or ran.exit_code != 0:
        return None
    table = parse_result_set(ran.stdout)
    draft = QueryDraft(query, table, _find_issues(goal, query, table, tables))
    return draft if all(doubt.is_note for doubt in draft.issues) else None


_NOT_FOR_TABLES = (
    "Tables are not translated or reworded: a query answers from them. Ask a question of the table, or give its text "
    "in a document (.txt, .md)."
)
_GROUPING = re.compile(r"\b(?:by|per|pro|je|nach|par|por|for each|of each|top|only|where)\b", re.IGNORECASE)
_SUMMARY_QUERY = (
    'SELECT column_name AS "column", column_type AS "type", "min" AS lowest, "max" AS highest, '
    "round(TRY_CAST(avg AS DOUBLE), 4) AS mean, null_percentage AS empty_percent FROM (SUMMARIZE {table})"
)


def _summary_query(goal: str, tables: tuple[TableSchema, ...]) -> str | None:
    """Return the query of a summary of a whole table; ``None`` for one of some columns or groups: a model reads it."""
    words = stems(goal)
    if find_document_work(goal) != "summary" or len(tables) != 1 or _GROUPING.search(goal):
        return None
    if any(stems(column.name) & words for column in tables[0].columns):
        return None
    return _SUMMARY_QUERY.format(table=quote_identifier(tables[0].table))


def results_agree(one: ResultSet, other: ResultSet) -> bool:
    """Return whether two results are equivalent: the same number of rows, each with the other's cells or a subset.

    The order of rows and columns and the names of columns are ignored. With three or more rows and a measure in
    common, row labels are ignored too (a month as 3 or as 2024-03-01).
    """
    if one.row_count != other.row_count or len(one.rows) != len(other.rows):
        return False
    if len(one.rows) >= 3 and _distinct_measures(one) & _distinct_measures(other):
        return True
    few, many = (one, other) if len(one.columns) <= len(other.columns) else (other, one)
    left = [[_normalise_cell(cell) for cell in row] for row in many.rows]
    for row in few.rows:
        cells = [_normalise_cell(cell) for cell in row]
        at = next((i for i, candidate in enumerate(left) if _contains_cells(candidate, cells)), None)
        if at is None:
            return False
        del left[at]
    return True


def render_answer(table: ResultSet, query: str, note: str = "") -> str:
    """Return the answer as text: each value with its column's name, a note, the assumptions and the query."""
    columns = table.columns
    if not table.rows:
        body = NO_ROWS_TEXT
    elif len(table.rows) == 1:
        body = "\n".join(f"{name}: {format_cell(cell)}" for name, cell in zip(columns, table.rows[0], strict=True))
    else:
        lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
        lines.extend(" | ".join(format_cell(cell) for cell in row) for row in table.rows[:MAX_SHOWN_ROWS])
        if table.row_count > MAX_SHOWN_ROWS:
            lines.append(f"… {table.row_count - MAX_SHOWN_ROWS} more rows")
        body = "\n".join(lines)
    told = f"Note: {note}" if note else ""
    parts = (body, told, format_assumptions(table.assumptions), f"Query:\n```sql\n{query}\n```")
    return "\n\n".join(filter(None, parts))


class _QueryRuns:
    """Runs each query once; the tables do not change between two runs."""

    def __init__(self, run_sql: RunSql) -> None:
        self._run_sql = run_sql
        self._results: dict[str, RunResult] = {}

    def has_failed(self, query: str) -> bool:
        """Return whether the query was run and failed."""
        result = self._results.get(_normalise_query(query))
        return result is not None and result.exit_code != 0

    async def run(self, query: str) -> RunResult:
        """Return the result of a query."""
        key = _normalise_query(query)
        if key not in self._results:
            self._results[key] = await self._run_sql(query)
        return self._results[key]


def _normalise_query(query: str) -> str:
    return " ".join(query.split()).rstrip("; ")


async def _write_draft(
    goal: str,
    tables: tuple[TableSchema, ...],
    messages: list[Message],
    ask: PromptFunction,
    runs: _QueryRuns,
    number: int,
    failures: list[str],
    on_text: OnText | None,
) -> QueryDraft | None:
    """Return a query repaired until it has no issues, else the best one that ran; ``None`` when none did.

    A query that failed before ends the attempts: the model repeats itself.
    """
    best: QueryDraft | None = None
    answers: set[str] = set()
    for attempt in range(1 + MAX_REPAIRS):
        answer = await ask_draft(
            ask,
            messages,
            max_tokens=MAX_QUERY_TOKENS,
            temperature=_TEMPERATURES[number] if attempt == 0 else max(_TEMPERATURES[number], 0.3),
            seed=number * 10 + attempt,
            on_text=on_text,
        )
        query = extract_query(answer)
        query = quote_names(query, tables) if query else None
        is_repeated = answer.strip() in answers or (query is not None and runs.has_failed(query))
        answers.add(answer.strip())
        if is_repeated:
            failures.append("The model repeats a query that failed.")
            return best
        if query is None:
            problem = "There is no SELECT statement in the answer."
        else:
            ran = await runs.run(query)
            if ran.exit_code != 0:
                repaired = quote_reserved_names(query, tables) if "Parser Error" in ran.stderr else query
                repaired = join_missing_table(repaired, ran.stderr, tables)
                if repaired != query:
                    query, ran = repaired, await runs.run(repaired)
            if ran.exit_code == 0:
                table = parse_result_set(ran.stdout)
                draft = QueryDraft(query, table, _find_issues(goal, query, table, tables))
                if best is None or draft.rank < best.rank:
                    best = draft
                faults = [doubt.text for doubt in draft.issues if not doubt.is_note]
                if not faults:
                    return draft
                problem = " ".join(faults)
            else:
                error = ran.stderr.strip() or ran.reason
                problem = f"The query failed: {error[:400]}{missing_column_hint(error, tables)}"
        failures.append(problem)
        messages = [
            *messages[:2],
            Message.assistant(answer[:1200]),
            Message.user(f"{problem}\nReply with the corrected SQL only."),
        ]
    return best


def _failure_message(drafts: Sequence[QueryDraft], failures: Sequence[str]) -> str:
    """Return why there is no answer: the results of the drafts, or the errors of the queries."""
    against = list(dict.fromkeys(doubt.text for one in drafts for doubt in one.issues if doubt.is_fatal))
    attempts = "; ".join(f"[{one.query}] gave {_summarise_table(one.table)}" for one in drafts)
    if not drafts:
        return f"No query could be run: {'; '.join(failures[-3:])}"
    if not any(one.is_sound for one in drafts):
        return f"Not certain: no query does what is asked. {' '.join(against)} Tried: {attempts}"
    if len(drafts) == 1:
        return f"Not certain: only one query could be run, and no other bears it out: {attempts}"
    return f"Not certain: the queries do not agree, so none is given as the answer: {attempts}"


def _question_prompt(schema: str, goal: str, notes: str, reasons: Sequence[str], said: Sequence[str]) -> str:
    known = f"Known so far: {notes[:MAX_NOTES]}\n" if notes else ""
    refused = f"\nAn earlier answer was refused: {' '.join(reasons)[:600]}" if reasons else ""
    return "\n".join([schema, "", f"{known}Question: {goal}{refused}", *filter(None, said)])


def _build_result(draft: QueryDraft, check: Check) -> ExecuteResult:
    doubts = " ".join(doubt.text for doubt in draft.issues)
    note = f"not certain, check it: {doubts}" if doubts else ""
    fits = Check(QUESTION_CHECK, not doubts, doubts or "nothing in the query contradicts the words of the question")
    return ExecuteResult(
        output=render_answer(draft.table, draft.query, note),
        evidence=Evidence(
            kind="data",
            query=draft.query,
            columns=draft.table.columns,
            rows=draft.table.row_count,
            assumptions=draft.table.assumptions,
            checks=(check, fits),
            notes=(note,) if note else (),
        ),
    )


def _distinct_measures(table: ResultSet) -> set[tuple[str, ...]]:
    """Return the float columns whose values are mostly distinct, each sorted."""
    measures: set[tuple[str, ...]] = set()
    for cells in zip(*table.rows, strict=True):
        if all(isinstance(cell, float) for cell in cells) and len(set(cells)) * 2 > len(cells):
            measures.add(tuple(sorted(_normalise_cell(cell) for cell in cells)))
    return measures


def _contains_cells(many: list[str], few: list[str]) -> bool:
    rest = list(many)
    for cell in few:
        if cell not in rest:
            return False
        rest.remove(cell)
    return True


def _normalise_cell(cell: Cell) -> str:
    """Return a cell in comparable form: numbers, of whatever type, to nine significant digits."""
    if isinstance(cell, str):
        try:
            cell = float(cell)
        except ValueError:
            return cell
    if isinstance(cell, int | float) and not isinstance(cell, bool):
        return f"{float(cell):.9g}"
    return format_cell(cell)


def _summarise_table(table: ResultSet) -> str:
    rows = [", ".join(format_cell(cell) for cell in row) for row in table.rows[:3]]
    more = f" and {table.row_count - 3} rows more" if table.row_count > 3 else ""
    return (" / ".join(rows) or "no rows")[:200] + more
