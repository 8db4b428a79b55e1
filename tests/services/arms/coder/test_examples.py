from __future__ import annotations

import unittest

import pytest

from octollm.services.arms.coder.examples import (
    Example,
    are_sufficient,
    parse_examples,
    parse_goal_examples,
    render_tests,
)


@pytest.mark.parametrize(
    ("line", "call", "expected", "kind"),
    [
        ("assert f(2) == 4", "f(2)", "4", "equal"),
        ("f('a b') == ['a', 'b']", "f('a b')", "['a', 'b']", "equal"),
        ("1. assert 4 == f(2)  # twice", "f(2)", "4", "equal"),
        ("- assert f(2) is None", "f(2)", "None", "equal"),
        ("assert f('x')", "f('x')", "True", "equal"),
        ("assert not f('x')", "f('x')", "False", "equal"),
        ("assert f([1])[0] == 1", "f([1])[0]", "1", "equal"),
        ("assert list(f(3)) == [0, 1, 2]", "list(f(3))", "[0, 1, 2]", "equal"),
        ("f(-1) raises ValueError", "f(-1)", "ValueError", "raises"),
    ],
)
def test_reads_assertions(line: str, call: str, expected: str, kind: str) -> None:
    (example,) = parse_examples(line, "f")
    assert (example.call, example.expected, example.kind) == (call, expected, kind)


@pytest.mark.parametrize(
    "line",
    [
        "assert 1 == 1",
        "assert f(2) == f(2)",
        "assert f(2) == x",
        "assert g(2) == 4",
        "assert f(2) > 3",
        "f(2)",
        "assert f(2",
        "f(-1) raises SomethingElse",
        "prose about f(2)",
        "assert True",
    ],
)
def test_leaves_out_what_tests_nothing(line: str) -> None:
    assert parse_examples(line, "f") == []


def test_keeps_one_example_a_call() -> None:
    examples = parse_examples("```python\nassert f(1) == 1\nassert f(1) == 2\nassert f(3) == 3\n```", "f")
    assert [example.text() for example in examples] == ["f(1) == 1", "f(3) == 3"]


@pytest.mark.parametrize(
    ("goal", "found"),
    [
        ("Write f(n), e.g. f(2) == 4 and f(3) -> 9.", ["f(2) == 4", "f(3) == 9"]),
        ("f('a,b') should return ['a', 'b']", ["f('a,b') == ['a', 'b']"]),
        ("with f(0) = 0 and f(1) = 1", ["f(0) == 0", "f(1) == 1"]),
        ("f(-1) raises a ValueError", ["f(-1) raises ValueError"]),
        ("'aab' becomes 'a2b1'", ["f('aab') == 'a2b1'"]),
        ("Write f(text) for the text 'abc'", []),
        ("from 1 to 10", []),
    ],
)
def test_reads_the_examples_of_a_goal(goal: str, found: list[str]) -> None:
    examples = parse_goal_examples(goal, "f", 1)
    assert [example.text() for example in examples] == found
    assert all(example.is_from_goal for example in examples)


def test_bare_values_are_examples_of_one_parameter_only() -> None:
    assert parse_goal_examples("'aab' becomes 'a2b1'", "f", 2) == []


def test_few_or_equal_examples_prove_little() -> None:
    same = [Example(f"f({n})", "True") for n in range(5)]
    assert not are_sufficient(same)
    assert not are_sufficient([Example("f(1)", "1"), Example("f(2)", "2")])
    assert are_sufficient([*same, Example("f(9)", "False")])


def test_renders_tests_that_run() -> None:
    examples = [
        Example("double(2)", "4"),
        Example("double(0.1)", "0.2"),
        Example("double('x')", "TypeError", kind="raises"),
    ]
    text = render_tests(examples, "doubling", "double")
    scope: dict[str, object] = {"double": lambda n: n * 2 + 0.0, "__name__": "x"}
    exec(text.replace("from doubling import double", ""), scope)
    case = scope["DoubleTest"]
    assert isinstance(case, type)
    result = unittest.defaultTestLoader.loadTestsFromTestCase(case).run(unittest.TestResult())
    assert (result.testsRun, result.wasSuccessful()) == (3, True)
