"""The agent on a bench: its tool runs, its model is the test's."""

from __future__ import annotations

from lengths import arm

from octollm.testing import UseTool, run_arm


def test_it_uses_its_tool():
    result, lab = run_arm(
        arm,
        "execute",
        {"goal": "How many metres is a mile?"},
        model=[UseTool("convert", {"amount": 1, "unit": "mi", "into": "m"}), "A mile is 1609.344 metres."],
    )
    assert result.output == "A mile is 1609.344 metres."
    assert lab.progress == [(50.0, "mi into m")]
    assert lab.model.asked[1].messages[-1].text == "1609.344"


def test_a_wrong_unit_is_told_to_the_model():
    answers = [
        UseTool("convert", {"amount": 1, "unit": "league", "into": "m"}),
        UseTool("convert", {"amount": 3, "unit": "mi", "into": "km"}),
        "About 4.8 km.",
    ]
    result, lab = run_arm(arm, "execute", {"goal": "A league in km?"}, model=answers)
    assert result.output == "About 4.8 km."
    assert "Units are mm, cm" in lab.model.asked[1].messages[-1].text
