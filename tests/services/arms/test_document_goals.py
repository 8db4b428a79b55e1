from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octollm.services.arms.document_goals import (
    find_document_work,
    find_fields,
    find_focus,
    find_result_language,
    wants_each_document,
    wants_row_per_entry,
)
from octollm.text.limits import COUNTERS, find_limits


@pytest.mark.parametrize(
    ("goal", "work"),
    [
        ("Summarize the contract in three bullet points", "summary"),
        ("Please summarise the payment terms", "summary"),
        ("Fasse den Vertrag in drei Stichpunkten zusammen", "summary"),
        ("Erstelle eine Zusammenfassung des Berichts", "summary"),
        ("Résume le contrat en trois phrases", "summary"),
        ("Give me the 5 key points of the report", "summary"),
        ("What is this document about?", "summary"),
        ("Explain the warranty in two sentences", "summary"),
        ("Compare the two offers", "comparison"),
        ("How do the two offers differ?", "comparison"),
        ("Was sind die Unterschiede zwischen den Angeboten?", "comparison"),
        ("Extract vendor, date and total from each invoice", "table"),
        ("Make a table of name and phone number of every person", "table"),
        ("Extrahiere Name, Datum und Betrag aus allen Rechnungen", "table"),
        ("List all deadlines", "list"),
        ("Nenne alle Fristen", "list"),
        ("Extract all e-mail addresses", "list"),
        ("Translate the letter into German", "translation"),
        ("Können Sie bitte übersetzen: den Brief ins Englische", "translation"),
        ("Rewrite the letter in a friendlier tone", "rewrite"),
        ("Schreibe den Brief höflicher um", "rewrite"),
        ("What does the summary say about pumps?", "answer"),
        ("Who translated the letter?", "answer"),
        ("Wann endet der Vertrag?", "answer"),
        ("Say how often the service retries.", "answer"),
        ("Delivery terms of the offer", None),
    ],
)
def test_what_a_goal_asks_to_be_done(goal: str, work: str | None) -> None:
    assert find_document_work(goal, documents=2) == work


def test_one_document_is_compared_with_nothing() -> None:
    assert find_document_work("How do the two pumps differ?", documents=1) == "answer"


@given(st.text(max_size=200))
def test_any_goal_has_a_reading(goal: str) -> None:
    find_document_work(goal, documents=2)
    find_fields(goal)
    find_focus(goal)
    find_result_language(goal)
    find_limits(goal)


@pytest.mark.parametrize(
    ("goal", "fields"),
    [
        ("Extract vendor, invoice number and total from each invoice", ["vendor", "invoice number", "total"]),
        ("Extrahiere den Namen und das Datum aus dem Brief", ["Namen", "Datum"]),
        ("Make a table of name, role and phone number of every person", ["name", "role", "phone number"]),
        ("Create a table with the columns: item, price", ["item", "price"]),
    ],
)  # fmt: skip
def test_the_fields_of_a_goal(goal: str, fields: list[str]) -> None:
    assert find_fields(goal) == fields


def test_rows_and_documents() -> None:
    assert not wants_row_per_entry("Extract date and total from each invoice", documents=3)
    assert wants_row_per_entry("Extract date and total from each invoice", documents=1)
    assert wants_row_per_entry("Extract name and age of every person", documents=3)
    assert wants_each_document("Summarize each document in one sentence")
    assert not wants_each_document("Summarize the documents")


def test_what_a_goal_singles_out() -> None:
    assert find_focus("Summarize the contract in three bullet points", ["contract.txt"]) == frozenset()
    assert find_focus("Summarize the payment terms of the contract") == {"pay", "term"}


@pytest.mark.parametrize(
    ("goal", "language"),
    [("Translate it into French", "French"), ("Übersetze den Brief ins Englische", "English"),
     ("Summarize the letter", "English"), ("Fasse den Brief zusammen", "German"), ("Résumé", "")],
)  # fmt: skip
def test_the_language_of_the_result(goal: str, language: str) -> None:
    assert find_result_language(goal) == language


@pytest.mark.parametrize(
    ("text", "unit", "low", "high"),
    [
        ("in three bullet points", "bullet", 3, 3), ("in drei Stichpunkten", "bullet", 3, 3),
        ("in höchstens zwei Sätzen", "sentence", 0, 2), ("en 3 frases", "sentence", 3, 3), ("in 5 lines", "line", 5, 5),
        ("with at most 50 words", "word", 0, 50), ("mit maximal 50 Wörtern", "word", 0, 50),
    ],
)  # fmt: skip
def test_limits_in_several_languages(text: str, unit: str, low: int, high: int) -> None:
    [limit] = find_limits(f"Summarize it {text}.")
    assert (limit.unit, limit.low, limit.high) == (unit, low, high)
    assert limit.unit in COUNTERS
