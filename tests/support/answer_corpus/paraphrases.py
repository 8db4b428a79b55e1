"""Further questions over tables of the corpus, worded as people talk rather than by the names of columns.

They came after the rules for plain questions, and nothing is tuned to them: they measure what a model does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace

from answer_corpus import corpus
from answer_corpus import questions as ask
from answer_corpus.model import Case, Question, Table, scalar

Tables = Mapping[str, Table]


def _first(tables: Tables) -> Table:
    return next(iter(tables.values()))


def _sum(number: str, column: str = "", value: object = None) -> Callable[[Tables], object]:
    def answer(tables: Tables) -> object:
        table = _first(tables)
        values = table.column(number)
        if column:
            values = [amount for each, amount in table.pairs(column, number) if each == value]
        return ask.total(values)

    return answer


def _count(column: str, value: object) -> Callable[[Tables], object]:
    return lambda tables: sum(each == value for each in _first(tables).column(column))


def _extreme(number: str, pick: Callable[..., object]) -> Callable[[Tables], object]:
    return lambda tables: pick(each for each in _first(tables).column(number) if each is not None)


def _label(label: str, number: str, pick: Callable[..., object]) -> Callable[[Tables], object]:
    def answer(tables: Tables) -> object:
        pairs = [pair for pair in _first(tables).pairs(label, number) if pair[1] is not None]
        return pick(pairs, key=lambda pair: pair[1])[0]  # type: ignore[index]

    return answer


def _coldest_in_oslo(tables: Tables) -> object:
    return min(low for station, low in _first(tables).pairs("Station", "Minimum") if station == "Oslo")


def _overdrawn(tables: Tables) -> object:
    return sum(balance < 0 for balance in _first(tables).column("Balance"))


def _rent(tables: Tables) -> object:
    return ask.total([cost for purpose, cost in tables["ledger_q2"].pairs("purpose", "cost") if purpose == "rent"])


def _best_customer(tables: Tables) -> object:
    names = dict(tables["customers"].pairs("customer_id", "customer_name"))
    spent: defaultdict[str, float] = defaultdict(float)
    for who, amount in tables["orders"].pairs("customer_id", "amount"):
        spent[names[who]] += amount
    return max(spent, key=lambda each: spent[each])


QUESTIONS: tuple[tuple[str, str, Callable[[Tables], object]], ...] = (
    ("export-in", "Add up all the amounts.", _sum("Amount")),
    ("export-nl", "Hoeveel schroeven zijn er in totaal verkocht?", _sum("Aantal", "Artikel", "Schroef")),
    ("stock", "Which part is the most expensive one?", _label("Item", "Price", max)),
    ("stock", "How many different items do we have?", lambda tables: len(_first(tables).rows)),
    ("weather", "What was the coldest temperature in Oslo?", _coldest_in_oslo),
    ("log", "How many errors were there?", _count("level", "ERROR")),
    ("log", "How long did the slowest request take?", _extreme("ms", max)),
    ("accounts", "How many accounts are below zero?", _overdrawn),
    ("survey", "How old is the oldest respondent?", _extreme("Age", max)),
    ("years", "Which country had the most people in 2022?", _label("Country", "2022", max)),
    ("footer", "Which station was visited most?", _label("Station", "Visitors", max)),
    ("xlsx-plain", "How much money do the open orders come to?", _sum("amount", "status", "open")),
    ("xlsx-plain", "How many orders were cancelled?", _count("status", "cancelled")),
    ("xls", "Which team scored the most points?", _label("name", "points", max)),
    ("ods", "How heavy are all parts together?", _sum("weight")),
    ("json-records", "How much is the largest order?", _extreme("amount", max)),
    ("parquet-typed", "How many orders are paid?", _count("status", "paid")),
    ("join-csv", "Who spent the most?", _best_customer),
    ("xlsx-times", "When did the last job run?", _extreme("at", max)),
    ("json-numbers-as-strings", "What does the cheapest item cost?", _extreme("price", min)),
    ("rows-in-txt", "How many clients live in Paris?", _count("ville", "Paris")),
    ("inches", "How many pipes do we have in stock?", _sum("count")),
    ("sep-line", "Welcher Kunde bringt uns am wenigsten ein?", _label("Kunde", "Umsatz", min)),
    ("xlsx-two-sheets", "What did we pay for rent in the second quarter?", _rent),
)


def build() -> tuple[Case, ...]:
    """Return the cases of the corpus with these questions in place of their own."""
    asked: defaultdict[str, list[Question]] = defaultdict(list)
    cases = {case.id: case for case in corpus.build()}
    for identity, text, answer in QUESTIONS:
        asked[identity].append(scalar(text, answer(cases[identity].tables)))
    return tuple(replace(cases[identity], questions=tuple(found)) for identity, found in asked.items())
