from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octollm.contracts.operations import RunRequest, RunResult
from octollm.contracts.task import ArmInfo, FileRef, Plan, PlanRequest, PlanStep, TaskContext
from octollm.errors import OctoError
from octollm.services.arms.planner.plan import MAX_STEPS, is_acyclic, make_plan, validate_plan
from octollm.services.arms.planner.service import plan_and_execute


class ScriptedPrompts:
    def __init__(self, *answers: object) -> None:
        self.answers = [answer if isinstance(answer, str) else json.dumps(answer) for answer in answers]
        self.prompts: list[str] = []
        self.schemas: list[dict[str, object] | None] = []

    async def __call__(
        self, messages, *, max_tokens, schema=None, temperature=0.0, seed=0, on_text=None, suffices=None
    ) -> str:
        self.prompts.append(messages[-1].content)
        self.schemas.append(schema)
        return self.answers.pop(0)


def _worded(*titles: str) -> dict[str, object]:
    return {"steps": [{"title": title, "criteria": ["It is right."]} for title in titles]}


def _request(goal: str, *files: str, arms: tuple[ArmInfo, ...] = ()) -> PlanRequest:
    return PlanRequest(goal, TaskContext(files=tuple(FileRef(name, digest="d") for name in files)), arms)


@pytest.mark.parametrize(
    ("goal", "files", "arms"),
    [
        ("Write a function add(a, b)", (), [("coder", ())]),
        ("Explain recursion", (), [("coder", ())]),
        ("How many rows?", ("a.csv", "b.parquet"), [("coder", ("a.csv", "b.parquet"))]),
        ("What is said of it?", ("a.md", "b.py", "README"), [("retriever", ("a.md", "b.py", "README"))]),
        (
            "What is it?",
            ("a.md", "b.csv"),
            [("retriever", ("a.md",)), ("coder", ("b.csv",)), ("retriever", ("a.md", "b.csv"))],
        ),
        ("Write unit tests for this module", ("a.py",), [("coder", ("a.py",))]),
    ],
)
async def test_code_chooses_the_arm(goal: str, files: tuple[str, ...], arms: list[tuple[str, tuple[str, ...]]]) -> None:
    plan = await make_plan(_request(goal, *files), ScriptedPrompts(_worded(*(f"Step for {arm}" for arm, _ in arms))))
    assert [(step.arm, step.files) for step in plan.steps] == arms
    assert all(step.goal == goal for step in plan.steps)
    is_joined = len(arms) == 3
    assert [step.depends_on for step in plan.steps] == ([(), ("s1",), ("s1", "s2")] if is_joined else [()] * len(arms))
    assert [step.title for step in plan.steps] == [f"Step for {arm}" for arm, _ in arms]
    assert plan.steps[0].acceptance_criteria == ("It is right.",)


@pytest.mark.parametrize("answer", ["prose", "{}", {"steps": []}, _worded("one", "two"), _worded(" ")])
async def test_plain_titles_where_the_model_gives_none(answer: object) -> None:
    plan = await make_plan(_request("How many rows?", "a.csv"), ScriptedPrompts(answer))
    assert (plan.steps[0].title, plan.steps[0].acceptance_criteria) == ("Query a.csv", ())


async def test_criteria_of_the_task_hold_for_every_step() -> None:
    request = PlanRequest("Explain x", acceptance_criteria=("short",))
    plan = await make_plan(request, ScriptedPrompts(_worded("Explain it")))
    assert plan.steps[0].acceptance_criteria == ("short", "It is right.")


@pytest.mark.parametrize(
    ("goal", "files", "code"),
    [(" ", (), "goal_invalid"), ("x" * 32_001, (), "goal_invalid"), ("What?", ("photo.png",), "file_invalid")],
)
async def test_what_cannot_be_planned(goal: str, files: tuple[str, ...], code: str) -> None:
    with pytest.raises(OctoError) as caught:
        await make_plan(_request(goal, *files), ScriptedPrompts())
    assert caught.value.code == code


async def test_an_arm_of_ones_own_takes_what_it_accepts() -> None:
    arms = (
        ArmInfo("looker", "Looks at pictures", accepts=("image/*",)),
        ArmInfo("translator", "Translates", accepts=("kind:translate",)),
    )
    plan = await make_plan(
        _request("What is it?", "photo.png", "a.md", arms=arms), ScriptedPrompts(_worded("Look", "Read it"))
    )
    assert [(step.arm, step.files) for step in plan.steps] == [("looker", ("photo.png",)), ("retriever", ("a.md",))]
    plan = await make_plan(_request("Please translate this", "a.md", arms=arms), ScriptedPrompts(_worded("Translate")))
    assert [(step.arm, step.files) for step in plan.steps] == [("translator", ("a.md",))]


def _step(name: str, arm: str, *needs: str, files: tuple[str, ...] = ()) -> dict[str, object]:
    return {
        "id": name,
        "title": f"Do {name}",
        "arm": arm,
        "goal": f"Do {name} well",
        "depends_on": list(needs),
        "files": list(files),
        "acceptance_criteria": [],
    }


async def test_a_capable_model_designs_the_plan() -> None:
    arms = (ArmInfo("translator", "Translates text"),)
    ask = ScriptedPrompts(
        {"steps": [_step("read it", "retriever", files=("a.md",)), _step("plan", "translator", "read it")]}
    )
    plan = await make_plan(_request("Translate the summary", "a.md", arms=arms), ask, is_capable=True)
    steps = [(step.id, step.arm, step.depends_on) for step in plan.steps]
    assert steps == [("s1", "retriever", ()), ("s2", "translator", ("s1",))]
    assert "translator: Translates text" in ask.prompts[0]
    assert "judge" not in ask.prompts[0]


