"""What code can check of a text: limits, language, format and words. What it does not understand it leaves open."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octollm.services.arms.judge.criteria import check_text
from octollm.text.language import detect_language
from octollm.text.limits import count_sentences, count_words

WORDS_20 = " ".join(["word"] * 20) + "."
BULLETS = "- one\n- two\n- three"
GERMAN = "Die Sonne ist ein Stern und das Licht von ihr ist nicht weit, es wird in acht Minuten hier sein."
ENGLISH = "The sun is a star and the light of it is not far, it will be here in eight minutes."
FRENCH = "Le soleil est une étoile et la lumière est dans le ciel pour nous avec une grande force."
TABLE = "| a | b |\n| --- | --- |\n| 1 | 2 |"


@pytest.mark.parametrize(
    ("criterion", "good", "bad"),
    [
        ("at most 20 words", WORDS_20, WORDS_20 + " more"),
        ("No more than 20 words.", WORDS_20, WORDS_20 + " more"),
        ("20 words or less", WORDS_20, WORDS_20 + " more"),
        ("fewer than 21 words", WORDS_20, WORDS_20 + " more"),
        ("at least 20 words", WORDS_20, "too short"),
        ("between 15 and 25 words", WORDS_20, "too short"),
        ("15-25 words", WORDS_20, "too short"),
        ("about 22 words", WORDS_20, "too short"),
        ("in 21 words", WORDS_20, "too short"),
        ("exactly two sentences", "It is. So be it.", "It is."),
        ("two sentences", "It is. So be it.", "It is."),
        ("a single sentence", "It is, e.g. so.", "It is. So be it."),
        ("in three bullet points", BULLETS, "one, two, three"),
        ("at most two paragraphs", "a\n\nb", "a\n\nb\n\nc"),
        ("at most 5 characters", "abcde", "abcdef"),
        ("has 3 items", "1. a\n2. b\n3. c", "1. a\n2. b"),
        ("written in German", GERMAN, ENGLISH),
        ("in English", ENGLISH, FRENCH),
        ("auf Deutsch", GERMAN, FRENCH),
        ("in Russian", "Солнце это звезда", ENGLISH),
        ("in Japanese", "太陽は星です", ENGLISH),
        ("is valid JSON", '{"a": 1}', "a: 1"),
        ("as a JSON object", '```json\n{"a": 1}\n```', "a: 1"),
        ("as a Markdown table", TABLE, "a b"),
        ("as a numbered list", "1. a\n2. b", BULLETS),
        ("uses bullet points", BULLETS, "one, two"),
        ('mentions "Paris"', "It is in Paris.", "It is in parish."),
        ("contains the word 'Paris'", "paris", "Rome"),
        ('must not mention "Rome"', "Paris", "Rome"),
        ("without the word “very”", "good", "very good"),
    ],
)
def test_a_criterion_that_code_understands(criterion: str, good: str, bad: str) -> None:
    assert [(check.passed, check.checked_by) for check in check_text("", (criterion,), good)] == [(True, "code")]
    [check] = check_text("", (criterion,), bad)
    assert not check.passed
    assert check.checked_by == "code"
    assert check.detail


@pytest.mark.parametrize(
    "criterion",
    ["friendly", "explains why the sky is blue", "each sentence has at most 10 words", "mentions Paris", "in Germany"],
)
def test_what_is_not_understood_is_said_to_be_unchecked(criterion: str) -> None:
    [check] = check_text("", (criterion,), "Some text.")
    assert (check.name, check.checked_by, check.detail) == ("unchecked", "nobody", criterion)


def test_the_rest_of_a_criterion_stays_open() -> None:
    checks = check_text("", ("At most 50 words and in a friendly tone",), WORDS_20)
    assert [check.checked_by for check in checks] == ["code", "nobody"]


@pytest.mark.parametrize(
    ("goal", "output", "fault"),
    [
        ("Explain tides in three bullet points.", BULLETS, ""),
        ("Explain tides in three bullet points.", "Tides.", "the result has 0 bullets"),
        ("Summarise it in at most 50 words", WORDS_20 * 3, "the result has 58 words"),
        ("Answer in German: why is the sky blue?", ENGLISH, "the result is in English"),
        ("Answer in German: why is the sky blue?", GERMAN, ""),
        ("Translate this into French", ENGLISH, "the result is in English"),
        ("List the primes as JSON.", "2, 3", "is no JSON document"),
    ],
)
def test_a_goal_sets_limits_of_its_own(goal: str, output: str, fault: str) -> None:
    faults = [check.detail for check in check_text(goal, (), output) if not check.passed]
    assert len(faults) == bool(fault)
    assert not fault or fault in faults[0]


@pytest.mark.parametrize(
    "goal",
    [
        "What is the price of an item?",
        "How many letters are in five words?",
        "Write three sentences, each with at most 10 words.",
        "List words with at most 4 characters.",
        "What does Haus mean in German?",
        "Describe schools in German cities.",
        "Explain what is wrong in two lines of the program.",
        "Why is JSON popular?",
    ],
)
def test_a_goal_about_words_sets_no_limit(goal: str) -> None:
    assert check_text(goal, (), ENGLISH) == []


@pytest.mark.parametrize(
    ("text", "language"),
    [
        (GERMAN, "German"),
        (ENGLISH, "English"),
        (FRENCH, "French"),
        ("42", ""),
        ("太陽は星です", "Chinese"),
        ("print(x)", ""),
    ],
)
def test_languages_are_told_by_script_and_common_words(text: str, language: str) -> None:
    assert detect_language(text) in (language, "Japanese" if language == "Chinese" else language)


def test_counting() -> None:
    assert count_words("One, two — three - 4.") == 4
    assert count_sentences("Dr. Smith, e.g., is here. Is he?\n- yes\n- no") == 4


@given(st.text(max_size=300), st.text(max_size=300), st.text(max_size=300))
def test_any_text_is_checked(goal: str, criterion: str, output: str) -> None:
    for check in check_text(goal, (criterion,), output):
        assert check.checked_by in ("code", "nobody")
