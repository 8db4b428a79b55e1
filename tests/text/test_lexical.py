from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octollm.text.lexical import bm25, content_words, extract_numbers, extract_numbers_and_words, stem, stems


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


WORDS = st.sampled_from(["reactor", "core", "weather", "the", "alarm"])
TEXTS = st.lists(st.lists(WORDS, max_size=12).map(" ".join), max_size=6)


def test_more_of_the_words_is_better_even_among_two() -> None:
    one, both = bm25(["export", "invoices"], ["invoices are read", "exports invoices nightly"], total=2)
    assert both > one > 0


def test_a_rare_word_weighs_more_than_a_common_one() -> None:
    texts = ["alpha beta", "alpha gamma", "alpha delta"]
    scores = bm25(["alpha", "delta"], texts, total=3)
    assert scores.index(max(scores)) == 2


def test_of_equal_hits_the_short_passage_is_better() -> None:
    short, long = bm25(["alarm"], ["alarm rang", "alarm " + "filler " * 50], total=2)
    assert short > long


@given(st.lists(WORDS, min_size=1), TEXTS, st.integers(0, 100))
def test_scores_are_never_negative(terms: list[str], texts: list[str], total: int) -> None:
    scores = bm25(terms, texts, total=total)
    assert len(scores) == len(texts)
    assert all(score >= 0 for score in scores)