async def test_a_designed_plan_is_mended_once_then_code_chooses() -> None:
    bad = {"steps": [_step("a", "coder", "b"), _step("b", "coder", "a")]}
    good = {"steps": [_step("a", "coder")]}
    ask = ScriptedPrompts(bad, good)
    assert len((await make_plan(_request("Explain x"), ask, is_capable=True)).steps) == 1
    assert "in a cycle" in ask.prompts[1]
    ask = ScriptedPrompts(bad, "prose", _worded("Explain it"))
    assert (await make_plan(_request("Explain x"), ask, is_capable=True)).steps[0].title == "Explain it"


async def test_why_an_earlier_plan_failed_is_told() -> None:
    ask = ScriptedPrompts({"steps": [_step("a", "coder")]})
    await make_plan(PlanRequest("Explain x", reasons=("it was too long",)), ask, is_capable=True)
    assert "it was too long" in ask.prompts[0]


@pytest.mark.parametrize(
    ("steps", "fault"),
    [
        ((), "0 steps"),
        (tuple(PlanStep(f"s{n}", "t", "coder", "g") for n in range(MAX_STEPS + 1)), "17 steps"),
        ((PlanStep("a", "t", "coder", "g"), PlanStep("a", "t", "coder", "g")), "used twice"),
        ((PlanStep("a", "t", "nobody", "g"),), "no arm 'nobody'"),
        ((PlanStep("a", "t", "coder", " "),), "goal"),
        ((PlanStep("", "t", "coder", "g"),), "id"),
        ((PlanStep("a", "t", "coder", "g", files=("b.md",)),), "no file 'b.md'"),
        ((PlanStep("a", "t", "coder", "g", depends_on=("z",)),), "is no step"),
        ((PlanStep("a", "t", "coder", "g", depends_on=("a",)),), "itself"),
        (
            (PlanStep("a", "t", "coder", "g", depends_on=("b",)), PlanStep("b", "t", "coder", "g", depends_on=("a",))),
            "cycle",
        ),
        ((PlanStep("a", "t" * 201, "coder", "g"),), "title"),
        ((PlanStep("a", "t", "coder", "g", acceptance_criteria=("c",) * 11),), "criteria"),
    ],
)
def test_faults_of_a_plan(steps: tuple[PlanStep, ...], fault: str) -> None:
    with pytest.raises(OctoError, match=fault) as caught:
        validate_plan(Plan(steps), (), ("a.md",))
    assert caught.value.code == "plan_invalid"


@given(st.dictionaries(st.integers(0, 8), st.sets(st.integers(0, 8), max_size=4), max_size=9))
def test_acyclic_means_that_an_order_exists(graph: dict[int, set[int]]) -> None:
    steps = [PlanStep(str(n), "t", "coder", "g", depends_on=tuple(map(str, needs))) for n, needs in graph.items()]

    def reaches_itself(start: int) -> bool:
        seen: set[int] = set()
        todo = list(graph[start])
        while todo:
            here = todo.pop()
            if here == start:
                return True
            if here not in seen:
                seen.add(here)
                todo.extend(graph.get(here, ()))
        return False

    assert is_acyclic(steps) == (not any(reaches_itself(n) for n in graph))


def _programs(*texts: str) -> dict[str, object]:
    return {"programs": [{"title": f"Step {text[:6]}", "program": text} for text in texts]}


async def test_programs_run_in_order_and_hand_on_their_files() -> None:
    seen: list[RunRequest] = []

    async def run(request: RunRequest) -> RunResult:
        seen.append(request)
        return RunResult(0, f"out {len(seen)}\n", "", files=(FileRef("made.txt", text="x"),))

    result = await plan_and_execute(
        "Do it", ScriptedPrompts(_programs("print(1)", "print(2)")), run, files=(FileRef("in.txt"),)
    )
    assert result.output == "1. Step print(\nout 1\n\n2. Step print(\nout 2"
    assert [file.name for file in seen[1].files] == ["in.txt", "made.txt", "program_2.py"]
    assert seen[1].command == ("program_2.py",)


@pytest.mark.parametrize(
    ("ended", "reason"),
    [
        (RunResult(1, "", "Traceback\nValueError: no"), "ValueError: no"),
        (RunResult(3, "", ""), "ended with 3"),
        (RunResult(-9, "", "", reason="timeout"), "timeout"),
        (RunResult(0, "", ""), "printed nothing"),
    ],
)
async def test_the_first_failure_ends_it(ended: RunResult, reason: str) -> None:
    async def run(request: RunRequest) -> RunResult:
        return ended

    with pytest.raises(OctoError, match=reason) as caught:
        await plan_and_execute("Do it", ScriptedPrompts(_programs("print(1)")), run)
    assert caught.value.code == "not_accepted"


@pytest.mark.parametrize("answer", ["prose", {"programs": []}, _programs("  ")])
async def test_no_program_is_a_failure(answer: object) -> None:
    async def run(request: RunRequest) -> RunResult:
        raise AssertionError

    with pytest.raises(OctoError) as caught:
        await plan_and_execute("Do it", ScriptedPrompts(answer), run)
    assert caught.value.code == "model_output_invalid"
