from __future__ import annotations

import pytest

from octollm import Check, Message
from octollm.errors import OctoError
from octollm.services.arms.coder import cross_check
from octollm.services.arms.coder.code import write_code
from octollm.services.arms.coder.cross_check import (
    SolutionProbe,
    hardcodes_answers,
    probe_solutions,
    solutions_agree,
)
from octollm.services.arms.coder.examples import Example
from octollm.services.arms.coder.solution import (
    detect_other_language,
    find_name_in_goal,
    module_name,
    strip_test_request,
)

GOAL = "Write a Python function double(n) with tests"
GOOD = "```python\ndef double(n: int) -> int:\n    return n * 2\n```"
OTHER_GOOD = "```python\ndef double(n):\n    return n + n\n```"
BAD = "```python\ndef double(n: int) -> int:\n    return n ** 2\n```"
EXAMPLES = "assert double(1) == 2\nassert double(5) == 10\nassert double(0) == 0\nassert double(-3) == -6"


async def test_accepts_what_passes_and_agrees(scripted_prompts, validate, run) -> None:
    ask = scripted_prompts(GOOD, EXAMPLES, OTHER_GOOD)
    seen: list[str] = []

    async def on_text(text: str) -> None:
        seen.append(text)

    written = await write_code(GOAL, ask, validate, run, on_text=on_text)
    assert (written.filename, written.tests_filename) == ("double.py", "test_double.py")
    assert "self.assertEqual(double(5), 10)" in written.tests
    assert [check.name for check in written.checks] == ["syntax", "lint", "tests", "independent"]
    assert seen == [GOOD, OTHER_GOOD]
    shown = "".join(message.content for message in ask.asked[1])
    assert "def double(n: int) -> int" in shown
    assert "return" not in shown.split("Task:")[1], "the tests are written without sight of the code"


class CallRecorder:
    """Counts the calls of what it stands for."""

    def __init__(self, work) -> None:
        self.work, self.requests = work, []

    async def __call__(self, request):
        self.requests.append(request)
        return await self.work(request)


async def test_the_judge_is_asked_about_the_accepted_solution_only(scripted_prompts, validate, run) -> None:
    validate, run = CallRecorder(validate), CallRecorder(run)
    written = await write_code(GOAL, scripted_prompts(GOOD, EXAMPLES, OTHER_GOOD), validate, run)
    assert [request.code for request in validate.requests] == [written.code]
    assert len(run.requests) == 1, "both solutions are compared in one run"


async def test_the_first_solution_is_judged_once_the_second_is_refused(scripted_prompts, validate, run) -> None:
    validate = CallRecorder(validate)
    written = await write_code(GOAL, scripted_prompts(GOOD, EXAMPLES, BAD), validate, run)
    assert "n * 2" in written.code
    assert ["n ** 2" in request.code for request in validate.requests] == [True, False]


async def test_a_solution_without_an_end_spoils_only_itself(run, monkeypatch) -> None:
    monkeypatch.setattr(cross_check, "_PROBE_SECONDS", 2.0)
    endless = "def double(n):\n    while n == 5:\n        pass\n    return 2 * n\n"
    ends_program = "import os\ndef double(n):\n    os._exit(0)\n"
    good = "def double(n):\n    return 2 * n\n"
    examples = [Example("double(1)", "2"), Example("double(5)", "10")]
    run = CallRecorder(run)
    first, hung, ended, last = await probe_solutions([good, endless, ends_program, good], examples, "double", run)
    assert first is not None
    assert first.passed == (True, True)
    assert (hung, ended) == (None, None)
    assert last == first


FORGING = """
import json, os, pathlib, sys
def double(n):
    try:
        nonce = json.loads(pathlib.Path("examples.json").read_text())["nonce"]
    except OSError:
        nonce = "octollm-probe:"
    forged = "\\n" + nonce + json.dumps({__name__: [[True, "2"], [True, "10"]]}) + "\\n"
    os.write(1, forged.encode())
    sys.__stdout__.write(forged)
    sys.__stdout__.flush()
    os._exit(0)
"""


