from __future__ import annotations

import json

import pytest

from octollm.contracts.operations import AcceptRequest, AcceptResult
from octollm.contracts.output_schema import format_output_criterion
from octollm.contracts.task import Artifact, Check, Citation, Evidence, ExecuteResult, FileRef
from octollm.errors import OctoError
from octollm.services.arms.judge.acceptance import WHOLE_RESULT, accept, find_test_weakness
from octollm.services.arms.judge.criteria import unchecked

CODE = "def double(n):\n    return n * 2\n"
TESTS = """import unittest
from double import double

class DoubleTest(unittest.TestCase):
    def test_1(self):
        self.assertEqual(double(2), 4)
    def test_2(self):
        self.assertEqual(double(3), {expected})
"""
HANDBOOK = "# Leave\n\nStaff have 27 days of leave a year.\nSick leave is paid for eight weeks.\n"
SALES = "id,amount\n1,150\n2,20\n3,300\n"
QUERY = "SELECT count(*) AS n, sum(amount) AS total FROM sales WHERE amount > 100"


def _read(texts: dict[str, str]):
    async def read_text(file: FileRef) -> str:
        return texts[file.digest or ""]

    return read_text


def _code(code: str, tests: str) -> tuple[AcceptRequest, dict[str, str]]:
    artifacts = (Artifact("double.py", "d1", 1, "text/x-python"), Artifact("test_double.py", "d2", 1, "text/x-python"))
    result = ExecuteResult("done", artifacts, evidence=Evidence("code"))
    return AcceptRequest("Write double(n)", result), {"d1": code, "d2": tests}


async def test_code_is_validated_anew(run) -> None:
    request, texts = _code(CODE, TESTS.format(expected=6))
    assert await accept(request, run, None, _read(texts)) == AcceptResult(True, (), 1.0, (Check("code", True),))


async def test_code_that_fails_its_tests_is_refused_whatever_the_arm_says(run) -> None:
    request, texts = _code(CODE, TESTS.format(expected=7))
    verdict = await accept(request, run, None, _read(texts))
    assert not verdict.accepted
    assert verdict.reasons == ("self.assertEqual(double(3), 7) failed: expected 7, got 6",)


async def test_tests_that_prove_nothing_are_refused(run) -> None:
    empty = (
        "import unittest\nfrom double import double\n"
        "class T(unittest.TestCase):\n    def test(self):\n        self.assertTrue(True)\n"
    )
    request, texts = _code(CODE, empty)
    verdict = await accept(request, run, None, _read(texts))
    assert not verdict.accepted
    assert "less than 2 assertions" in verdict.reasons[0]


async def test_code_without_files_is_refused(run) -> None:
    result = ExecuteResult("done", evidence=Evidence("code"))
    assert not (await accept(AcceptRequest("Write double(n)", result), run, None, _read({}))).accepted
    only = ExecuteResult("done", (Artifact("double.py", "d1", 1, "x"),), evidence=Evidence("code"))
    verdict = await accept(AcceptRequest("Write double(n)", only), run, None, _read({"d1": CODE}))
    assert verdict.reasons == ("There is no test file among the artifacts.",)


@pytest.mark.parametrize(
    ("tests", "weak"),
    [
        ("from box import Box\ndef test():\n    b = Box()\n    assert b.add(1) == 1\n    assert b.size == 1\n", False),
        ("import box\ndef test():\n    assert box.f(1) == 1\n    assert box.f(2) == 2\n", False),
        ("from box import Box\ndef test():\n    assert 1 == 1\n    assert 2 == 2\n", True),
        ("from box import f\ndef test():\n    assert f(1) == 1\n    assert f(1) == 1\n", True),
        ("def f(n):\n    return n\ndef test():\n    assert f(1) == 1\n    assert f(2) == 2\n", True),
        ("from box import f\ndef f(n):\n    return n\ndef test():\n    assert f(1) == 1\n    assert f(2) == 2\n", True),
        ("def test(:\n", True),
    ],
)
def test_weak_tests(tests: str, weak: bool) -> None:
    assert bool(find_test_weakness(tests, "box")) == weak


def _documents(output: str, *citations: Citation, found: bool = True) -> AcceptRequest:
    evidence = Evidence("documents", citations=citations, found=found)
    files = (FileRef("handbook.md", digest="h"),)
    return AcceptRequest("How many days of leave do I have?", ExecuteResult(output, evidence=evidence), files=files)


GOOD = Citation("handbook.md", 3, 3, "Staff have 27 days of leave a year.")


async def test_a_citation_that_carries_the_answer(run) -> None:
    request = _documents("Staff have 27 days.\n\n[handbook.md:3]", GOOD)
    assert (await accept(request, run, None, _read({"h": HANDBOOK}))).accepted


