import sqlite3

from hypothesis import given
from hypothesis import strategies as st

from octollm.services.memory.documents import MAX_TERMS, build_fts5_expression, extract_search_terms


def expression_of(query: str) -> str:
    terms = extract_search_terms(query)
    return build_fts5_expression(terms) if terms else ""


def test_words_become_quoted_terms() -> None:
    assert expression_of("What does the billing service export?") == '"billing" OR "service" OR "export"'


def test_operators_are_words() -> None:
    assert expression_of('foo AND (bar NEAR "baz") NOT -qux*') == '"foo" OR "bar" OR "near" OR "baz" OR "qux"'


def test_stop_words_count_when_there_are_no_others() -> None:
    assert expression_of("what is it") == '"what" OR "is" OR "it"'


def test_no_words_is_no_query() -> None:
    assert extract_search_terms(' -- "" * () ') == []


def test_the_number_of_terms_is_bounded() -> None:
    expression = expression_of(" ".join(f"word{n}" for n in range(1000)))
    assert expression.count(" OR ") == MAX_TERMS - 1


@given(st.text())
def test_sqlite_never_refuses_it(query: str) -> None:
    expression = expression_of(query)
    if not expression:
        return
    db = sqlite3.connect(":memory:")
    try:
        db.execute("CREATE VIRTUAL TABLE t USING fts5(text, tokenize='porter unicode61')")
        db.execute("SELECT * FROM t WHERE t MATCH ?", (expression,)).fetchall()
    finally:
        db.close()
