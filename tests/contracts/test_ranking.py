from hypothesis import given
from hypothesis import strategies as st

from octollm.text.lexical import bm25

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