async def test_a_solution_that_forges_its_report_has_none(run) -> None:
    examples = [Example("double(1)", "2"), Example("double(5)", "10")]
    assert await probe_solutions([FORGING], examples, "double", run) == [None]


async def test_mends_with_the_judges_reasons(scripted_prompts, validate, run) -> None:
    wrong = "```python\ndef double(n):\n    return n + 2\n```"
    ask = scripted_prompts(BAD, EXAMPLES, wrong, GOOD, OTHER_GOOD)
    written = await write_code(GOAL, ask, validate, run)
    assert "n * 2" in written.code or "n + n" in written.code
    repair = ask.asked[3]
    assert [message.role for message in repair[-2:]] == ["assistant", "user"]
    assert "self.assertEqual(double(1), 2) failed: expected 2, got 3" in repair[-1].content


async def test_two_solutions_outvote_a_wrong_example(scripted_prompts, validate, run) -> None:
    ask = scripted_prompts(GOOD, EXAMPLES.replace("== 10", "== 11"), OTHER_GOOD)
    written = await write_code(GOAL, ask, validate, run)
    assert "11" not in written.tests
    assert "1 of the model's 4 examples were dropped" in written.checks[-1].detail
    assert not written.checks[-1].passed
    assert written.checks[-1].checked_by == "model"


async def test_many_wrong_examples_are_asked_for_anew(scripted_prompts, validate, run) -> None:
    wrong = "assert double(1) == 3\nassert double(5) == 11\nassert double(0) == 0\nassert double(-3) == -6"
    ask = scripted_prompts(GOOD, wrong, OTHER_GOOD, EXAMPLES)
    written = await write_code(GOAL, ask, validate, run)
    assert "double(5), 10" in written.tests
    assert "were replaced" in written.checks[-1].detail
    assert not written.checks[-1].passed


async def test_agreement_is_said_to_be_the_models(scripted_prompts, validate, run) -> None:
    written = await write_code(GOAL, scripted_prompts(GOOD, EXAMPLES, OTHER_GOOD), validate, run)
    assert written.checks[-1] == Check(
        "independent", True, "two solutions agree on further inputs; no example is the goal's own", "model"
    )
    written = await write_code(f"{GOAL}: double(7) == 14", scripted_prompts(GOOD, EXAMPLES, OTHER_GOOD), validate, run)
    assert "1 of 5 examples are the goal's own" in written.checks[-1].detail


async def test_two_solutions_with_one_wrong_reading_do_not_outvote_the_goal(scripted_prompts, validate, run) -> None:
    squares = [
        BAD,
        BAD.replace("n ** 2", "n * n"),
        BAD.replace("n ** 2", "pow(n, 2)"),
        BAD.replace("n ** 2", "n * n + 0"),
    ]
    ask = scripted_prompts(
        squares[0], "assert double(0) == 0\nassert double(1) == 1\nassert double(3) == 9", *squares[1:]
    )
    with pytest.raises(OctoError) as caught:
        await write_code(f"{GOAL}, so that double(5) == 10", ask, validate, run)
    assert caught.value.code == "not_accepted"


async def test_examples_of_the_goal_are_never_given_up(scripted_prompts, validate, run) -> None:
    ask = scripted_prompts(BAD, "assert double(0) == 0\nassert double(1) == 1\nassert double(3) == 9", BAD, BAD, BAD)
    with pytest.raises(OctoError, match=r"double\(5\), 10") as caught:
        await write_code(f"{GOAL}, so that double(5) == 10", ask, validate, run)
    assert caught.value.code == "not_accepted"


async def test_failure_is_a_failure(scripted_prompts, validate, run) -> None:
    ask = scripted_prompts(
        BAD, EXAMPLES, "no code here", BAD.replace("n ** 2", "n + 3"), "```python\ndef other(n):\n    pass\n```"
    )
    with pytest.raises(OctoError) as caught:
        await write_code(GOAL, ask, validate, run)
    assert caught.value.code == "not_accepted"
    assert not ask.answers


