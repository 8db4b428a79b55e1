"""Arms of one's own are chosen for the goals that their descriptions fit, and for no others."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octollm import FileRef
from octollm.contracts.task import ArmInfo
from octollm.services.arms.planner.assignment import assign_arms, find_matching_arm, score_arm


def arm(name: str, description: str) -> ArmInfo:
    return ArmInfo(name, description, (), ("execute",))


OWN = [
    arm("translator", "Translates text into other languages"),
    arm("sql-analyst", "Answers questions over SQLite databases with SQL"),
    arm("weather", "Tells the weather forecast of a city"),
    arm("summariser", "Summarises long texts into a few sentences"),
    arm("explainer", "Explains things in one sentence"),
    arm("mailer", "Drafts polite e-mails to customers and suppliers"),
]
GOALS = [
    # What an arm of one's own is for.
    ("Translate 'Good morning' into French", "translator"),
    ("Please translate this letter to German", "translator"),
    ("Can you translate the menu for me?", "translator"),
    ("I want you to translate the poem", "translator"),
    ("Could you please translate: the cat sleeps", "translator"),
    ("What is the weather in Paris?", "weather"),
    ("Will the weather in Oslo be good tomorrow?", "weather"),
    ("Give me the weather forecast of Lima", "weather"),
    ("Summarise the following paragraph", "summariser"),
    ("Please summarise this article in three sentences", "summariser"),
    ("Explain why the sky is blue", "explainer"),
    ("Please explain photosynthesis", "explainer"),
    ("Draft an e-mail to a customer whose order is late", "mailer"),
    ("Draft a reply to our suppliers", "mailer"),
    ("Ask the SQLite database of the shop for the best customers with SQL", "sql-analyst"),
    ("Which SQL finds duplicates in SQLite?", "sql-analyst"),
    # What is for the built-in arms: the three kinds of goal, and what only sounds alike.
    ("Write a Python function is_palindrome(text) with tests", None),
    ("Write a function that translates Roman numerals", None),
    ("Write a Python class for a weather forecast with tests", None),
    ("Implement slugify(title) and explain it", None),
    ("Create a script that summarises a log", None),
    ("How many rows have amount > 100, and their total?", None),
    ("What is the average price per region?", None),
    ("How often does it retry?", None),
    ("What does the document say about holidays?", None),
    ("Who is the author of the report?", None),
    ("Write a poem about a translation", None),
    ("Write a short text about cats", None),
    ("List three good names for a bakery", None),
    ("What is 17 times 23?", None),
    ("Tell me a joke", None),
    ("Answer the question in the file", None),
    ("", None),
]


@pytest.mark.parametrize(("goal", "wanted"), GOALS)
def test_a_goal_goes_to_the_arm_that_is_for_it(goal: str, wanted: str | None) -> None:
    found = find_matching_arm(goal, OWN, with_files=False)
    assert (found.name if found else None) == wanted


@pytest.mark.parametrize(
    ("goal", "files"), [("How often does it retry?", ["notes.md"]), ("What is the total?", ["s.csv"])]
)
def test_files_of_the_built_in_kinds_stay_with_the_built_in_arms(goal: str, files: list[str]) -> None:
    arms = {"retriever", "coder"}
    parts = assign_arms(goal, [FileRef(name) for name in files], OWN, wants_code=False)
    assert {part.arm for part in parts} <= arms


def test_an_arm_takes_the_goal_with_its_files() -> None:
    (part,) = assign_arms("Translate the letter", [FileRef("letter.txt")], OWN, wants_code=False)
    assert (part.arm, part.files) == ("translator", ("letter.txt",))


def test_a_file_that_an_arm_accepts_comes_before_words() -> None:
    reader = ArmInfo("reader", "Reads pictures", ("image/*",), ("execute",))
    (part,) = assign_arms("Translate the sign in the picture", [FileRef("sign.png")], [*OWN, reader], wants_code=False)
    assert part.arm == "reader"


def test_equal_scores_go_to_the_first_name() -> None:
    twins = [ArmInfo(name, "Translates texts", (), ("execute",)) for name in ("beta", "alpha", "gamma")]
    arm = find_matching_arm("Translate the letter", twins, with_files=False)
    assert arm is not None
    assert arm.name == "alpha"


@given(goal=st.text(max_size=200))
def test_whoever_comes_first_in_the_list_is_no_better(goal: str) -> None:
    forward, backward = (
        find_matching_arm(goal, OWN, with_files=False),
        find_matching_arm(goal, OWN[::-1], with_files=False),
    )
    assert forward == backward


@given(goal=st.text(max_size=200), more=st.text(max_size=100))
def test_a_description_without_meaning_fits_nothing(goal: str, more: str) -> None:
    assert score_arm(goal, arm("x", "the of and")) <= 1
    assert find_matching_arm(goal + more, [], with_files=False) is None
