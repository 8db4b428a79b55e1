from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octollm.contracts.operations import ResultSet, RunResult
from octollm.contracts.task import Assumption
from octollm.errors import OctoError
from octollm.services.arms.coder.data import answer_data, render_answer, results_agree
from octollm.services.arms.coder.question_rules import row_count_query
from octollm.services.arms.coder.sql_heuristics import find_query_issues as find_doubts
from octollm.services.arms.coder.sql_heuristics import find_unknown_values, required_functions_hint
from octollm.services.arms.coder.table_schema import describe_tables, extract_query, format_schema, missing_column_hint

SALES = (
    "CREATE TABLE sales AS SELECT * FROM "
    "(VALUES (1, 'North', 150.5), (2, 'South', 20.0), (3, 'North', 300.25)) t(id, region, amount)"
)
GOAL = "How many rows have amount > 100, and their total?"
QUERY = "SELECT count(*) AS n, sum(amount) AS total FROM sales WHERE amount > 100"


async def test_answers_with_values_columns_and_query(scripted_prompts, sql) -> None:
    ask = scripted_prompts(f"```sql\n{QUERY};\n```", f"{QUERY.replace('n,', 'rows_above,')};")
    result = await answer_data(GOAL, ask, sql(SALES))
    assert result.output.startswith("n: 2\ntotal: 450.75")
    assert QUERY in result.output
    assert result.evidence is not None
    assert (result.evidence.query, result.evidence.columns, result.evidence.rows) == (QUERY, ("n", "total"), 1)
    assert "region VARCHAR: 'North', 'South'" in ask.asked[0][1].content


@pytest.mark.parametrize("goal", ["Summarize sales.csv", "Fasse die Tabelle zusammen", "Give me a summary of the file"])
async def test_a_summary_of_a_table_says_what_each_column_has(goal: str, scripted_prompts, sql) -> None:
    result = await answer_data(goal, scripted_prompts(), sql(SALES))
    assert result.evidence is not None
    assert result.evidence.columns == ("column", "type", "lowest", "highest", "mean", "empty_percent")
    assert "amount | " in result.output
    assert "20.00 | 300.25 | 156.9167" in result.output


@pytest.mark.parametrize("goal", ["Summarize the amount per region", "Summarize the three best sales by id"])
async def test_a_summary_of_groups_is_a_question(goal: str, scripted_prompts, sql) -> None:
    query = "SELECT region, sum(amount) AS total FROM sales GROUP BY region"
    result = await answer_data(goal, scripted_prompts(query, query), sql(SALES))
    assert result.evidence is not None
    assert result.evidence.columns == ("region", "total")


@pytest.mark.parametrize("goal", ["Translate sales.csv into German", "Rewrite the file in a friendlier tone"])
async def test_a_table_is_not_translated(goal: str, scripted_prompts, sql) -> None:
    with pytest.raises(OctoError, match="not translated or reworded") as caught:
        await answer_data(goal, scripted_prompts(), sql(SALES))
    assert caught.value.code == "step_stopped"


async def test_a_changed_cell_changes_the_answer(scripted_prompts, sql) -> None:
    ask = scripted_prompts(QUERY, QUERY)
    result = await answer_data(GOAL, ask, sql(SALES.replace("20.0", "120.0")))
    assert result.output.startswith("n: 3")


async def test_a_failed_query_is_mended_with_its_error(scripted_prompts, sql) -> None:
    ask = scripted_prompts("SELECT count(*), sum(amnt) FROM sales WHERE amount > 100", QUERY, QUERY)
    result = await answer_data(GOAL, ask, sql(SALES))
    assert "n: 2" in result.output
    assert "amnt" in ask.asked[1][-1].content


async def test_an_empty_query_is_mended_with_the_values_there_are(scripted_prompts, sql) -> None:
    ask = scripted_prompts(
        "SELECT sum(amount) AS s FROM sales WHERE region = 'north'",
        "SELECT sum(amount) AS s FROM sales WHERE region = 'North'",
        "SELECT sum(amount) AS s FROM sales WHERE region = 'North'",
    )
    result = await answer_data("What is the total for the north?", ask, sql(SALES))
    assert result.output.startswith("s: 450.75")
    assert "never is 'north'; it is one of 'North', 'South'" in ask.asked[1][-1].content