@pytest.mark.parametrize(
    ("output", "citation", "reason"),
    [
        ("Staff have 27 days.", Citation("handbook.md", 4, 4, GOOD.text), "does not contain the cited text"),
        ("Staff have 27 days.", Citation("handbook.md", 3, 9, GOOD.text), "has 5 lines"),
        ("Staff have 27 days.", Citation("other.md", 3, 3, GOOD.text), "was not given that file"),
        ("Staff have 30 days.", GOOD, "has 30, the cited lines do not"),
        ("The canteen opens at noon.", GOOD, "do not support the answer"),
    ],
)
async def test_citations_that_do_not_hold(run, output: str, citation: Citation, reason: str) -> None:
    verdict = await accept(_documents(output, citation), run, None, _read({"h": HANDBOOK}))
    assert not verdict.accepted
    assert any(reason in each for each in verdict.reasons)
    assert verdict.score < 1


async def test_an_answer_without_citation_is_refused(run) -> None:
    assert not (await accept(_documents("27 days"), run, None, _read({"h": HANDBOOK}))).accepted


async def test_not_found_is_an_honest_answer(run) -> None:
    said = _documents("Not found in handbook.md: the passages found do not say it.", found=False)
    assert (await accept(said, run, None, _read({"h": HANDBOOK}))).accepted
    unsaid = _documents("27 days", found=False)
    assert not (await accept(unsaid, run, None, _read({"h": HANDBOOK}))).accepted


def _data(output: str, query: str | None = QUERY, rows: int = 1) -> AcceptRequest:
    evidence = Evidence("data", query=query, columns=("n", "total"), rows=rows)
    files = (FileRef("sales.csv", text=SALES),)
    return AcceptRequest("How many above 100?", ExecuteResult(output, evidence=evidence), files=files)


SHOWN = f"n: 2\ntotal: 450\n\nQuery:\n```sql\n{QUERY}\n```"


async def test_the_query_is_run_again(run) -> None:
    assert await accept(_data(SHOWN), run, None, _read({})) == AcceptResult(True, (), 1.0, (Check("data", True),))


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (_data(SHOWN.replace("450", "460")), "does not show what the query gives: 450"),
        (_data("n: 2\ntotal: 450"), "does not show its query"),
        (_data(SHOWN, rows=2), "counts 2 rows"),
        (_data(SHOWN, query=None), "names no query"),
        (_data("n: 2\n\nSELECT 2 AS n", query="SELECT 2 AS n"), "reads no table"),
        (_data("n: 2 SELECT x FROM sales", query="SELECT x FROM sales"), "fails when it is run again"),
        (_data("SELECT id FROM sales WHERE id > 9", query="SELECT id FROM sales WHERE id > 9"), "gives no rows, but"),
    ],
)
async def test_data_that_does_not_hold(run, request_: AcceptRequest, reason: str) -> None:
    verdict = await accept(request_, run, None, _read({}))
    assert not verdict.accepted
    assert any(reason in each for each in verdict.reasons)


async def test_an_answer_says_what_its_file_does_not_decide(run) -> None:
    query = "SELECT sum(amount) AS s FROM fees"
    undecided = "amount: undecided: '1.234' can be 1.234 or 1,234; read as 1,234, because semicolons separate the cells"
    files = (FileRef("fees.csv", text="name;amount\na;1.234\nb;2.500\n"),)

    def answer(statement: str) -> AcceptRequest:
        evidence = Evidence("data", query=query, columns=("s",), rows=1)
        result = ExecuteResult(f"s: 3734\n\n{statement}\n\n{query}", evidence=evidence)
        return AcceptRequest("What is the total amount?", result, files=files)

    assert (await accept(answer(f"- {undecided}"), run, None, _read({}))).accepted
    verdict = await accept(answer(""), run, None, _read({}))
    assert verdict.reasons == (f"The answer does not say that this is undecided: {undecided}",)


async def test_no_rows_may_be_the_answer(run) -> None:
    query = "SELECT id FROM sales WHERE id > 9"
    assert (await accept(_data(f"No rows match.\n\n{query}", query=query, rows=0), run, None, _read({}))).accepted


async def test_several_rows_are_compared(run) -> None:
    query = "SELECT id, amount FROM sales ORDER BY id"
    output = f"id | amount\n--- | ---\n1 | 150\n2 | 20\n3 | 300\n\n{query}"
    evidence = Evidence("data", query=query, rows=3)
    files = (FileRef("sales.csv", text=SALES),)
    good = AcceptRequest("List all", ExecuteResult(output, evidence=evidence), files=files)
    assert (await accept(good, run, None, _read({}))).accepted
    bad = AcceptRequest("List all", ExecuteResult(output.replace("2 | 20", "2 | 21"), evidence=evidence), files=files)
    assert not (await accept(bad, run, None, _read({}))).accepted


