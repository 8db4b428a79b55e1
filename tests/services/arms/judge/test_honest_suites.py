"""Tests as people and models write them: right code passes, wrong code is told what was expected and what it gave."""

from __future__ import annotations

import textwrap

import pytest

from octollm.contracts.operations import ValidateRequest
from octollm.services.arms.judge.validation import validate

MODULE = """
import sys
from collections import Counter, namedtuple
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum, IntEnum

class Level(IntEnum):
    LOW = 1

class Color(Enum):
    RED = "red"

class Overdraft(Exception):
    pass

@dataclass
class Point:
    x: int
    y: int

Pair = namedtuple("Pair", "a b")

class Cache:
    def __init__(self):
        self._data = {}
    def put(self, key, value):
        self._data[key] = value
        return self
    def __contains__(self, key):
        return key in self._data
    def __len__(self):
        return len(self._data)
    def get(self, key, default=None):
        return self._data.get(key, default)

def double(n):
    return n * 2

def mean(values):
    if not values:
        raise ValueError("values must not be empty")
    return sum(values) / len(values)

def is_even(n):
    return n % 2 == 0

def count(text):
    return Counter(text.split())

def withdraw(balance, amount):
    if amount > balance:
        raise Overdraft(f"{amount} is more than {balance}")
    return balance - amount

def ask_name():
    return "Hello, " + input("name? ")

def greet(name):
    print(f"Hello, {name}!")

def third(a):
    return a / 3

def pair(a, b):
    return Pair(a, b)

def move(p, dx):
    return Point(p.x + dx, p.y)

def price(cents):
    return Decimal(cents) / 100

def find(items, item):
    return items.index(item) if item in items else None

def twice(function):
    return function(function(1))

async def later(n):
    return n + 1
"""

STRONG = {
    "unittest with setUp": """
        import unittest
        from solution import Cache
        class CacheTest(unittest.TestCase):
            def setUp(self):
                self.cache = Cache()
                self.cache.put("a", 1)
            def test_get(self):
                self.assertEqual(self.cache.get("a"), 1)
                self.assertIsNone(self.cache.get("b"))
            def test_len(self):
                self.assertEqual(len(self.cache), 1)
        if __name__ == "__main__":
            unittest.main()
        """,
    "subTest over a table": """
        import unittest
        from solution import double
        class DoubleTest(unittest.TestCase):
            def test_table(self):
                cases = [(1, 2), (2, 4), (-3, -6)]
                for n, expected in cases:
                    with self.subTest(n=n, expected=expected):
                        self.assertEqual(double(n), expected, f"for {n}: {expected}")
        """,
    "functions and a dict of cases": """
        from solution import double
        CASES = {1: 2, 2: 4}
        def test_cases():
            for n, wanted in CASES.items():
                assert double(n) == wanted, f"{n} -> {wanted}"
        def test_named():
            expected = 6
            result = double(3)
            assert result == expected
        """,
    "enumerate": """
        from solution import double
        def test_cases():
            for i, (n, wanted) in enumerate([(1, 2), (2, 4)]):
                assert double(n) == wanted, i
        """,
    "floats": """
        import math
        import unittest
        from solution import mean, third
        class MeanTest(unittest.TestCase):
            def test_mean(self):
                self.assertAlmostEqual(third(1), 0.3333333)
                self.assertAlmostEqual(third(1), 0.33, places=2)
                self.assertAlmostEqual(third(1), 0.4, delta=0.1)
                self.assertNotAlmostEqual(third(1), 0.34)
                assert abs(third(1) - 0.333333) < 1e-5
                assert mean([1, 2]) == 1.5
                assert 0.3 < third(1) < 0.4
                self.assertGreater(third(1), 0)
                self.assertEqual(third(math.pi * 3), math.pi)
        """,
    "exceptions with messages": """
        import unittest
        from solution import mean
        class MeanTest(unittest.TestCase):
            def test_empty(self):
                with self.assertRaises(ValueError) as caught:
                    mean([])
                self.assertEqual(str(caught.exception), "values must not be empty")
                self.assertIn("empty", str(caught.exception))
                self.assertRaises(ValueError, mean, [])
                with self.assertRaisesRegex(ValueError, "must not be"):
                    mean([])
                with self.assertRaises((TypeError, ValueError)):
                    mean([])
        """,
    "pytest": """
        import pytest
        from solution import double, mean, third
        def test_empty():
            with pytest.raises(ValueError, match="must not") as info:
                mean([])
            assert "empty" in str(info.value)
        def test_approx():
            assert third(1) == pytest.approx(0.3333333)
        @pytest.mark.parametrize("n, expected", [(1, 2), (2, 4)])
        def test_double(n, expected):
            assert double(n) == expected
        """,
    "plain types": """
        from collections import Counter
        from decimal import Decimal
        from solution import Level, count, find, pair, price
        def test_types():
            assert count("a b a") == {"a": 2, "b": 1}
            assert count("a b a") == Counter({"a": 2, "b": 1})
            assert pair(1, 2) == (1, 2)
            assert price(150) == Decimal("1.5")
            assert price(150) == 1.5
            assert Level.LOW == 1
            assert set(count("a b")) == {"a", "b"}
            assert count("a").keys() == {"a"}
            assert isinstance(count("a"), dict)
            assert not isinstance(price(1), float)
            assert find([1], 2) is None
            assert find([1], 1) is not None
            assert find([3], 3) == False
            assert [pair(1, 2)] == [(1, 2)]
        """,
    "booleans": """
        import unittest
        from solution import is_even
        class EvenTest(unittest.TestCase):
            def test_even(self):
                self.assertTrue(is_even(2))
                self.assertFalse(is_even(3))
                self.assertIs(is_even(2), True)
                assert is_even(4) and not is_even(5)
        """,
    "prints, and reads input": """
        import io
        import unittest
        from contextlib import redirect_stdout
        from unittest.mock import patch
        from solution import ask_name, greet
        class TalkTest(unittest.TestCase):
            def test_prints(self):
                out = io.StringIO()
                with redirect_stdout(out):
                    greet("Ann")
                self.assertEqual(out.getvalue().strip(), "Hello, Ann!")
            @patch("builtins.input", return_value="Ann")
            def test_reads(self, _input):
                self.assertEqual(ask_name(), "Hello, Ann")
            @patch("sys.stdout", new_callable=io.StringIO)
            def test_patched(self, out):
                greet("Bob")
                self.assertEqual(out.getvalue(), "Hello, Bob!\\n")
            def test_builtins(self):
                with patch("builtins.print") as printed, patch("builtins.sorted"), patch("os.write"):
                    greet("Cy")
                self.assertEqual(printed.call_count, 1)
        """,
    "collections compared": """
        import unittest
        from solution import count
        class CountTest(unittest.TestCase):
            def test_lists(self):
                self.assertListEqual(sorted(count("b a")), ["a", "b"])
                self.assertCountEqual(list(count("b a")), ["a", "b"])
                self.assertDictEqual(dict(count("a")), {"a": 1})
                self.assertIn("a", count("a"))
                self.assertNotIn("b", count("a"))
        """,
    "coroutines": """
        import unittest
        from solution import later
        class LaterTest(unittest.IsolatedAsyncioTestCase):
            async def test_later(self):
                self.assertEqual(await later(1), 2)
        async def test_function():
            assert await later(2) == 3
        """,
    "many assertions": """
        from solution import is_even
        def test_all():
            for n in range(20000):
                assert is_even(n * 2)
        """,
}

