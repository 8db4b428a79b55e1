"""Plain questions are answered by rules, and only where every word is known: what a rule writes is never wrong."""

from __future__ import annotations

import math
from datetime import date
from typing import Any

import duckdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octollm.contracts.operations import ResultSet
from octollm.services.arms.coder.question_rules import plain_query
from octollm.services.arms.coder.sql_heuristics import find_query_issues
from octollm.services.arms.coder.table_schema import (
    TableColumn,
    TableSchema,
    format_schema,
    join_missing_table,
    missing_column_hint,
    quote_names,
    quote_reserved_names,
)

SALES = TableSchema(
    "sales",
    (
        TableColumn("Day", "DATE"),
        TableColumn("City", "VARCHAR", ("Bergen", "Oslo", "all")),
        TableColumn("Seller", "VARCHAR"),
        TableColumn("Amount", "DOUBLE"),
        TableColumn("units sold", "BIGINT"),
        TableColumn("Paid", "BOOLEAN"),
    ),
    row_count=3,
)
ROWS = [
    (date(2024, 3, 5), "Oslo", "Ann", 10.5, 3, True),
    (date(2024, 3, 9), "Bergen", "Bob", 20.0, 1, False),
    (date(2024, 12, 31), "Oslo", "Cid", 5.25, 7, True),
]


def run(query: str, rows: list[tuple[Any, ...]] = ROWS) -> list[tuple[Any, ...]]:
    with duckdb.connect() as connection:
        columns = ", ".join(f'"{column.name}" {column.type}' for column in SALES.columns)
        connection.execute(f"CREATE TABLE sales ({columns})")
        connection.executemany("INSERT INTO sales VALUES (?, ?, ?, ?, ?, ?)", rows)
        return connection.execute(query).fetchall()


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What is the sum of Amount?", [(35.75,)]),
        ("what's the total amount", [(35.75,)]),
        ("Wie hoch ist die Summe der Spalte Amount?", [(35.75,)]),
        ("Amount の合計はいくらですか", [(35.75,)]),
        ("What is the average units sold?", [(11 / 3,)]),
        ("What is the highest Amount in Oslo?", [(10.5,)]),
        ("What is the earliest Day?", [(date(2024, 3, 5),)]),
        ("What is the sum of Amount in March 2024?", [(30.5,)]),
        ("What is the sum of Amount in December 2024?", [(5.25,)]),
        ("What is the sum of Amount in 2024?", [(35.75,)]),
        ("What is the sum of Amount per City?", [("Bergen", 20.0), ("Oslo", 15.75)]),
        ("How many rows are there for each City?", [("Bergen", 1), ("Oslo", 2)]),
        ("How many rows have Amount greater than 10 and Paid = true?", [(1,)]),
        ("How many sales have units sold at least 3?", [(2,)]),
        ("What is the sum of units sold where City is bergen?", [(1,)]),
        ("Which Seller has the highest Amount?", [("Bob", 20.0)]),
        ("Which City has the highest total Amount?", [("Bergen", 20.0)]),
        ("What is the Amount of Seller Cid?", [(5.25,)]),
    ],
)
def test_a_plain_question_has_a_query(question: str, answer: list[tuple[Any, ...]]) -> None:
    query = plain_query(question, (SALES,))
    assert query is not None
    assert run(query) == answer


@pytest.mark.parametrize(
    "question",
    [
        "What is the sum of Amount without Oslo?",
        "What is the sum of Amount for Oslo and Bergen?",
        "What is the sum of the highest Amount per City?",
        "What is the sum of Amount times units sold?",
        "What is the sum of Amount not in Oslo?",
        "What is the sum of City?",
        "What is the highest City?",
        "What is the sum of Amount in May?",
        "What is the sum of Amount where City is Rome?",
        "How many cities are there?",
        "How many rows have Amount between 5 and 10?",
        "How many rows have Amount greater than 10 or Paid = true?",
        "How many rows have Amount not greater than 10?",
        "How many sellers have Amount greater than 10?",
        "Which Seller has the second highest Amount?",
        "Which Seller has the highest Amount and why?",
        "What is the difference of Amount and units sold?",
        "What is the sum of ⟦3⟧?",
        "Summarize the sales",
        "What is the sum of Amount?\n- Answer in French",
    ],
)
def test_a_question_with_a_word_that_is_not_known_is_left_to_the_model(question: str) -> None:
    assert plain_query(question, (SALES,)) is None


def test_a_question_that_may_ask_for_a_join_is_left_to_the_model() -> None:
    stores = TableSchema("stores", (TableColumn("City", "VARCHAR"), TableColumn("Manager", "VARCHAR")))
    both = (SALES, stores)
    assert plain_query("What is the sum of Amount per Manager?", both) is None
    assert plain_query("What is the sum of Amount in stores?", both) is None
    assert plain_query("What is the sum of Amount?", both) is not None
    assert plain_query("What is the sum of Amount?", (SALES, SALES)) is None


CELLS = st.tuples(
    st.dates(date(2023, 1, 1), date(2025, 12, 31)),
    st.sampled_from(["Oslo", "Bergen", "all"]),
    st.sampled_from(["Ann", "Bob", "O'Neill"]),
    st.integers(-1000, 1000).map(lambda each: each / 4),
    st.integers(0, 50),
    st.booleans(),
)
FUNCTIONS = {"sum": math.fsum, "highest": max, "lowest": min, "average": lambda each: math.fsum(each) / len(each)}


