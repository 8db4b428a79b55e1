"""Questions over a table whose answers are computed from its rows, in plain Python."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable
from datetime import date
from typing import Any

from answer_corpus.model import Question, Table, scalar

Ask = Callable[[Table, random.Random], "Question | None"]
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
          "December")  # fmt: skip


def total(values: list[Any]) -> Any:
    known = [value for value in values if value is not None]
    return round(math.fsum(known), 6) if any(isinstance(value, float) for value in known) else sum(known)


def how_many_rows(table: Table) -> Question:
    return scalar("How many rows are there?", len(table.rows))


def sum_of(table: Table, number: str, text: str = "What is the sum of {}?") -> Question:
    return scalar(text.format(number), total(table.column(number)))


def average_of(table: Table, number: str) -> Question:
    known = [value for value in table.column(number) if value is not None]
    return scalar(f"What is the average {number}?", math.fsum(known) / len(known))


def highest(table: Table, number: str, text: str = "What is the highest {}?") -> Question:
    return scalar(text.format(number), max(value for value in table.column(number) if value is not None))


def lowest(table: Table, number: str) -> Question:
    return scalar(f"What is the lowest {number}?", min(value for value in table.column(number) if value is not None))


def label_of_highest(table: Table, label: str, number: str) -> Question | None:
    """Ask which row has the highest number; ``None`` when two rows share it."""
    pairs = [(name, value) for name, value in table.pairs(label, number) if value is not None]
    best = max(value for _, value in pairs)
    names = {name for name, value in pairs if value == best}
    return scalar(f"Which {label} has the highest {number}?", names.pop()) if len(names) == 1 else None


def count_above(table: Table, number: str, limit: float) -> Question:
    found = sum(1 for value in table.column(number) if value is not None and value > limit)
    return scalar(f"How many rows have {number} greater than {limit}?", found)


def count_where(table: Table, column: str, value: Any) -> Question:
    return scalar(f"How many rows have {column} = {value}?", sum(1 for each in table.column(column) if each == value))


def sum_where(table: Table, number: str, column: str, value: Any) -> Question:
    found = [amount for each, amount in table.pairs(column, number) if each == value]
    return scalar(f"What is the sum of {number} where {column} is {value}?", total(found))


def sum_per(table: Table, number: str, label: str) -> Question:
    groups: defaultdict[Any, list[Any]] = defaultdict(list)
    for name, value in table.pairs(label, number):
        groups[name].append(value)
    return Question(
        f"What is the sum of {number} per {label}?", rows=tuple((name, total(each)) for name, each in groups.items())
    )


def count_per(table: Table, label: str) -> Question:
    groups: defaultdict[Any, int] = defaultdict(int)
    for name in table.column(label):
        groups[name] += 1
    return Question(f"How many rows are there for each {label}?", rows=tuple(groups.items()))


def earliest(table: Table, day: str) -> Question:
    return scalar(f"What is the earliest {day}?", min(each for each in table.column(day) if each is not None))


def latest(table: Table, day: str) -> Question:
    return scalar(f"What is the latest {day}?", max(each for each in table.column(day) if each is not None))


def sum_in_month(table: Table, number: str, day: str) -> Question | None:
    """Ask for the month of the first row."""
    first: date = next(each for each in table.column(day) if each is not None)
    found = [
        value
        for each, value in table.pairs(day, number)
        if each and (each.year, each.month) == (first.year, first.month)
    ]
    if not found:
        return None
    return scalar(f"What is the sum of {number} in {MONTHS[first.month - 1]} {first.year}?", total(found))


def value_of(table: Table, wanted: str, label: str, name: Any) -> Question | None:
    found = [value for each, value in table.pairs(label, wanted) if each == name]
    return scalar(f"What is the {wanted} of {label} {name}?", found[0]) if len(found) == 1 else None


def choose(rng: random.Random, count: int, *questions: Question | None) -> tuple[Question, ...]:
    """Return some of the questions that could be asked."""
    able = [each for each in questions if each is not None]
    return tuple(rng.sample(able, min(count, len(able))))