async def test_an_empty_result_may_be_the_answer(scripted_prompts, sql) -> None:
    query = "SELECT id FROM sales WHERE region = 'South' AND amount > 100"
    result = await answer_data("Which ids of the South are above 100?", scripted_prompts(query, query), sql(SALES))
    assert result.output.startswith("No rows match.")
    assert result.evidence is not None
    assert result.evidence.rows == 0


async def test_a_third_draft_decides(scripted_prompts, sql) -> None:
    other = QUERY.replace("> 100", ">= 150.5 + 100 - 100.0 + 1")
    ask = scripted_prompts(QUERY, other, QUERY)
    assert (await answer_data(GOAL, ask, sql(SALES))).output.startswith("n: 2")


async def test_no_majority_is_a_failure_with_all_results(scripted_prompts, sql) -> None:
    drafts = [f"SELECT count(*) + {n}, sum(amount) FROM sales WHERE amount > 100" for n in range(3)]
    with pytest.raises(OctoError, match="do not agree") as caught:
        await answer_data(GOAL, scripted_prompts(*drafts), sql(SALES))
    assert caught.value.code == "not_accepted"
    assert all(draft in caught.value.detail for draft in drafts)


async def test_drafts_that_agree_on_something_else_are_a_failure(scripted_prompts, sql) -> None:
    drafts = ["SELECT count(*) FROM sales WHERE amount > 100"] * 9
    with pytest.raises(OctoError, match=r"needs SUM\(…\) as well"):
        await answer_data(GOAL, scripted_prompts(*drafts), sql(SALES))


async def test_one_query_alone_is_not_borne_out(scripted_prompts, sql) -> None:
    with pytest.raises(OctoError, match="no other bears it out"):
        await answer_data(GOAL, scripted_prompts(QUERY, *["I do not know"] * 6), sql(SALES))


async def test_no_query_at_all_is_a_failure(scripted_prompts, sql) -> None:
    with pytest.raises(OctoError, match="No query could be run"):
        await answer_data(GOAL, scripted_prompts(*["I do not know"] * 9), sql(SALES))


async def test_files_that_are_no_tables(scripted_prompts) -> None:
    async def refuse(query: str) -> RunResult:
        return RunResult(1, "", "sales.csv: the file is empty")

    with pytest.raises(OctoError, match="the file is empty") as caught:
        await answer_data(GOAL, scripted_prompts(), refuse)
    assert caught.value.code == "file_invalid"


async def test_notes_and_reasons_reach_the_model(scripted_prompts, sql) -> None:
    ask = scripted_prompts(QUERY, QUERY)
    await answer_data(GOAL, ask, sql(SALES), notes="north is cold", reasons=("wrong column",))
    assert "north is cold" in ask.asked[0][1].content
    assert "wrong column" in ask.asked[0][1].content


async def test_tables_that_belong_together_are_said_so(sql) -> None:
    tables = await describe_tables(
        sql(
            "CREATE TABLE people AS SELECT 1 AS pid, 'A' AS \"Full Name\"",
            "CREATE TABLE pay AS SELECT 1 AS pid, 2.5 AS sum",
        )
    )
    text = format_schema(tables)
    assert "\"Full Name\" VARCHAR: 'A'" in text
    assert "Rows belong together where pay.pid = people.pid" in text
    hint = missing_column_hint('Binder Error: Referenced column "Full Name" not found in FROM clause!', tables)
    assert hint == " Column full name is in table people; join it on pay.pid = people.pid."
    assert missing_column_hint("Syntax error", tables) == ""


async def test_reserved_names_are_shown_in_quotes(sql) -> None:
    tables = await describe_tables(sql('CREATE TABLE visits AS SELECT 1 AS "user", 2 AS "order", 3 AS page'))
    text = format_schema(tables)
    assert '"user" INTEGER' in text
    assert '"order" INTEGER' in text
    assert "  page INTEGER" in text


