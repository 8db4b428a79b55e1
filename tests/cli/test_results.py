"""Results are saved inside their folder, whatever an arm calls its files."""

from __future__ import annotations

import hashlib
from pathlib import Path, PurePosixPath

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octollm.cli.goals import results_folder, sanitize_path, save_outcome
from octollm.client import AsyncTaskHandle
from octollm.contracts.api import StepView, TaskView
from octollm.contracts.task import Artifact, Check, Evidence, FileRef, Usage
from octollm.contracts.task_operations import TASK_ARTIFACT
from octollm.errors import OctoError

TASK = TaskView("task-" + "0" * 32, "completed", "goal", 100.0, 9, "", "", output="done", usage=Usage(3, 4, 0.0))


@given(st.text(max_size=60) | st.sampled_from(["../../etc/passwd", "/etc/passwd", "..", ".", "", "a//b", "C:\\x\\y"]))
def test_a_name_stays_inside(name):
    safe = sanitize_path(name)
    assert not safe.is_absolute()
    assert ".." not in safe.parts
    assert safe.parts
    assert (Path("/root/folder") / safe).resolve().is_relative_to("/root/folder")


def test_ordinary_names_stay_as_they_are():
    assert sanitize_path("src/slugify.py") == PurePosixPath("src/slugify.py")


class FakeTransport:
    """Answers artifacts from a dictionary of bytes by digest."""

    def __init__(self, *contents: bytes) -> None:
        self.stored = {hashlib.sha256(content).hexdigest(): content for content in contents}

    async def call(self, operation, *, task_id, digest):
        assert operation is TASK_ARTIFACT
        assert task_id == TASK.task_id
        return self.stored[digest]


def result_of(transport):
    return AsyncTaskHandle(transport, TASK.task_id)


def artifact(name, content):
    return Artifact(name, hashlib.sha256(content).hexdigest(), len(content), "text/plain")


async def test_artifacts_and_the_result_are_saved(tmp_path):
    made = (artifact("a/x.py", b"one"), artifact("a/x.py", b"two"), artifact("result.json", b"three"))
    task = msgspec.structs.replace(TASK, artifacts=made)
    outcome = await save_outcome(result_of(FakeTransport(b"one", b"two", b"three")), task, tmp_path)
    assert (tmp_path / "a/x.py").read_bytes() == b"one"
    assert (tmp_path / "a/x-2.py").read_bytes() == b"two"
    assert (tmp_path / "result-2.json").read_bytes() == b"three"
    saved = msgspec.json.decode((tmp_path / "result.json").read_bytes())
    assert saved["task_id"] == TASK.task_id
    assert saved["status"] == "completed"
    assert saved["output"] == "done"
    assert [Path(item["path"]).read_bytes() for item in saved["artifacts"]] == [b"one", b"two", b"three"]
    assert saved["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "cost_usd": 0.0}
    assert outcome.artifacts[0].name == "a/x.py"


async def test_the_outcome_says_what_was_assumed_and_what_nobody_checked(tmp_path):
    checks = (Check("tests", True, "12 passed"), Check("unchecked", False, "whether it is kind", checked_by="nobody"))
    steps = tuple(
        StepView(name, name, "coder", "completed", 1, evidence=Evidence("text", checks=checks)) for name in ("s1", "s2")
    )
    files = (FileRef("a.txt", digest="0" * 64, notes=("read as Windows-1252",)),)
    task = msgspec.structs.replace(TASK, steps=steps, files=files)
    outcome = await save_outcome(result_of(FakeTransport()), task, tmp_path)
    assert outcome.notes == ("a.txt: read as Windows-1252", "not checked: whether it is kind")


async def test_bytes_that_are_not_the_digests_are_refused(tmp_path):
    wrong = artifact("x", b"right")
    transport = FakeTransport()
    transport.stored[wrong.digest] = b"wrong"
    with pytest.raises(OctoError, match="did not arrive whole"):
        await save_outcome(result_of(transport), msgspec.structs.replace(TASK, artifacts=(wrong,)), tmp_path)
    assert not (tmp_path / "x").exists()


async def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OctoError, match="cannot be written"):
        await save_outcome(result_of(FakeTransport()), TASK, tmp_path / "file")


def test_the_folder_is_named_after_the_task(tmp_path):
    assert results_folder("task-1", tmp_path) == tmp_path / "octollm-results" / "task-1"
    assert results_folder("../x", tmp_path).is_relative_to(tmp_path / "octollm-results")