async def test_solutions_that_differ_are_not_given(scripted_prompts, validate, run) -> None:
    def capped(limit: int) -> str:
        return f"```python\ndef double(n):\n    return n * 2 if n < 6 else {limit}\n```"

    few = "assert double(1) == 2\nassert double(5) == 10\nassert double(0) == 0"
    ask = scripted_prompts(capped(1), few, capped(2), capped(3), capped(4))
    with pytest.raises(OctoError, match="their behaviour differs"):
        await write_code(GOAL, ask, validate, run)


async def test_weak_examples_are_asked_for_again(scripted_prompts, validate, run) -> None:
    ask = scripted_prompts(GOOD, "I cannot.", EXAMPLES, OTHER_GOOD)
    written = await write_code(GOAL, ask, validate, run)
    assert "double(5), 10" in written.tests


async def test_no_function_at_all(scripted_prompts, validate, run) -> None:
    with pytest.raises(OctoError, match="no function or class"):
        await write_code(GOAL, scripted_prompts("x", "x", "x", "x"), validate, run)


async def test_other_languages_are_refused_before_anything_is_asked(scripted_prompts, validate, run) -> None:
    with pytest.raises(OctoError, match="not Rust") as caught:
        await write_code("Write a function in Rust that adds", scripted_prompts(), validate, run)
    assert caught.value.code == "step_stopped"


async def test_reasons_and_files_reach_the_model(scripted_prompts, validate, run) -> None:
    ask = scripted_prompts(GOOD, EXAMPLES, OTHER_GOOD)
    await write_code(GOAL, ask, validate, run, texts=[("old.py", "OLD = 1")], reasons=["too slow"])
    first: list[Message] = ask.asked[0]
    assert "old.py" in first[-1].content
    assert "too slow" in first[-1].content


CLASS = """```python
class Box:
    def __init__(self):
        self.items = []
    def add(self, x):
        {}
        return len(self.items)
```"""
CLASS_TESTS = """```python
import unittest
from your_module import Box

class BoxTest(unittest.TestCase):
    def test_add(self):
        box = Box()
        self.assertEqual(box.add(1), 1)
        self.assertEqual(box.add(2), 2)
        self.assertEqual(box.items, [1, 2])
```"""


async def test_a_class_is_tested_by_a_module(scripted_prompts, validate, run) -> None:
    good = CLASS.format("self.items.append(x)")
    written = await write_code(
        "Write a class Box with add and tests", scripted_prompts(good, CLASS_TESTS), validate, run
    )
    assert written.filename == "box.py"
    assert "from box import Box" in written.tests
    assert "your_module" not in written.tests


async def test_a_second_class_may_pass(scripted_prompts, validate, run) -> None:
    ask = scripted_prompts(CLASS.format("pass"), CLASS_TESTS, CLASS.format("self.items.append(x)"))
    written = await write_code("Write a class Box with add and tests", ask, validate, run)
    assert "append" in written.code
    assert "box.add" not in ask.asked[2][-1].content, "the second class is written from the goal alone"


async def test_a_class_is_mended(scripted_prompts, validate, run) -> None:
    bad = CLASS.format("pass")
    ask = scripted_prompts(bad, CLASS_TESTS, bad, CLASS_TESTS, CLASS.format("self.items.append(x)"))
    written = await write_code("Write a class Box with add and tests", ask, validate, run)
    assert "append" in written.code
    assert "box.add(1), 1) failed: expected 1, got 0" in ask.asked[4][-1].content


async def test_a_test_that_two_classes_fail_is_dropped(scripted_prompts, validate, run) -> None:
    strange = CLASS_TESTS.removesuffix("```") + (
        "\n    def test_two(self):\n        self.assertEqual(len(Box().items), 0)\n"
        "\n    def test_odd(self):\n        self.assertEqual(Box().add(9), 5)\n```"
    )
    good = CLASS.format("self.items.append(x)")
    written = await write_code("Write a class Box with add", scripted_prompts(good, strange, good), validate, run)
    assert "test_odd" not in written.tests
    assert "test_two" in written.tests
    assert "dropped" in written.checks[-1].detail