async def test_names_with_spaces_are_quoted(scripted_prompts, sql) -> None:
    table = 'CREATE TABLE stock AS SELECT \'Lamp\' AS "Item Name", 3 AS "Unit Price", 1 AS id'
    ask = scripted_prompts(
        'SELECT item_name, MAX(unit_price) AS "unit_price" FROM stock GROUP BY Item_Name', "SELECT 'Lamp', 3 FROM stock"
    )
    result = await answer_data("Which item costs most?", ask, sql(table))
    assert 'SELECT "Item Name", MAX("Unit Price") AS "unit_price" FROM stock GROUP BY "Item Name"' in result.output


@pytest.mark.parametrize(
    ("answer", "query"),
    [
        ("SELECT 1", "SELECT 1"),
        ("```sql\nSELECT 1;\n```", "SELECT 1"),
        ("```\nselect 1\n```", "select 1"),
        ("```sql\nSELECT 1", "SELECT 1"),
        ("Here you are:\n\nSELECT ';' AS x; SELECT 2", "SELECT ';' AS x"),
        ("WITH a AS (SELECT 1) SELECT * FROM a", "WITH a AS (SELECT 1) SELECT * FROM a"),
        ("SELECT 1\n\nThis query gives one.", "SELECT 1"),
        ("SELECT 1 -- one\nFROM t", "SELECT 1 \nFROM t"),
        ("no query", None),
        ("", None),
    ],
)
def test_takes_the_query_out_of_an_answer(answer: str, query: str | None) -> None:
    assert extract_query(answer) == query


@given(st.text(max_size=200))
def test_any_answer_is_read(answer: str) -> None:
    query = extract_query(answer)
    assert query is None or query.strip() == query


def _table(*rows: tuple[object, ...]) -> ResultSet:
    width = len(rows[0]) if rows else 1
    return ResultSet(tuple(f"c{n}" for n in range(width)), rows, len(rows))  # type: ignore[arg-type]


def doubts(*arguments) -> list[str]:
    return [doubt.text for doubt in find_doubts(*arguments)]


def test_doubts_are_general_rules(sql) -> None:
    assert doubts("What is it?", "SELECT 1", _table(), ()) == ["The query gives no rows. Check its conditions."]
    assert "only NULL" in doubts("What is it?", "SELECT 1", _table((None,)), ())[0]
    assert "only 0" in doubts("How many?", "SELECT count(*)", _table((0,)), ())[0]
    assert "names 1500" in doubts("above 1,500?", "SELECT x WHERE y > 15", _table((3,)), ())[0]
    assert "needs COUNT(*)" in doubts("How many are there?", "SELECT id FROM t", _table((3,)), ())[0]
    found = doubts("How many after 2018?", "SELECT count(*) FROM t WHERE d > '2018-01-01'", _table((3,)), ())
    assert found == ["After 2018 begins with 2019-01-01."]
    assert "GROUP BY" in doubts("The best score per subject", "SELECT max(score) FROM t", _table((3,)), ())[0]
    assert "needs SUM" in doubts("How many, and their total?", "SELECT count(*) FROM t", _table((3,)), ())[0]
    assert doubts("What is the average number of pages?", "SELECT avg(pages) FROM t", _table((3.5,)), ()) == []
    assert doubts("How many above 5?", "SELECT count(*) FROM t WHERE x > 5", _table((3,)), ()) == []


def test_what_is_wanted_is_named_when_it_is_more_than_one_thing() -> None:
    assert required_functions_hint(GOAL, ()) == "The query needs COUNT(*) and SUM(…)."
    assert required_functions_hint("How many are there?", ()) == ""
    assert required_functions_hint("Orders per month", ()) == "The query needs DATE_TRUNC(…) and GROUP BY."
    assert required_functions_hint("the mean score for each subject", ()) == "The query needs AVG(…) and GROUP BY."


async def test_asked_which_one_needs_a_name(sql) -> None:
    tables = await describe_tables(sql(SALES))
    assert "no name" in doubts("Which region sold most?", "SELECT max(amount) FROM sales", _table((3,)), tables)[0]
    assert doubts("Which region sold most?", "SELECT region FROM sales", _table(("North",)), tables) == []
    assert find_unknown_values("SELECT 1 FROM sales WHERE region IN ('North', 'West')", tables)[0].text.startswith(
        "Column region never is 'West'"
    )
    assert find_unknown_values("SELECT 1 FROM sales WHERE region = 'South'", tables) == []


