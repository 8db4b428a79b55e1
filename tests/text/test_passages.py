from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octollm.text.passages import numbered_lines, split_passages

lines_of_text = st.lists(
    st.one_of(st.text(max_size=60), st.sampled_from(["", "# Head", "```", "| a | b |", "x " * 200])), max_size=30
)


@given(lines_of_text, st.integers(1, 300))
def test_passages_are_bounded_ordered_and_quote_their_lines(parts: list[str], size: int) -> None:
    text = "\n".join(parts)
    lines = numbered_lines(text)
    before = 0
    for passage in split_passages(text, size):
        assert len(passage.text) <= size
        assert before <= passage.line_start <= passage.line_end <= len(lines)
        before = passage.line_start
        held = passage.text.split("\n")
        assert len(held) == passage.line_end - passage.line_start + 1
        there = lines[passage.line_start - 1 : passage.line_end]
        assert all(piece.strip() in line for piece, line in zip(held, there, strict=True))


@given(lines_of_text)
def test_no_word_is_lost(parts: list[str]) -> None:
    text = "\n".join(parts)
    joined = "\n".join(passage.text for passage in split_passages(text, 400))
    assert joined.split() == text.split()


def test_headings_begin_passages_and_stay_with_their_text() -> None:
    text = "# Title\n\n## One\ntext of one\n\n## Two\ntext of two\n"
    assert [(p.line_start, p.line_end) for p in split_passages(text)] == [(1, 4), (6, 7)]


def test_a_fenced_block_is_not_cut_at_blank_lines_or_comments() -> None:
    text = "intro\n\n```\na = 1\n\n# no heading\nb = 2\n```\n\nend"
    assert [p.text for p in split_passages(text, 40)] == ["intro\n\n```\na = 1\n\n# no heading\nb = 2\n```", "end"]


def test_long_lines_are_cut_between_words() -> None:
    passages = split_passages("word " * 100, 120)
    assert {(p.line_start, p.line_end) for p in passages} == {(1, 1)}
    assert all(not p.text.startswith("ord") for p in passages)


def test_a_line_of_megabytes_is_cut_like_any_other() -> None:
    passages = split_passages("word " * 1_000_000)
    assert len(passages) == 1_000_000 // 140 + 1
    assert {p.text for p in passages[:-1]} == {" ".join(["word"] * 140)}


def test_windows_line_ends_count_once() -> None:
    assert [(p.line_start, p.line_end, p.text) for p in split_passages("a\r\n\r\nb\r\n")] == [(1, 3, "a\n\nb")]


def test_nothing_gives_nothing() -> None:
    assert split_passages("") == split_passages(" \n\n \n") == []
    with pytest.raises(ValueError, match="at least 1"):
        split_passages("x", 0)
