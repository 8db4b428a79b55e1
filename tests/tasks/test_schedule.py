from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from octollm.contracts.task import Artifact, ExecuteResult, PlanStep
from octollm.tasks.ledger import MIN_COMPLETION_TOKENS, allocate_completion
from octollm.tasks.state import assemble_result, compute_progress, estimate_step_progress, find_ready_steps


@st.composite
def plans(draw: st.DrawFn) -> list[PlanStep]:
    count = draw(st.integers(1, 8))
    steps: list[PlanStep] = []
    for number in range(count):
        earlier = [step.id for step in steps]
        needs = draw(st.lists(st.sampled_from(earlier), unique=True, max_size=3)) if earlier else []
        steps.append(PlanStep(f"s{number}", f"Step {number}", "coder", "goal", depends_on=tuple(needs)))
    return steps


@given(plans(), st.randoms(use_true_random=False))
def test_every_plan_runs_to_its_end_in_an_order_that_its_dependencies_allow(
    steps: list[PlanStep], random: object
) -> None:
    done: set[str] = set()
    begun: set[str] = set()
    progress = 0.0
    while len(done) < len(steps):
        ready = find_ready_steps(steps, done, begun)
        assert ready or begun - done
        for step in ready:
            assert set(step.depends_on) <= done
            begun.add(step.id)
        done.add(random.choice(sorted(begun - done)))  # type: ignore[attr-defined]
        now = compute_progress(steps, done, {})
        assert progress <= now <= 99.0
        progress = now
    assert find_ready_steps(steps, done, begun) == []


@given(plans(), st.dictionaries(st.text(max_size=3), st.floats(0, 200)))
def test_progress_stays_in_its_bounds(steps: list[PlanStep], within: dict[str, float]) -> None:
    assert 10.0 <= compute_progress(steps, set(), within) <= 99.0


@given(st.integers(0, 10**7), st.integers(0, 10**7))
def test_an_estimate_rises_and_never_says_done(one: int, other: int) -> None:
    low, high = sorted((one, other))
    assert 0 <= estimate_step_progress(low) <= estimate_step_progress(high) < 95.0


def test_the_result_is_that_of_the_last_steps() -> None:
    steps = [
        PlanStep("a", "First", "coder", "a"),
        PlanStep("b", "Second", "coder", "b", depends_on=("a",)),
        PlanStep("c", "Third", "coder", "c"),
    ]
    results = {
        "a": ExecuteResult("A", (Artifact("hidden.txt", "0", 1, "text/plain"),)),
        "b": ExecuteResult("B", (Artifact("out.txt", "1", 1, "text/plain"),)),
        "c": ExecuteResult("C", (Artifact("out.txt", "2", 1, "text/plain"),)),
    }
    output, artifacts = assemble_result(steps, results)
    assert output == "## Second\n\nB\n\n## Third\n\nC"
    assert [(artifact.name, artifact.digest) for artifact in artifacts] == [("out.txt", "1"), ("c-out.txt", "2")]
    assert assemble_result(steps[:2], results)[0] == "B"


@given(st.integers(-100, 100_000), st.integers(0, 8), st.integers(0, 50_000), st.none() | st.integers(1, 50_000))
def test_what_is_granted_never_exceeds_what_is_left(left: int, steps: int, prompt: int, wanted: int | None) -> None:
    granted = allocate_completion(remaining=left, open_steps=steps, prompt=prompt, requested=wanted)
    if granted is None:
        assert left // max(1, steps) - prompt < MIN_COMPLETION_TOKENS
    else:
        assert prompt + granted <= left
        assert wanted is None or granted <= wanted