def test_results_agree_whatever_order_and_types() -> None:
    assert results_agree(_table(("a", 1), ("b", 2.0)), _table((2, "b"), (1.0, "a")))
    assert results_agree(_table(("a",)), _table(("a", 10.5)))
    assert not results_agree(_table(("a",)), _table(("b", 10.5)))
    assert not results_agree(_table(("a",)), _table(("a",), ("b",)))
    assert results_agree(_table(), _table())
    assert not results_agree(_table(), _table(("a",)))
    months = [(1, 10.5), (2, 20.25), (3, 30.125)]
    assert results_agree(_table(*months), _table(*((f"2024-0{month}-01", value) for month, value in months)))


cells = st.one_of(st.integers(-99, 99), st.text(max_size=3), st.none())


@given(st.lists(st.tuples(cells, cells), min_size=1, max_size=6), st.randoms())
def test_agreement_does_not_see_the_order_of_rows(rows: list[tuple[object, object]], random) -> None:
    mixed = list(rows)
    random.shuffle(mixed)
    assert results_agree(_table(*rows), _table(*mixed))


def test_long_results_are_cut_and_say_so() -> None:
    rows = tuple((n, f"x{n}") for n in range(60))
    text = render_answer(ResultSet(("n", "x"), rows, 70), "SELECT 1")
    assert "49 | x49" in text
    assert "50 | x50" not in text
    assert "… 20 more rows" in text


async def test_the_answer_says_what_was_assumed(scripted_prompts) -> None:
    undecided = {"text": "amount: undecided", "table": "sales", "column": "amount", "decided": False}
    found = {"columns": ["s"], "rows": [[3734]], "row_count": 1, "assumptions": [undecided]}

    async def run_sql(query: str) -> RunResult:
        if query == "--describe":
            table = {"table": "sales", "row_count": 2, "columns": [{"name": "amount", "type": "BIGINT"}]}
            return RunResult(0, json.dumps({"tables": [table]}), "")
        return RunResult(0, json.dumps(found), "")

    query = "SELECT sum(amount) AS s FROM sales"
    result = await answer_data("What is the total amount?", scripted_prompts(query, query), run_sql)
    assert result.output.startswith(
        "s: 3734\n\nNot decided by the file, so the answer may be wrong:\n- amount: undecided\n\nQuery:"
    )
    assert result.evidence is not None
    assert result.evidence.assumptions == (Assumption("amount: undecided", "sales", "amount", decided=False),)


@pytest.mark.parametrize(
    ("goal", "is_count"),
    [
        ("How many rows?", True),
        ("How many rows are there in the table?", True),
        ("how many records does sales.csv have?", True),
        ("What is the number of rows in this file?", True),
        ("Wie viele Zeilen hat die Tabelle?", True),
        ("How many rows have amount > 100?", False),
        ("How many rows are there per region?", False),
        ("How many regions are there?", False),
    ],
)
async def test_a_question_for_the_rows_alone_asks_no_model(sql, goal: str, is_count: bool) -> None:
    tables = await describe_tables(sql(SALES))
    assert row_count_query(goal, tables) == ('SELECT count(*) AS row_count FROM "sales"' if is_count else None)
    assert row_count_query(goal, (*tables, *tables)) is None


async def test_the_rows_of_a_header_alone_are_none(scripted_prompts, sql) -> None:
    empty = "CREATE TABLE people (name VARCHAR, age BIGINT)"
    result = await answer_data("How many rows?", scripted_prompts(), sql(empty))
    assert result.output.startswith("row_count: 0")
    query = "SELECT sum(age) AS s FROM people"
    result = await answer_data("What is the total age of everybody?", scripted_prompts(query, query), sql(empty))
    assert result.output.startswith("s: NULL")


async def test_a_query_that_failed_is_not_run_or_mended_again(scripted_prompts, sql) -> None:
    runs: list[str] = []
    run_sql = sql(SALES)

    async def counted(query: str) -> RunResult:
        runs.append(query)
        return await run_sql(query)

    broken = "SELECT count(*), sum(amnt) FROM sales WHERE amount > 100"
    ask = scripted_prompts(broken, f"{broken};", broken)
    with pytest.raises(OctoError, match="repeats a query that failed"):
        await answer_data(GOAL, ask, counted)
    assert runs == ["--describe", broken]
    assert len(ask.asked) == 3
