"""The corpus of answers is the frozen one, and every file of it is read as a person reads it, told or refused."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from answer_corpus import corpus
from answer_corpus.model import Case, Table, absent, said, scalar

from octollm.contracts.api import StepView, TaskView
from octollm.contracts.task import Assumption, Evidence

CASES = {case.id: case for case in corpus.build()}


@pytest.fixture(autouse=True)
def bench_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    yield
    for name in [name for name in sys.modules if name == "answers" or name.startswith("answers.")]:
        del sys.modules[name]


def test_the_corpus_is_the_frozen_one() -> None:
    frozen = corpus.load_frozen()
    assert corpus.summarise() == {name: value for name, value in frozen.items() if name != "frozen"}


@pytest.mark.parametrize("identity", CASES)
def test_a_file_is_read_as_a_person_reads_it(identity: str) -> None:
    from answers import reading  # noqa: PLC0415  found on the path that the fixture sets

    case = CASES[identity]
    outcome = reading.read_case(case)
    expected = {"told", "refused"} if case.refusals else {"told"} if case.is_open else {"right", "told"}
    assert outcome.verdict in expected, outcome.detail


def test_a_wrong_reading_is_found_and_a_stated_one_is_told() -> None:
    from answers import reading  # noqa: PLC0415  as above

    data = b"place,guests\nA,1.234\nB,2.500\n"
    wrong = Case("x", "csv", {"t.csv": b"a,b\nx,1\ny,2\n"}, {"t": Table(("a", "b"), [("x", 1), ("y", 3)])})
    told = Case("x", "csv", {"t.csv": data}, {"t": Table(("place", "guests"), [("A", 1234), ("B", 2500)])})
    assert reading.read_case(wrong).verdict == "wrong"
    assert reading.read_case(told).verdict == "told"


def view(output: str, evidence: Evidence) -> TaskView:
    step = StepView("s1", "", "coder", "completed", 1, evidence=evidence)
    return TaskView("task-1", "completed", "", 100, 1, "", "", output=output, steps=(step,))


DATA = Evidence(kind="data", query="SELECT 1")
OPEN = Evidence(kind="data", query="SELECT 1", assumptions=(Assumption("undecided", "t", "a", decided=False),))
TEXT = Evidence(kind="documents")
NOTHING = Evidence(kind="documents", found=False)
TABLE = "city | total\n--- | ---\nA | 3.5\nB | 4\n\nQuery:\n```sql\nx\n```"


@pytest.mark.parametrize(
    ("question", "output", "evidence", "verdict"),
    [
        (scalar("?", 12.5), "total: 12.5\n\nQuery: x", DATA, "right"),
        (scalar("?", 12.5), "total: 12.6", DATA, "wrong"),
        (scalar("?", 12.5), "total: 12.6", OPEN, "told"),
        (scalar("?", 3.5), TABLE, DATA, "wrong"),
        (said("?", "17"), "It costs 17 euros.\n\n[a.txt:1]", TEXT, "right"),
        (said("?", "17"), "It costs 171 euros.", TEXT, "wrong"),
        (said("?", "543"), "每月租金为543元。", TEXT, "right"),
        (said("?", "768"), "It has 768Mi of memory.", TEXT, "right"),
        (said("?", "17"), "It is type A17.", TEXT, "wrong"),
        (said("?", "1700"), "It costs 1,700 euros.", TEXT, "right"),
        (said("?", "17", never=("999",)), "It costs 17 or 999 euros.", TEXT, "wrong"),
        (said("?", "17"), "Not found: nothing says it.", NOTHING, "not answered"),
        (absent("?"), "Not found: nothing says it.", NOTHING, "right"),
        (absent("?"), "It is blue.", TEXT, "wrong"),
    ],
)
def test_answers_are_judged(question: Any, output: str, evidence: Evidence, verdict: str) -> None:
    from answers import asking  # noqa: PLC0415  as above

    case = Case("x", "document", {})
    assert asking.judge_answer(case, question, view(output, evidence))[0] == verdict


def test_rows_of_an_answer_are_compared_as_a_set() -> None:
    from answers import asking  # noqa: PLC0415  as above

    found = asking.parse_result(TABLE)
    assert asking.matches_rows(found, (("B", 4), ("A", 3.5)))
    assert not asking.matches_rows(found, (("B", 4),))
    assert not asking.matches_rows(found, (("B", 3.5), ("A", 4)))
    assert asking.same_value("2024-03-05", date(2024, 3, 5))


def test_a_sample_has_each_kind() -> None:
    from answers import asking  # noqa: PLC0415  as above

    asked = asking.list_questions(tuple(CASES.values()))
    sample = asking.choose_sample(asked, 40)
    assert {each.kind for each in sample} == {each.kind for each in asked}
    assert 35 <= len(sample) <= 50
    assert [each.id for each in sample] == [each.id for each in asking.choose_sample(asked, 40)]
