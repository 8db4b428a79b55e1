from __future__ import annotations

import pytest

from octollm.text.intent import is_programming_goal


@pytest.mark.parametrize(
    ("goal", "program"),
    [
        ("Write a Python function that adds", True),
        ("Implement quicksort", True),
        ("mean(numbers) please", True),
        ("I need a class for a queue", True),
        ("Explain how a function is called", False),
        ("What is a class?", False),
        ("Write a poem about the sea", False),
        ("Translate 'good night' to Spanish", False),
    ],
)
def test_a_goal_that_asks_for_a_program(goal: str, program: bool) -> None:
    assert is_programming_goal(goal) == program


def test_a_goal_with_files_needs_a_verb_of_creation() -> None:
    assert not is_programming_goal("the connect function and its timeout", has_files=True)
    assert is_programming_goal("Write tests for this module", has_files=True)
