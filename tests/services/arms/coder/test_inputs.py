from __future__ import annotations

import ast

from hypothesis import given
from hypothesis import strategies as st

from octollm.services.arms.coder.examples import MAX_CALLS, Example, generate_calls


def _examples(*calls: str) -> list[Example]:
    return [Example(call, "None") for call in calls]


def test_numbers_between_and_beyond() -> None:
    calls = generate_calls(_examples("f(1)", "f(5)"), "f")
    assert "f(3)" in calls
    assert "f(15)" in calls
    assert "f(-1)" not in calls
    assert "f(1)" not in calls


def test_texts_put_together_and_cut() -> None:
    calls = generate_calls(_examples("f('ab')", "f('cdef')"), "f")
    assert {"f('abcdef')", "f('ba')", "f('cd')"} <= set(calls)


def test_sorted_lists_stay_sorted() -> None:
    calls = generate_calls(_examples("f([1, 4], [2])", "f([3], [])"), "f")
    assert calls
    for call in calls:
        for argument in ast.parse(call, mode="eval").body.args:  # type: ignore[attr-defined]
            value = ast.literal_eval(argument)
            assert value == sorted(value)


def test_nothing_from_calls_that_cannot_be_read() -> None:
    assert generate_calls(_examples("f(x=1)", "f()", "f(range(3))", "g(1)"), "f") == []
    assert generate_calls([], "f") == []


values = st.one_of(
    st.integers(), st.text(max_size=5), st.lists(st.integers(), max_size=4), st.booleans(), st.floats(allow_nan=False)
)


@given(st.lists(st.tuples(values, values), max_size=5))
def test_calls_are_python_and_bounded(rows: list[tuple[object, object]]) -> None:
    calls = generate_calls(_examples(*(f"f({one!r}, {other!r})" for one, other in rows)), "f")
    assert len(calls) <= MAX_CALLS
    for call in calls:
        ast.parse(call, mode="eval")
