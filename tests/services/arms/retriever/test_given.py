from hypothesis import given
from hypothesis import strategies as st

from octollm.services.arms.retriever.service import search_texts

GUIDE = "# Billing\n\nInvoices leave at 02:00.\n\n# Access\n\nFinance reads invoices.\n"


def test_passages_of_given_texts_are_found_best_first() -> None:
    found = search_texts({"guide.md": GUIDE, "other.txt": "Nothing."}, "When do invoices leave?", 5)
    assert [(p.source, p.line_start, p.line_end) for p in found] == [("guide.md", 1, 3), ("guide.md", 5, 7)]
    assert found[0].score > found[1].score > 0


def test_what_has_no_word_of_the_question_is_left_out() -> None:
    assert search_texts({"guide.md": GUIDE}, "penguins", 5) == []
    assert search_texts({}, "penguins", 5) == []
    assert search_texts({"guide.md": GUIDE}, "", 5) == []


@given(st.dictionaries(st.text(max_size=5), st.text(max_size=200), max_size=3), st.text(max_size=30), st.integers(1, 5))
def test_any_text_can_be_searched(texts: dict[str, str], question: str, limit: int) -> None:
    found = search_texts(texts, question, limit)
    assert len(found) <= limit
    assert all(passage.text for passage in found)
