"""The agent: its tool runs, its model is the test's."""

from __future__ import annotations

from lengths import arm

from octollm.testing import ToolUse, run_arm


def test_it_uses_its_tool():
    result, client = run_arm(
        arm,
        "execute",
        {"goal": "How many metres is a mile?"},
        model=[ToolUse("convert", {"amount": 1, "unit": "miles", "into": "metres"}), "A mile is 1609.344 metres."],
    )
    assert result.output == "A mile is 1609.344 metres."
    assert client.progress == [(50.0, "miles into metres")]
    assert client.model.requests[1].messages[-1].text == "1609.344"


def test_a_wrong_unit_is_told_to_the_model():
    answers = [
        ToolUse("convert", {"amount": 1, "unit": "leagues", "into": "metres"}),
        ToolUse("convert", {"amount": 3, "unit": "miles", "into": "kilometres"}),
        "About 4.8 km.",
    ]
    result, client = run_arm(arm, "execute", {"goal": "A league in km?"}, model=answers)
    assert result.output == "About 4.8 km."
    assert "'millimetres', 'centimetres'" in client.model.requests[1].messages[-1].text
