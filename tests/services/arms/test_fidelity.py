from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octollm.services.arms.fidelity import (
    contradicts,
    find_changed_figures,
    find_identifiers,
    find_missing,
    find_names,
    find_unsupported_figures,
)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("The fee is EUR 1,234.50.", "Die Gebühr beträgt 1.234,50 EUR."),
        ("It starts on 2025-03-01.", "Es beginnt am 1. März 2025."),
        ("It starts on 1 March 2025.", "Es beginnt am 01.03.2025."),
        ("It takes three days.", "Es dauert 3 Tage."),
        ("It takes 3 days.", "Es dauert drei Tage."),
        ("It costs 12,34,567 rupees.", "It costs 1,234,567 rupees."),
        ("1\u00a0250\u00a0000 Einwohner", "1.250.000 inhabitants"),
        ("It costs 0.50 euros.", "Es kostet 0,5 Euro."),
        ("25 days", "twenty-five days"),
        ("nine hundred thousand tonnes", "900,000 tonnes"),
        ("Version 2.13.1", "version 2.13.1"),
        ("steps 1,2,3", "steps 1, 2, 3"),
        ("A discount of 5 %", "Ein Rabatt von 5 Prozent"),
        ("Growth in %: 5", "It grew by 5 %."),
        ("2024-03-01", "01.03.2024"),
    ],
)
def test_numbers_in_another_notation_are_the_same(source: str, text: str) -> None:
    assert find_changed_figures(source, text) == ([], [])


@pytest.mark.parametrize(
    ("source", "text", "missing", "added"),
    [
        ("24 months", "36 months", ["24"], ["36"]),
        ("EUR 1,234.50", "EUR 1,234.05", ["1234.5"], ["1234.05"]),
        ("within 30 days", "soon", ["30"], []),
        ("1 March 2025", "1 April 2025", ["month 3"], ["month 4"]),
        ("It may take 3 days.", "It takes 3 days.", [], []),
        ("soon", "in 14 days", [], ["14"]),
        ("EUR 12.50", "EUR 1250", ["12.5"], ["1250"]),
        ("3.5 %", "35 %", ["3.5"], ["35"]),
        ("EUR 0.125", "EUR 125", ["0.125"], ["125"]),
        ("24.6 degrees", "25 degrees", ["24.6"], ["25"]),
        ("900 euros", "nine thousand euros", ["900"], ["9000"]),
        ("six weeks", "nine weeks", [], ["9"]),
        ("zwei Wochen", "drei Wochen", [], ["3"]),
        ("5 euros off", "5 % off", [], ["5 %"]),
        ("5 euros off, 7 % tax", "5 % off, 7 % tax", [], ["5 %"]),
        ("on 03.01.2025", "on 01.03.2025", [], ["01.03.2025"]),
        ("on 2025-01-03", "on 2025-03-01", [], ["2025-03-01"]),
    ],
)
def test_numbers_that_change(source: str, text: str, missing: list[str], added: list[str]) -> None:
    assert find_changed_figures(source, text) == (missing, added)


@given(st.text(max_size=300))
def test_a_text_keeps_to_itself(text: str) -> None:
    assert find_changed_figures(text, text) == ([], [])
    assert find_missing(find_identifiers(text), text) == []
    assert find_missing(find_names(text), text) == []


def test_addresses_and_identifiers() -> None:
    text = "Write to a.b@example.org about LS-20417, see https://example.org/x."
    assert find_identifiers(text) == ["a.b@example.org", "LS-20417", "https://example.org/x"]
    assert find_missing(["LS-20417"], "ls-20417 is here") == []
    assert find_names("The pump was sold by Rosa Lind to us") == ["Rosa Lind"]


@pytest.mark.parametrize(
    ("claim", "source", "is_opposite"),
    [
        ("The Supplier is liable for flooding.", "The Supplier is not liable for flooding.", True),
        ("The Supplier is not liable for flooding.", "The Supplier is liable for flooding.", True),
        ("The fee is due.", "The fee is due. Parts are not included.", False),
        ("Parts are not included.", "The fee is due. Parts are not included.", False),
        ("Die Pumpen dürfen im Freien stehen.", "Die Pumpen dürfen nicht im Freien stehen.", True),
    ],
)
def test_what_says_the_opposite(claim: str, source: str, is_opposite: bool) -> None:
    assert contradicts(claim, source) is is_opposite


@pytest.mark.parametrize(
    ("question", "cited", "answer", "unsupported"),
    [
        ("Is the fee 500 euros?", "The fee is 300 euros.", "The fee is 500 euros.", ["500"]),
        ("Is the fee 500 euros?", "The fee is 300 euros.", "No, the fee is 300 euros, and not 500.", []),
        ("How much did it grow in 2023?", "It grew by 5 %.", "In 2023 it grew by 5 %.", []),
        ("Is it open in 2023?", "It is open every day.", "It is open in 2023.", []),
        ("How long does it take?", "It takes six weeks from the order.", "It takes nine weeks from the order.", ["9"]),
        ("When does it end?", "It ends on 1 March 2025.", "It ends on 1 April 2025.", ["month 4"]),
    ],
)
def test_a_number_of_an_answer_stands_in_its_lines(
    question: str, cited: str, answer: str, unsupported: list[str]
) -> None:
    assert find_unsupported_figures(question, cited, answer) == unsupported
