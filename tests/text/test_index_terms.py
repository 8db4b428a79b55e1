from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octollm.text.index_terms import (
    MAX_QUERY_TERMS,
    QueryTerm,
    fuse_rankings,
    index_terms,
    inverse_document_frequency,
    match_bm25,
    query_terms,
)


def matches(query: str, text: str, language: str = "") -> bool:
    """Return whether every term of the query is in the text."""
    bag = dict.fromkeys(index_terms(text, language), 1)
    return all(term.count(bag) > 0 for term in query_terms(query, (language,) if language else ()))


@pytest.mark.parametrize(
    ("query", "text", "language"),
    [
        ("契約", "この契約は解約できます。", "ja"),
        ("茶", "绿茶", "zh"),
        ("约书", "合约书在此", "zh"),
        ("ยา", "วิธีเก็บยา", "th"),
        ("รถไฟ", "ขึ้นรถไฟที่นี่", "th"),
        ("비밀번호", "비밀번호는 열 자입니다", "ko"),
        ("المدينة", "في الْمَدِينَةِ القديمة", "ar"),
        ("مكتبه", "مكتبة", "ar"),
        ("Frist", "Die Kündigungsfristen stehen im Vertrag.", "de"),
        ("Kündigung", "Die Kündigungsfristen stehen im Vertrag.", "de"),
        ("kuendigung", "Kuendigungsfrist", "de"),
        ("Strasse", "Straße", "de"),
        ("cafe", "Un café", "fr"),
        ("CAFÉ", "cafe\u0301", ""),
        ("テレビ", "ﾃﾚﾋﾞ", "ja"),
        ("ABC", "ＡＢＣ", "ja"),
        ("istanbul", "İSTANBUL", "tr"),
        ("हिन्दी", "यह हिन्दी है", "hi"),
        ("INV-2024-001", "Invoice INV-2024-001 is open", "en"),
        ("2024", "on 2024-05-01", "en"),
        ("exports", "The service exported it", "en"),
        ("AB漢字", "型番AB漢字CD", "ja"),
        ("𠮷野", "𠮷野家", "ja"),
    ],
)
def test_a_text_is_found_by(query: str, text: str, language: str) -> None:
    assert matches(query, text, language)


@pytest.mark.parametrize(
    ("query", "text"), [("約契", "契約"), ("Friseur", "Kündigungsfrist"), ("ยาว", "ยา"), ("cat", "concatenate")]
)
def test_a_text_is_not_found_by(query: str, text: str) -> None:
    assert not matches(query, text)


@pytest.mark.parametrize("text", ["", " \n", '-- "" * ()', "🙂🙂", "\x00", "\ud800", "\u202e\u200b", "_ __"])
def test_some_texts_have_no_terms(text: str) -> None:
    assert index_terms(text, "en") == []
    assert query_terms(text, ("en",)) == []


@given(st.text(max_size=300))
def test_terms_have_nothing_that_an_index_takes_for_syntax(text: str) -> None:
    for term in index_terms(text, "de"):
        assert term
        assert not set(term) & set(" \t\n\r\"'*()&|!:<>-^\\\x00")
        assert len(term.encode()) < 1000


@given(st.text(min_size=1, max_size=60))
def test_a_text_is_found_by_itself(text: str) -> None:
    assert matches(text, text)


def test_the_terms_of_a_query_are_bounded() -> None:
    assert len(query_terms(" ".join(f"word{n}" for n in range(5000)))) == MAX_QUERY_TERMS
    assert len(query_terms("".join(chr(0x4E00 + n) for n in range(20_000)))) == MAX_QUERY_TERMS


def test_stop_words_count_when_there_are_no_others() -> None:
    assert query_terms("what is the pump") == query_terms("pump")
    assert len(query_terms("what is it")) == 3


def rank(query: str, *texts: str) -> list[float]:
    terms = query_terms(query, ("en",))
    cut = [index_terms(text, "en") for text in texts]
    weights = [
        inverse_document_frequency(sum(term.count(dict.fromkeys(each, 1)) > 0 for each in cut), len(texts))
        for term in terms
    ]
    return [match.score for match in match_bm25(terms, weights, cut)]


def test_more_of_the_words_is_better() -> None:
    one, both = rank("export invoices", "invoices are read", "exports invoices nightly")
    assert both > one > 0


def test_a_rare_word_weighs_more_than_a_common_one() -> None:
    scores = rank("alpha gamma", "alpha beta", "alpha gamma", "alpha delta", "gamma rays beat")
    assert scores[1] == max(scores)
    assert scores[3] > scores[0]


def test_the_whole_word_counts_more_than_a_compound() -> None:
    whole, compound = rank("Frist", "Die Frist endet", "Die Kündigungsfrist endet")
    assert whole > compound > 0


def test_a_text_without_a_word_of_the_query_has_no_score() -> None:
    assert rank("zebra", "nothing here", "") == [0, 0]


def test_rankings_are_fused() -> None:
    scores = fuse_rankings([(1, 1.0), (2, 1.0)], [(2, 1.0), (3, 1.0)], [])
    assert sorted(scores, key=lambda each: -scores[each]) == [2, 1, 3]
    assert fuse_rankings() == {}


def test_a_term_counts_the_words_that_begin_with_it() -> None:
    assert QueryTerm(("茶",), is_prefix=True).count({"茶道": 2, "茶": 1, "緑茶": 1}) == 3