WEAK = {
    "objects of the code": """
        from solution import Color, Point, move
        def test_move():
            assert move(Point(1, 2), 3) == Point(4, 2)
            assert [move(Point(1, 2), 3)] == [Point(4, 2)]
            assert {"a": Point(1, 2)} != {"a": Point(4, 2)}
            assert move(Point(1, 2), 3) in [Point(4, 2)]
            assert isinstance(move(Point(1, 2), 3), (Point, Color))
            assert not isinstance("red", (Point, Color))
            point = Point(1, 2)
            assert point is point
            assert [point]
            assert Color("red") is Color.RED
        """,
    "computed expectations": """
        from solution import double
        def test_double():
            for n in range(1000):
                assert double(n) == n + n
        """,
    "exceptions of the code": """
        import unittest
        from solution import Overdraft, withdraw
        class T(unittest.TestCase):
            def test_overdraft(self):
                with self.assertRaises(Overdraft):
                    withdraw(1, 2)
        """,
    "a container of the code": """
        from solution import Cache
        def test_contains():
            cache = Cache()
            cache.put("a", 1)
            assert "a" in cache
            assert "b" not in cache
        """,
    "all of them": """
        from solution import double
        def test_double():
            assert all(double(n) == e for n, e in [(1, 2), (2, 4)])
        """,
    "try, except, fail": """
        import unittest
        from solution import mean
        class T(unittest.TestCase):
            def test_empty(self):
                try:
                    mean([])
                except ValueError as error:
                    self.assertTrue(str(error).startswith("values"))
                else:
                    self.fail("nothing was raised")
            @unittest.skip("not today")
            def test_skipped(self):
                self.assertEqual(mean([1]), 99)
            @unittest.expectedFailure
            def test_wrong(self):
                self.assertEqual(mean([1]), 99)
        """,
    "a mock": """
        from unittest.mock import Mock
        from solution import twice
        def test_twice():
            function = Mock(return_value=1)
            twice(function)
            function.assert_called_with(1)
        """,
}


