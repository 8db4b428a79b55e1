"""The translator."""

from translator import arm

from octollm.testing import run_arm

GLOSSARY = {
    "passages": [
        {"source": "terms.md", "digest": "0", "line_start": 3, "line_end": 3, "text": "arm: Arm", "score": 1.0},
    ]
}


def test_it_translates_with_the_glossary():
    result, client = run_arm(
        arm,
        "execute",
        {"goal": "Into German: an arm"},
        model=["ein Arm"],
        answers={"retriever:search": GLOSSARY},
    )
    assert result.output == client.text == "ein Arm"
    assert client.calls[0].body == {"query": "Into German: an arm"}
    assert "arm: Arm" in client.model.prompts[0]