@pytest.mark.parametrize("output", ["", "  \n", "None", "TODO", "n/a", "..."])
async def test_an_empty_result_is_refused(run, output: str) -> None:
    verdict = await accept(AcceptRequest("Explain", ExecuteResult(output)), run, None, _read({}))
    assert verdict == AcceptResult(False, ("The result is empty.",), 0.0)


async def test_text_that_nobody_can_check_scores_half(run) -> None:
    verdict = await accept(AcceptRequest("Explain", ExecuteResult("Because.")), run, None, _read({}))
    assert verdict == AcceptResult(True, (), 0.5, (unchecked(WHOLE_RESULT),))


async def test_the_limits_of_a_goal_are_checked_by_code(run) -> None:
    request = AcceptRequest("Explain it in two sentences.", ExecuteResult("Because."), ("friendly",))
    verdict = await accept(request, run, None, _read({}))
    assert verdict.reasons == ("in two sentences: the result has 1 sentences.",)
    assert not verdict.accepted
    better = AcceptRequest(request.goal, ExecuteResult("Because. So it is."), ("friendly",))
    verdict = await accept(better, run, None, _read({}))
    assert verdict.accepted
    assert [(check.passed, check.checked_by) for check in verdict.checks] == [
        (True, "code"),
        (False, "nobody"),
        (False, "nobody"),
    ]
    assert verdict.score == 0.67


def _saying(*answers: object):
    left = [json.dumps(answer) if not isinstance(answer, str) else answer for answer in answers]

    async def ask(messages, *, max_tokens, schema=None, temperature=0.0, seed=0, on_text=None, suffices=None) -> str:
        return left.pop(0)

    return ask


async def test_a_capable_model_judges_text(run) -> None:
    request = AcceptRequest("Explain", ExecuteResult("Because."), criteria=("a good reason",))
    ask = _saying({"accepted": False, "reason": "One sentence only."}, {"accepted": True, "reason": ""}, "?")
    opinion = Check("opinion", False, "One sentence only.", checked_by="model")
    assert await accept(request, run, ask, _read({})) == AcceptResult(False, ("One sentence only.",), 0.0, (opinion,))
    verdict = await accept(request, run, ask, _read({}))
    assert verdict.accepted
    assert [check.checked_by for check in verdict.checks] == ["model"]
    with pytest.raises(OctoError) as caught:
        await accept(request, run, ask, _read({}))
    assert caught.value.code == "model_output_invalid"


async def test_criteria_are_put_to_the_model_after_the_checks(run) -> None:
    request = AcceptRequest(
        "How many above 100?", _data(SHOWN).result, ("in euros",), (FileRef("sales.csv", text=SALES),)
    )
    ask = _saying({"accepted": False, "reason": "No currency."})
    assert (await accept(request, run, ask, _read({}))).reasons == ("No currency.",)
    verdict = await accept(request, run, None, _read({}))
    assert verdict.accepted
    assert unchecked("in euros") in verdict.checks


async def test_a_model_is_not_asked_about_what_code_has_refused(run) -> None:
    request = AcceptRequest("Explain", ExecuteResult("Because."), criteria=("at least 20 words",))
    assert not (await accept(request, run, _saying(), _read({}))).accepted


COUNT = {"type": "object", "properties": {"count": {"type": "integer"}}, "required": ["count"]}


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ('{"count": 8}', []),
        ('```json\n{"count": 8}\n```', []),
        ('{"count": "eight"}', ["at /count", "integer"]),
        ('{"other": 1}', ["at the top", "count"]),
        ("eight", ["no JSON document"]),
        ("[" * 100_000 + "1", ["no JSON document"]),
    ],
)
async def test_an_output_is_verified_against_its_schema(run, output, words):
    request = AcceptRequest("Count.", ExecuteResult(output), (format_output_criterion(COUNT),))
    verdict = await accept(request, run, None, _read({}))
    assert verdict.accepted is (not words)
    assert all(word in " ".join(verdict.reasons) for word in words)


@pytest.mark.parametrize(
    ("schema", "word"),
    [
        ({"type": "no such type"}, "invalid"),
        ({"$ref": "http://127.0.0.1:9/schema.json"}, "invalid"),
        ({"pattern": "(a+)+$"}, "does not fit"),
    ],
)
async def test_a_schema_of_the_client_does_no_harm(run, schema, word):
    output = '"' + "a" * 5000 + '!"'
    request = AcceptRequest("Go", ExecuteResult(output), (format_output_criterion(schema),))
    verdict = await accept(request, run, None, _read({}))
    assert not verdict.accepted
    assert word in " ".join(verdict.reasons)
