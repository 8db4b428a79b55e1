"""What the arms' thinking is handed."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from octollm import Message, OctoError
from octollm.arm import ModelCompletion
from octollm.config import read_settings
from octollm.contracts.task import Task, TaskContext, Usage
from octollm.services.arms.adapters import MAX_NOTES, ModelAsk, collect_notes, goal_with_constraints, is_capable_model
from octollm.services.arms.completion import ask_draft
from octollm.services.arms.retriever.answer import has_whole_paragraph


@dataclass
class Model:
    answers: list[str | tuple[str, str]]
    asked: list[dict[str, Any]] = field(default_factory=list)

    async def chat(self, messages, *, on_text=None, **options) -> ModelCompletion:
        self.asked.append({"messages": messages, **options})
        answer = self.answers.pop(0)
        text, finish = answer if isinstance(answer, tuple) else (answer, "stop")
        for piece in text:
            if on_text is not None:
                await on_text(piece)
        return ModelCompletion(text, finish, Usage(), "scripted")


@dataclass
class RecordingContext:
    model: Model
    said: list[tuple[str, bool]] = field(default_factory=list)

    async def emit(self, text: str, *, reset: bool = False) -> None:
        self.said.append((text, reset))


async def test_a_further_answer_voids_the_text_before_it() -> None:
    ctx = RecordingContext(Model(["ab", "silent", "cd"]))
    ask = ModelAsk(ctx)  # pyright: ignore[reportArgumentType]
    assert await ask([Message.user("x")], max_tokens=5, on_text=ask.write) == "ab"
    assert await ask([Message.user("x")], max_tokens=5) == "silent"
    assert await ask([Message.user("x")], max_tokens=5, on_text=ask.write) == "cd"
    assert ctx.said == [("a", False), ("b", False), ("c", True), ("d", False)]


async def test_a_question_is_passed_on_as_it_is() -> None:
    ctx = RecordingContext(Model(["ab"]))
    await ModelAsk(ctx)([Message.user("x")], max_tokens=5, schema={"type": "object"}, temperature=0.3, seed=7)  # pyright: ignore
    assert ctx.model.asked == [
        {"messages": [Message.user("x")], "max_tokens": 5, "schema": {"type": "object"}, "temperature": 0.3, "seed": 7}
    ]


async def test_an_answer_that_was_cut_is_asked_for_again_with_a_larger_limit() -> None:
    ctx = RecordingContext(Model([("half a sen", "length"), "half a sentence."]))
    ask = ModelAsk(ctx)  # pyright: ignore[reportArgumentType]
    assert await ask([Message.user("x")], max_tokens=5, on_text=ask.write) == "half a sentence."
    assert [asked["max_tokens"] for asked in ctx.model.asked] == [5, 20]
    assert [reset for text, reset in ctx.said if text == "h"] == [False, True]


async def test_an_answer_that_is_cut_again_is_no_answer() -> None:
    ctx = RecordingContext(Model([("half a sen", "length"), ("half a sentence and", "length")]))
    with pytest.raises(OctoError) as caught:
        await ModelAsk(ctx)([Message.user("x")], max_tokens=5)  # pyright: ignore[reportArgumentType]
    assert caught.value.code == "model_output_truncated"


async def test_what_is_whole_of_an_answer_may_suffice() -> None:
    ctx = RecordingContext(Model([("First.\n\nSecon", "length"), ("Fir", "length"), "First."]))
    ask = ModelAsk(ctx)  # pyright: ignore[reportArgumentType]
    assert await ask([Message.user("x")], max_tokens=5, suffices=has_whole_paragraph) == "First.\n\nSecon"
    assert await ask([Message.user("x")], max_tokens=5, suffices=has_whole_paragraph) == "First."


async def test_a_filtered_answer_is_no_answer() -> None:
    ctx = RecordingContext(Model([("The half that", "content_filter")]))
    with pytest.raises(OctoError) as caught:
        await ModelAsk(ctx)([Message.user("x")], max_tokens=5, suffices=lambda _: True)  # pyright: ignore
    assert caught.value.code == "model_output_filtered"
    assert len(ctx.model.asked) == 1


async def test_a_draft_that_was_cut_is_empty_and_one_in_a_closed_block_is_whole() -> None:
    block = "```python\nx = 1\n```\nThis"
    ask = ModelAsk(RecordingContext(Model([("x = ", "length"), ("x = ", "length"), (block, "length")])))  # pyright: ignore
    assert await ask_draft(ask, [Message.user("x")], max_tokens=5) == ""
    assert await ask_draft(ask, [Message.user("x")], max_tokens=5) == block
    failing = ModelAsk(RecordingContext(Model([("x", "content_filter")])))  # pyright: ignore
    with pytest.raises(OctoError):
        await ask_draft(failing, [Message.user("x")], max_tokens=5)


def test_constraints_stand_below_the_goal() -> None:
    assert goal_with_constraints(Task(goal=" Do it. ")) == "Do it."
    assert goal_with_constraints(Task(goal="Do it.", constraints=("quickly", "well"))) == "Do it.\n- quickly\n- well"


def test_notes_are_what_came_with_the_goal_and_what_was_found() -> None:
    task = Task(goal="x", context=TaskContext(text="Known. ", inputs={"s1": "Found.", "s2": " "}))
    assert collect_notes(task) == "Known.\n\nFound."
    assert len(collect_notes(Task(goal="x", context=TaskContext(text="y" * 100_000)))) == MAX_NOTES


@pytest.mark.parametrize(("model", "can"), [("embedded", False), ("embedded:x", False), ("openai:gpt-9", True)])
def test_a_providers_model_is_held_to_be_capable(model: str, can: bool) -> None:
    assert is_capable_model(read_settings({"OCTOLLM_MODEL": model}, ())) is can