async def _validate(tests: str, run_sandboxed, code: str = MODULE):
    return await validate(ValidateRequest(code, tests=textwrap.dedent(tests)), run_sandboxed)


@pytest.mark.parametrize("name", STRONG)
async def test_an_honest_suite_passes_and_is_compared_outside(name: str, run_sandboxed) -> None:
    result = await _validate(STRONG[name], run_sandboxed)
    assert result.reasons == ()
    assert "sandbox" not in result.checks[-1].detail


@pytest.mark.parametrize("name", WEAK)
async def test_a_suite_that_needs_the_sandbox_to_compare_says_so(name: str, run_sandboxed) -> None:
    result = await _validate(WEAK[name], run_sandboxed)
    assert result.reasons == ()
    assert "sandbox" in result.checks[-1].detail or name == "try, except, fail"


@pytest.mark.parametrize(
    ("tests", "reason"),
    [
        ("assert double(2) == 5", "assert double(2) == 5 failed: expected 5, got 4"),
        ("assert 5 == double(2)", "failed: expected 5, got 4"),
        ("assert double(2) == 5, 'twice two'", "expected 5, got 4 (twice two)"),
        ("assert double(2) != 4", "expected anything but 4"),
        ("assert double(2) < 4", "expected 4 < 4"),
        ("assert 0 < double(2) < 3", "expected 0 < 4 < 3"),
        ("assert not is_even(2)", "expected a false value, got True"),
        ("assert is_even(3)", "expected a true value, got False"),
        ("assert 'x' in count('a')", "expected 'x' in Counter({'a': 1})"),
        ("assert isinstance(double(2), str)", "expected an instance of str, got 4"),
        ("assert double(2) == '4'", "expected '4', got 4"),
        ("assert third(1) == pytest.approx(0.4)", "expected about 0.4, got 0.33"),
        ("with pytest.raises(ValueError):\n        double(2)", "expected ValueError, nothing was raised"),
        (
            "with pytest.raises(KeyError):\n        mean([])",
            "expected KeyError, got ValueError: values must not be empty",
        ),
        ("with pytest.raises(ValueError, match=r'\\d+'):\n        mean([])", "does not match the expected pattern"),
        ("with pytest.raises(ValueError, match='nope'):\n        mean([])", "expected a message like 'nope'"),
        (
            "for n, e in [(1, 2), (2, 5)]:\n        assert double(n) == e",
            "assert double(n) == e failed: expected 5, got 4",
        ),
        ("assert move(Point(1, 2), 3) == Point(4, 3)", "expected Point(x=4, y=3)"),
        ("double(None)", "double(None) failed: TypeError: unsupported operand"),
        ("assert double(2) == (\n        5\n    )", "assert double(2) == ( 5 ) failed: expected 5, got 4"),
        ("assert any(double(n) == 5 for n in (1, 2))", "expected a true value, got False"),
        ("assert mean([1]) == move(1, 2)", "AttributeError"),
    ],
)
async def test_a_failure_says_what_was_expected_and_what_the_code_gave(tests: str, reason: str, run_sandboxed) -> None:
    names = "double, mean, is_even, count, third, move, Point"
    suite = f"import pytest\nfrom solution import {names}\ndef test_it():\n    {tests}\n"
    result = await validate(ValidateRequest(MODULE, tests=suite), run_sandboxed)
    assert not result.is_valid
    assert reason in result.reasons[0]


async def test_only_the_first_failure_of_a_test_is_told(run_sandboxed) -> None:
    tests = """
        from solution import double
        def test_one():
            assert double(2) == 5
            assert double(3) == 7
        def test_two():
            assert double(4) == 9
        """
    result = await _validate(tests, run_sandboxed)
    assert [reason.split(" failed")[0] for reason in result.reasons] == [
        "assert double(2) == 5",
        "assert double(4) == 9",
    ]


async def test_expected_values_do_not_enter_the_sandbox(run_sandboxed) -> None:
    sent: list[str] = []

    async def run(request):
        sent.extend(file.text or "" for file in request.files if file.name.endswith(".json"))
        return await run_sandboxed(request)

    for suite in STRONG.values():
        await validate(
            ValidateRequest(MODULE, tests=textwrap.dedent(suite).replace("Hello, Ann", "Hello, Secret")), run
        )
    assert not any("Secret" in text for text in sent)
    tests = "from solution import double\nVALUES = [(1, 77001)]\ndef test_a():\n    '''77001'''\n    x = 77002\n" + (
        "    assert double(1) == x, 'it is 77002'\n    for n, e in VALUES:\n        assert double(n) == e  # 77001\n"
        "    assert double(1) == 77003\n"
    )
    sent.clear()
    assert not (await validate(ValidateRequest(MODULE, tests=tests), run)).is_valid
    assert not any("7700" in text for text in sent)
