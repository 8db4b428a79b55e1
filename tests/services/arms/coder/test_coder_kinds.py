from __future__ import annotations

import pytest

from octollm import FileRef
from octollm.errors import OctoError
from octollm.services.arms.coder.service import classify_goal, write_text


@pytest.mark.parametrize(
    ("goal", "files", "kind"),
    [
        ("Which region sold most?", ("sales.csv",), "data"),
        ("Write a function add(a, b)", (), "code"),
        ("Add a function to this module", ("util.py",), "code"),
        ("Explain what recursion is", (), "text"),
    ],
)
def test_the_way_a_goal_goes(goal: str, files: tuple[str, ...], kind: str) -> None:
    assert classify_goal(goal, [FileRef(name) for name in files]) == kind


async def test_a_text_is_marked_as_not_checked(scripted_prompts) -> None:
    result = await write_text("Explain x", scripted_prompts(" It is so. "), notes="earlier", reasons=("too long",))
    assert result.output == "It is so."
    assert result.evidence is not None
    assert not result.evidence.checks[0].passed


async def test_no_text_is_a_failure(scripted_prompts) -> None:
    with pytest.raises(OctoError) as caught:
        await write_text("Explain x", scripted_prompts("  "))
    assert caught.value.code == "model_output_invalid"
