"""A query that says something else than its question is rejected, and one that says less is uncertain."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octollm.contracts.operations import ResultSet
from octollm.errors import OctoError
from octollm.services.arms.coder.data import answer_data
from octollm.services.arms.coder.query_parts import parse_query
from octollm.services.arms.coder.question_check import find_contradictions
from octollm.services.arms.coder.table_schema import TableColumn, TableSchema

RACES = TableSchema(
    "races",
    (
        TableColumn("runner", "VARCHAR", ("Ada", "Bea", "Cyd")),
        TableColumn("club", "VARCHAR", ("Harriers", "River Road", "WITHDRAWN")),
        TableColumn("finish_minutes", "DOUBLE"),
        TableColumn("top_speed", "DOUBLE"),
        TableColumn("age", "BIGINT"),
        TableColumn("born", "DATE"),
        TableColumn("entry fee", "DOUBLE"),
        TableColumn("bag_weight", "DOUBLE"),
        TableColumn("started", "TIMESTAMP"),
        TableColumn("quantity", "BIGINT"),
    ),
    row_count=9,
)
AGE_OF_ADA = "SELECT age FROM races WHERE runner = 'Ada'"
RANKED = "SELECT runner, rank() OVER (PARTITION BY club ORDER BY finish_minutes DESC) AS r FROM races"
TEN_HIGHEST = "SELECT top_speed FROM races ORDER BY top_speed DESC LIMIT 10"
ONE = ResultSet(("x",), ((5,),), 1)


def fatal(goal: str, query: str, table: ResultSet = ONE) -> list[str]:
    return [issue.text for issue in find_contradictions(goal, query, table, (RACES,)) if issue.is_fatal]


def query(text: str) -> str:
    """Return the query of ``what is selected | what follows the table``."""
    selected, _, rest = text.partition(" | ")
    return text if text.startswith("SELECT") else f"SELECT {selected} FROM races {rest}".strip()


def uncertain(goal: str, query: str, table: ResultSet = ONE) -> list[str]:
    return [issue.text for issue in find_contradictions(goal, query, table, (RACES,)) if not issue.is_fatal]


@pytest.mark.unit
@pytest.mark.parametrize(
    ("goal", "right", "wrong"),
    [
        ("How long did the slowest run take?", "max(finish_minutes)", "min(finish_minutes)"),
        ("How fast was the slowest runner?", "min(top_speed)", "max(top_speed)"),
        (
            "Who was the fastest?",
            "runner | ORDER BY finish_minutes LIMIT 1",
            "runner | ORDER BY finish_minutes DESC LIMIT 1",
        ),
        (
            "Who was the fastest?",
            "arg_max(runner, top_speed)",
            "arg_min(runner, top_speed)",
        ),
        ("How old is the oldest runner?", "max(age)", "min(age)"),
        ("When was the oldest runner born?", "min(born)", "max(born)"),
        ("When was the youngest runner born?", "max(born)", "min(born)"),
        ("How old is the oldest runner?", "max(age)", "age | ORDER BY top_speed DESC LIMIT 1"),
        ("What is the cheapest one?", 'min("entry fee")', 'max("entry fee")'),
        ("What is the most expensive one?", 'max("entry fee")', "max(bag_weight)"),
        ("Which is the heaviest?", "runner | ORDER BY bag_weight DESC LIMIT 1", "runner | ORDER BY age DESC LIMIT 1"),
        ("When did the last one leave?", "max(started)", "min(started)"),
        ("When did the earliest one leave?", "min(started)", "max(started)"),
        (
            "Which club has the fewest people?",
            "club, count(*) AS n | GROUP BY club ORDER BY n LIMIT 1",
            "club, count(*) AS n | GROUP BY club ORDER BY n DESC LIMIT 1",
        ),
        (
            "Which club has the most people?",
            "club | GROUP BY club ORDER BY count(*) DESC LIMIT 1",
            "club | GROUP BY club ORDER BY count(*) LIMIT 1",
        ),
        ("Wie lange brauchte der langsamste Lauf?", "max(finish_minutes)", "min(finish_minutes)"),
        ("Wie alt ist die jüngste Person?", "min(age)", "max(age)"),
        ("Was kostet der günstigste Start?", 'min("entry fee")', 'max("entry fee")'),
        ("Combien coûte la place la moins chère ?", 'min("entry fee")', 'max("entry fee")'),
        ("Quel âge a la personne la plus âgée ?", "max(age)", "min(age)"),
        ("¿Cuál fue la carrera más lenta?", "max(finish_minutes)", "min(finish_minutes)"),
        ("¿Cuánto cuesta la entrada más barata?", 'min("entry fee")', 'max("entry fee")'),
        ("How much does the cheapest entry cost?", 'min("entry fee")', '"entry fee"'),
        ("How many are older than Ada?", f"count(*) | WHERE age > ({AGE_OF_ADA})", "count(*) | WHERE age > 30"),
        ("How many paid more than 90?", 'count(*) | WHERE "entry fee" > 90', 'count(*) | WHERE "entry fee" < 90'),
        ("How many are at least 18?", "count(*) | WHERE age >= 18", "count(*) | WHERE age > 18"),
        ("How many are below zero?", "count(*) | WHERE top_speed < 0", "count(*) | WHERE top_speed > 0"),
        ("Wie viele sind über 1.200?", "count(*) | WHERE 1200 < top_speed", "count(*) | WHERE 1200 > top_speed"),
        ("Combien ont plus de 40 ans ?", "count(*) | WHERE age > 40", "count(*) | WHERE age <= 40"),
        ("¿Cuántos tienen menos de 20 años?", "count(*) | WHERE age < 20", "count(*) | WHERE age > 20"),
        ("How many of the Harriers ran?", "count(*) | WHERE club = 'Harriers'", "count(*)"),
        ("How many of River Road?", "count(*) | WHERE club ILIKE '%river road%'", "count(*) | WHERE club = 'Harriers'"),
        ("How many were Harriers?", "count(*) | WHERE club = 'Harriers'", "count(*) | WHERE club <> 'Harriers'"),
    ],
)  # fmt: skip
def test_a_query_that_says_the_opposite_is_rejected(goal: str, right: str, wrong: str) -> None:
    assert fatal(goal, query(right)) == []
    assert fatal(goal, query(wrong)) != []


@pytest.mark.unit
@pytest.mark.parametrize(
    ("goal", "text"),
    [
        ("How many took at most 90 minutes?", "count(*) | WHERE finish_minutes <= 90"),
        ("What were the slowest and the fastest times?", "min(finish_minutes), max(finish_minutes)"),
        ("List the runners from the cheapest to the most expensive", 'runner | ORDER BY "entry fee"'),
        ("What is the first name of Ada's coach?", "runner | WHERE runner = 'Ada'"),
        ("How many ran in the last week?", "count(*) | WHERE started >= DATE '2024-01-01'"),
        ("How many did not run for the Harriers?", "count(*) | WHERE club <> 'Harriers'"),
        ("What is the best result?", "min(finish_minutes)"),
        ("Which race was closest to the largest loss?", "runner | ORDER BY abs(top_speed) LIMIT 1"),
        ("How many, not more than 90 minutes?", "count(*) | WHERE NOT finish_minutes > 90"),
        ("Who was the slowest?", "runner | WHERE finish_minutes >= ALL (SELECT finish_minutes FROM races)"),
        ("Which club is the most common?", "mode(club)"),
        ("Who is the slowest of each club?", f"SELECT runner FROM ({RANKED}) WHERE r = 1"),
        ("What is the lowest of the ten highest speeds?", f"SELECT min(top_speed) FROM ({TEN_HIGHEST})"),
        ("What is the sum per club of the Harriers and River Road?", "club, sum(quantity) | GROUP BY club"),
    ],
)  # fmt: skip
def test_a_query_that_may_be_right_is_let_through(goal: str, text: str) -> None:
    rows = ResultSet(("club", "n"), (("Harriers", 1), ("River Road", 2)), 2)
    assert fatal(goal, query(text), rows if "GROUP BY" in text else ONE) == []


@pytest.mark.unit
def test_what_the_query_leaves_out_makes_the_answer_uncertain() -> None:
    assert (
        "column finish_minutes"
        in uncertain("What finish minutes had Ada?", "SELECT age FROM races WHERE runner = 'Ada'")[0]
    )
    assert uncertain("What finish_minutes had Ada?", "SELECT finish_minutes FROM races WHERE runner = 'Ada'") == []
    assert "may mean 'Harriers'" in uncertain("How many are in a harrier club?", "SELECT count(*) FROM races")[0]
    assert uncertain("How many clubs has a runner?", "SELECT count(DISTINCT club) FROM races") == []
    assert "column runner" in uncertain("Which runner was first?", "SELECT min(started) FROM races")[0]
    assert "quantity" in uncertain("How many shirts are there?", "SELECT count(*) FROM races")[0]
    assert uncertain("How many shirts are there?", "SELECT sum(quantity) FROM races") == []
    assert uncertain("How many runners are there?", "SELECT count(*) FROM races") == []


@pytest.mark.unit
def test_the_parts_of_a_query() -> None:
    parts = parse_query(
        "SELECT \"a b\", sum(x) AS s FROM t WHERE c <> 'it''s' AND -3 <= d GROUP BY 1 ORDER BY s DESC LIMIT 2"
    )
    assert [(each.direction, each.names) for each in parts.extremes] == [("max", frozenset({"sum", "x"}))]
    assert [(each.name, each.sign) for each in parts.comparisons] == [("c", "<>"), ("d", ">=")]
    assert parts.texts == ("it's",)
    assert "a b" in parts.names
    assert parse_query("SELECT x FROM t ORDER BY -x LIMIT 1").extremes[0].direction is None
    assert parse_query("SELECT x FROM t ORDER BY x").extremes == ()
    assert parse_query("SELECT * FROM t").selects_all
    assert not parse_query("SELECT count(*) FROM t").selects_all


@pytest.mark.unit
@given(st.text(max_size=120), st.text(alphabet="selctmaxordby()'\"-*,. <>=1", max_size=120))
def test_any_question_and_query_are_read(goal: str, query: str) -> None:
    for issue in find_contradictions(goal, query, ONE, (RACES,)):
        assert issue.text


BOATS = (
    "CREATE TABLE boats AS SELECT * FROM "
    "(VALUES ('Kea', 12.5, 3), ('Tui', 80.0, 5), ('Ruru', 33.0, 1)) t(boat, minutes, crew)"
)
SLOWEST = "How long did the slowest boat need?"


async def test_drafts_that_agree_on_the_opposite_are_no_answer(scripted_prompts, sql) -> None:
    with pytest.raises(OctoError, match="slowest, which is the highest minutes") as caught:
        await answer_data(
            "How long did the slowest boat need?", scripted_prompts(*["SELECT min(minutes) FROM boats"] * 9), sql(BOATS)
        )
    assert caught.value.code == "not_accepted"
    assert caught.value.detail.startswith("Not certain")


async def test_the_model_is_told_what_contradicts_the_question(scripted_prompts, sql) -> None:
    ask = scripted_prompts("SELECT min(minutes) FROM boats", *["SELECT max(minutes) AS m FROM boats"] * 2)
    result = await answer_data(SLOWEST, ask, sql(BOATS))
    assert result.output.startswith("m: 80\n")
    assert "slowest, which is the highest minutes" in ask.asked[1][-1].content
    assert result.evidence is not None
    assert [(check.name, check.passed) for check in result.evidence.checks] == [("agreement", True), ("question", True)]


async def test_an_uncertain_answer_says_so(scripted_prompts, sql) -> None:
    query = "SELECT boat FROM boats WHERE minutes > 20"
    result = await answer_data(
        "Which boat had a crew above 2 and minutes above 20?", scripted_prompts(*[query] * 9), sql(BOATS)
    )
    note = (
        "not certain, check it: The question names 2, but the query does not. The question names the column crew, but"
    )
    assert f"\n\nNote: {note}" in result.output
    assert result.evidence is not None
    assert result.evidence.notes[0].startswith(note)
    assert any(check.name == "question" and not check.passed for check in result.evidence.checks)


async def test_a_value_that_no_row_has_is_not_found(scripted_prompts, sql) -> None:
    query = "SELECT crew FROM boats WHERE boat = 'Moa'"
    result = await answer_data("How many people are in the crew of Moa?", scripted_prompts(*[query] * 9), sql(BOATS))
    assert result.output.startswith("Not found: no row has “Moa”. Column boat never is 'Moa'; it is one of 'Kea'")
    assert result.evidence is not None
    assert not result.evidence.found
    assert result.evidence.rows == 0


async def test_a_value_in_another_notation_is_not_said_to_be_absent(scripted_prompts, sql) -> None:
    query = "SELECT crew FROM boats WHERE boat = 'kea'"
    with pytest.raises(OctoError, match="never is 'kea'"):
        await answer_data("What is the crew of kea?", scripted_prompts(*[query] * 9), sql(BOATS))