@given(
    st.lists(CELLS, min_size=1, max_size=12),
    st.sampled_from(sorted(FUNCTIONS)),
    st.sampled_from([("Amount", 3), ("units sold", 4)]),
    st.integers(-20, 60),
)
@settings(max_examples=25)
def test_the_query_computes_what_is_asked(
    rows: list[tuple[Any, ...]], word: str, column: tuple[str, int], limit: int
) -> None:
    name, at = column
    query = plain_query(f"What is the {word} of {name}?", (SALES,))
    assert query is not None
    assert run(query, rows)[0][0] == pytest.approx(FUNCTIONS[word]([row[at] for row in rows]))
    query = plain_query(f"How many rows have {name} greater than {limit}?", (SALES,))
    assert query is not None
    assert run(query, rows) == [(sum(row[at] > limit for row in rows),)]
    query = plain_query(f"What is the sum of {name} per Seller?", (SALES,))
    assert query is not None
    sellers = sorted({row[2] for row in rows})
    assert run(query, rows) == [(each, pytest.approx(sum(r[at] for r in rows if r[2] == each))) for each in sellers]


@given(st.text(max_size=60))
@settings(max_examples=40)
def test_any_question_is_parsed_or_left(text: str) -> None:
    plain_query(text, (SALES,))
    plain_query(f"What is the sum of Amount {text}?", (SALES,))
    query = plain_query(f"How many rows have Seller = {text}?", (SALES,))
    if query is not None:
        run(query)


PLACES = TableSchema(
    "places", (TableColumn("at", "TIMESTAMP"), TableColumn("Összeg", "DOUBLE"), TableColumn("id", "INT"))
)


@pytest.mark.parametrize(
    ("written", "mended"),
    [
        ("SELECT sum(Osszeg) FROM places", 'SELECT sum("Összeg") FROM places'),
        ("SELECT 'Osszeg' FROM places", "SELECT 'Osszeg' FROM places"),
        ("SELECT 1 FROM places WHERE at LIKE '2024%'", "SELECT 1 FROM places WHERE CAST(at AS VARCHAR) LIKE '2024%'"),
    ],
)
def test_names_and_comparisons_of_a_model_are_mended(written: str, mended: str) -> None:
    assert quote_names(written, (PLACES,)) == mended


def test_a_column_that_is_a_keyword_is_quoted() -> None:
    query = "SELECT at FROM places WHERE x = 'at' ORDER BY at"
    assert quote_reserved_names(query, (PLACES,)) == """SELECT "at" FROM places WHERE x = 'at' ORDER BY "at\""""


def test_a_table_that_is_not_joined_gets_a_hint() -> None:
    other = TableSchema("owners", (TableColumn("id", "INT"), TableColumn("name", "VARCHAR")))
    hint = missing_column_hint('Binder Error: Referenced table "owners" not found!', (PLACES, other))
    assert "JOIN owners ON places.id = owners.id" in hint


def test_tables_with_the_same_columns_are_parts_of_one() -> None:
    first, second = (TableSchema(name, SALES.columns) for name in ("q1", "q2"))
    schema = format_schema((first, second))
    assert "q1 and q2 have the same columns. All rows of both" in schema
    assert "belong together" not in schema


def test_a_table_whose_columns_are_named_is_joined_on_the_only_shared_column() -> None:
    other = TableSchema("owners", (TableColumn("id", "INT"), TableColumn("name", "VARCHAR")))
    error = 'Binder Error: Referenced table "owners" not found!'
    query = "SELECT owners.name FROM places WHERE id = owners.id"
    joined = 'SELECT owners.name FROM places JOIN "owners" USING ("id") WHERE id = owners.id'
    assert join_missing_table(query, error, (PLACES, other)) == joined
    assert join_missing_table(query, "Parser Error", (PLACES, other)) == query
    assert join_missing_table(query, error, (PLACES,)) == query
    alias = query.replace("places", "places AS p")
    assert join_missing_table(alias, error, (PLACES, other)) == alias


def test_values_of_two_tables_are_no_answer_to_a_question_for_their_sum() -> None:
    query = "SELECT sum(Amount) FROM q1 UNION ALL SELECT sum(Amount) FROM q2"
    table = ResultSet(("sum",), ((1.5,), (2.5,)), 2)
    parts = tuple(TableSchema(name, SALES.columns, row_count=3) for name in ("q1", "q2"))
    assert any(each.is_fatal for each in find_query_issues("What is the sum of q1 and q2?", query, table, parts))
    assert not find_query_issues("What are the sums of both?", query, table, parts)


def test_groups_without_their_names_are_no_answer() -> None:
    table = ResultSet(("sum",), ((1.5,), (2.5,)), 2)
    query = "SELECT sum(Amount) FROM sales GROUP BY City"
    assert any(each.is_fatal for each in find_query_issues("Sum of Amount per City", query, table, (SALES,)))
    assert not find_query_issues("Sum of Amount per City", query.replace("sum", "City, sum"), table, (SALES,))
