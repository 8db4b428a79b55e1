from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octollm.contracts.operations import Passage
from octollm.services.arms.retriever.answer import answer_question, first_paragraph, is_denial
from octollm.services.arms.retriever.support import measure_support, narrow_passages, split_sentences
from octollm.text.passages import numbered_lines, split_passages

TEXT = """# Pump P3

The pump is filled with 2 litres of oil. It runs for 40 hours a week.

## Service
- Change the filter every 6 months.
- The seal is changed by Rosa Lind when it leaks.
- Use grade B oil only.

## Warranty
The warranty is three years. The motor is covered for
eight years by its maker.
"""


def _passages(text: str = TEXT, size: int = 200) -> list[Passage]:
    return [Passage("pump.md", "d", p.line_start, p.line_end, p.text, 1.0) for p in split_passages(text, size)]


class ScriptedPrompts:
    def __init__(self, *answers: str) -> None:
        self.answers = list(answers)
        self.prompts: list[str] = []

    async def __call__(
        self, messages, *, max_tokens, schema=None, temperature=0.0, seed=0, on_text=None, suffices=None
    ) -> str:
        self.prompts.append(messages[-1].content)
        return self.answers.pop(0)


async def _search(question: str, limit: int) -> Sequence[Passage]:
    return _passages()[:limit]


async def test_an_answer_with_the_line_that_carries_it() -> None:
    result = await answer_question("How often is the filter changed?", ScriptedPrompts("Every 6 months."), _search)
    assert result.output == "Every 6 months.\n\n[pump.md:6]"
    assert result.evidence is not None
    assert result.evidence.found
    (citation,) = result.evidence.citations
    assert citation.text == "- Change the filter every 6 months."
    assert numbered_lines(TEXT)[citation.line_start - 1] == citation.text


@pytest.mark.parametrize(
    "said",
    [
        "Not found.",
        "The passages do not mention it.",
        "",
        "The filter costs 90 euros.",
        "Ask the local dealership for further advice concerning replacements.",
        "The filter.",
    ],
)
async def test_what_is_not_carried_is_not_found(said: str) -> None:
    result = await answer_question("What does the filter cost?", ScriptedPrompts(said, said), _search)
    assert result.evidence is not None
    assert not result.evidence.found
    assert result.evidence.citations == ()
    assert result.output.startswith("Not found in pump.md: ")


async def test_passages_that_speak_of_something_else_carry_nothing() -> None:
    result = await answer_question(
        "Which colour did the marketing department choose for the brochure?", ScriptedPrompts("Grade B oil"), _search
    )
    assert result.evidence is not None
    assert not result.evidence.found
    assert "do not speak of what is asked" in result.output


async def test_nothing_is_asked_without_passages() -> None:
    async def find_nothing(question: str, limit: int) -> Sequence[Passage]:
        return []

    result = await answer_question("Who?", ScriptedPrompts(), find_nothing)
    assert result.output.startswith("Not found: ")


async def test_a_second_look_at_the_sentences_that_speak_most_of_it() -> None:
    ask = ScriptedPrompts("Not found.", "Rosa Lind changes the seal.")
    result = await answer_question("Who changes the seal?", ask, _search)
    assert result.output == "Rosa Lind changes the seal.\n\n[pump.md:7]"
    assert len(ask.prompts[1]) < len(ask.prompts[0])


async def test_a_sentence_that_speaks_more_of_it_is_looked_at_again() -> None:
    ask = ScriptedPrompts("Three years.", "Eight years.")
    result = await answer_question("For how long is the motor covered by its maker?", ask, _search)
    assert result.output.startswith("Eight years.")


async def test_reasons_reach_the_model() -> None:
    ask = ScriptedPrompts("Every 6 months.")
    await answer_question("How often is the filter changed?", ask, _search, reasons=("no line",))
    assert "no line" in ask.prompts[0]


def test_two_lines_that_carry_parts_are_both_cited() -> None:
    held = measure_support("What about filter and oil?", "6 months; grade B oil", _passages())
    assert [(c.line_start, c.line_end) for c in held.citations] == [(6, 8)] or len(held.citations) == 2
    assert held.answer_coverage == 1.0


@given(st.text(max_size=400), st.text(max_size=60), st.text(max_size=60))
def test_every_citation_reads_as_in_the_text(text: str, question: str, answer: str) -> None:
    lines = numbered_lines(text)
    for citation in measure_support(question, answer, _passages(text, 80)).citations:
        there = "\n".join(lines[citation.line_start - 1 : citation.line_end])
        assert " ".join(citation.text.split()) in " ".join(there.split())
        assert citation.line_end - citation.line_start < 3


def test_sentences_join_wrapped_lines_and_keep_items_apart() -> None:
    assert split_sentences("One is\nwrapped. Two.\n- item a\n- item b") == [
        "One is wrapped.",
        "Two.",
        "- item a",
        "- item b",
    ]


def test_narrowed_passages_are_shorter() -> None:
    cut = narrow_passages("Who changes the seal?", _passages())
    assert "Rosa Lind" in "".join(passage.text for passage in cut)
    assert sum(len(p.text) for p in cut) < len(TEXT)


@pytest.mark.parametrize(
    ("answer", "denial"),
    [
        ("Not found.", True),
        ("Not stated in the passages", True),
        ("The text does not mention a price.", True),
        ("The weight is not specified.", True),
        ("I don't know.", True),
        ("Yes, it must not be used.", False),
        ("404 is returned when a page was not found on the server", False),
        ("Use no vinegar.", False),
    ],
)
def test_denials(answer: str, denial: bool) -> None:
    assert is_denial(answer) == denial


def test_tidy_takes_the_first_paragraph() -> None:
    assert first_paragraph("Answer: It is\n six.\n\nBecause of that.") == "It is six."