async def test_a_class_with_tests_that_test_nothing_fails(scripted_prompts, validate, run) -> None:
    empty = (
        "```python\nimport unittest\nclass T(unittest.TestCase):\n"
        "    def test(self):\n        Box()\n        self.assertTrue(True)\n```"
    )
    ask = scripted_prompts(CLASS.format("pass"), empty, CLASS.format("pass"), empty, CLASS.format("pass"))
    with pytest.raises(OctoError, match="assert too little"):
        await write_code("Write a class Box with add and tests", ask, validate, run)


def test_answers_learnt_by_heart_are_seen() -> None:
    examples = [Example("f('hello')", "1"), Example("f('world')", "2"), Example("f('')", "0")]
    assert hardcodes_answers("def f(s):\n    return {'hello': 1, 'world': 2}.get(s, 0)", examples)
    assert not hardcodes_answers("def f(s):\n    return len(s)", examples)


async def test_a_program_is_asked_for_as_a_function(scripted_prompts, validate, run) -> None:
    ask = scripted_prompts("```python\nprint(1 * 2)\n```", GOOD, EXAMPLES, OTHER_GOOD)
    await write_code("Write a program that doubles a number", ask, validate, run)
    assert "Put the work into a function" in ask.asked[1][-1].content


def test_module_names() -> None:
    assert module_name("random") == "random_solution"
    assert [module_name(name) for name in ("slugify", "LruCache", "HTTPServer_x")] == [
        "slugify",
        "lru_cache",
        "h_t_t_p_server_x",
    ]


def test_alike_needs_the_same_for_examples_and_most_of_the_rest() -> None:
    def outcome(*gave: str) -> SolutionProbe:
        return SolutionProbe((True,) * len(gave), gave)

    assert solutions_agree(outcome("1", "2", "3", "4", "5", "6"), outcome("1", "2", "3", "4", "5", "x"), 1)
    assert not solutions_agree(outcome("1", "2", "3"), outcome("9", "2", "3"), 1)
    assert not solutions_agree(outcome("1", "2", "3"), outcome("1", "x", "y"), 1)
    assert not solutions_agree(outcome("raises E", "raises E"), outcome("raises E", "raises E"), 1)


@pytest.mark.parametrize(
    ("goal", "left"),
    [
        ("Write f(x) with tests", "Write f(x)"),
        ("Write f(x), and unit tests for it", "Write f(x)"),
        ("Write f(x) that counts tests", "Write f(x) that counts tests"),
        ("Write a class with push, plus tests.", "Write a class with push."),
    ],
)
def test_the_wish_for_tests_is_left_to_the_tests(goal: str, left: str) -> None:
    assert strip_test_request(goal) == left


@pytest.mark.parametrize(
    ("goal", "name"),
    [
        ("Write a Python function add(a, b)", "add"),
        ("Write a function called add_up", "add_up"),
        ("Write a function that adds", None),
        ("Write a class Stack", "Stack"),
        ("Write the function add_all for lists", "add_all"),
        ("Use print(x) in count_up(n)", "count_up"),
    ],
)
def test_names_in_goals(goal: str, name: str | None) -> None:
    assert find_name_in_goal(goal) == name


@pytest.mark.parametrize(
    ("goal", "language"),
    [
        ("Write a function in JavaScript", "JavaScript"),
        ("Write a Rust function", "Rust"),
        ("Write a C++ class", "C++"),
        ("Write a Python function that calls a Go program", None),
        ("Write a function that goes on", None),
        ("Implement sorting in C", "C"),
    ],
)
def test_other_languages(goal: str, language: str | None) -> None:
    assert detect_other_language(goal) == language
