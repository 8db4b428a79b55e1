import sqlite3

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octollm.services.memory.indexing import build_terms, tenant_prefix
from octollm.services.memory.search import MAX_MATCHES, MAX_TERMS, build_fts5_expression, build_tsquery, choose_terms
from octollm.text.index_terms import QueryTerm, query_terms
from octollm.text.question_terms import recognize_language

PREFIX = tenant_prefix("default")


def test_operators_are_words() -> None:
    terms = query_terms('foo AND (bar NEAR "baz") NOT -qux*')
    assert build_fts5_expression("t", terms) == '"tfoo" OR "tbar" OR "tnear" OR "tbaz" OR "tqux"'
    assert build_tsquery("t", terms) == "'tfoo' | 'tbar' | 'tnear' | 'tbaz' | 'tqux'"


def test_a_short_run_of_ideographs_is_a_prefix_and_a_long_word_may_be_a_part() -> None:
    terms = query_terms("茶 Frist")
    assert build_fts5_expression("t", terms) == '"t茶"* OR "tfrist" OR ("t_frist")'
    assert build_tsquery("t", terms) == "'t茶':* | 'tfrist' | ('t_frist')"


@given(st.text())
def test_sqlite_never_refuses_a_query(query: str) -> None:
    terms = query_terms(query, ("de", "en"))
    if not terms:
        return
    db = sqlite3.connect(":memory:")
    try:
        db.execute("""CREATE VIRTUAL TABLE t USING fts5(terms, tokenize="ascii tokenchars '_'")""")
        db.execute("INSERT INTO t VALUES (?)", (build_terms("default", "en", query),))
        found = db.execute("SELECT * FROM t WHERE t MATCH ?", (build_fts5_expression(PREFIX, terms),)).fetchall()
    finally:
        db.close()
    # What a text was indexed by, it is found by.
    assert len(found) == 1


def terms(count: int) -> list[QueryTerm]:
    return [QueryTerm((f"word{n}",)) for n in range(count)]


def test_the_rarest_terms_are_looked_for() -> None:
    some = terms(4)
    assert choose_terms(some, [5, 0, 1, 3]) == [some[2], some[3], some[0]]
    assert choose_terms(some, [0, 0, 0, 0]) == []
    assert len(choose_terms(terms(100), [1] * 100)) == MAX_TERMS


def test_a_term_that_most_passages_have_is_left_out_of_a_long_query() -> None:
    some = terms(3)
    assert choose_terms(some, [10, MAX_MATCHES, 20]) == [some[0], some[2]]
    # The rarest counts, however frequent it is.
    assert choose_terms(some[:2], [MAX_MATCHES + 2, MAX_MATCHES + 1]) == [some[1]]


def test_tenants_have_terms_of_their_own() -> None:
    assert build_terms("a", "en", "octopus").endswith("octopus")
    assert set(build_terms("a", "en", "octopus").split()).isdisjoint(build_terms("b", "en", "octopus").split())


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("Der Vertrag kann mit drei Monaten Frist gekündigt werden.", "de"),
        ("合同可以提前三个月通知解除。", "zh"),
        ("この契約は三か月前に解約できます。", "ja"),
        ("임대 계약은 해지할 수 있습니다.", "ko"),
        ("سيتم إلغاء العقد بعد ثلاثة أشهر", "ar"),
        ("สัญญาเช่าสามารถยกเลิกได้", "th"),
        ("12.5 / 2024", ""),
        ("", ""),
        ("\ud800", ""),
    ],
)
def test_the_language_of_a_text_is_recognized(text: str, language: str) -> None:
    assert recognize_language(text) == language
