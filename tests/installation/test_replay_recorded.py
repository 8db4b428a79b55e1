"""A real task is recorded, and replayed by the same code and by a changed one."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from anyio.from_thread import start_blocking_portal
from rich.console import Console
from scripts import SALES, default_reply

from octollm.cli import task_recordings
from octollm.client import APIError, connect_sync
from octollm.clock import SystemClock, Uuid7Generator
from octollm.contracts.recording import RecordedFile, TaskRecording, decode_recording, encode_recording
from octollm.errors import OctoError
from octollm.installation.replay import ReplayReport, replay_recording
from octollm.services.arms.coder import data
from octollm.services.arms.judge import acceptance
from octollm.testing.fake_model import ScriptedReply, ScriptedRequest, scripted_model
from octollm.testing.system import installation

pytestmark = pytest.mark.sandbox
GOAL = "How many rows have amount > 100, and their total?"
CLOCK = SystemClock()
SECRET = "octo_0123456789abcdef"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, bytes]]:
    """Run three tasks, and return their recordings as files."""
    found: dict[str, bytes] = {}

    def reply(asked: ScriptedRequest) -> str | ScriptedReply:
        return ScriptedReply(error_status=400) if "tigers" in str(asked.messages) else default_reply(asked)

    with start_blocking_portal() as portal, portal.wrap_async_context_manager(scripted_model(reply)) as model:
        settings = {"OCTOLLM_MODEL": "openai:scripted", "OCTOLLM_MODEL_URL": model.url}
        home = tmp_path_factory.mktemp("recorded") / "home"
        with (
            portal.wrap_async_context_manager(installation(home, environment=settings)) as system,
            connect_sync(system.gateway_url, system.local_key) as octo,
        ):
            sales = [("sales.csv", SALES)]
            for name, goal, arm in (
                ("data", GOAL, None),
                ("failed", "Write a poem about tigers", "coder"),
                ("secret", f"Run the program with {SECRET}", "executor"),
            ):
                files = sales if name == "data" else [("main.py", "print(42)")] if name == "secret" else []
                task = octo.submit(goal, files=files, arm=arm)
                if name == "secret":
                    with pytest.raises(APIError, match="state_conflict"):
                        task.recording()
                for _ in task.updates():
                    pass
                recording = task.recording()
                contents = [
                    RecordedFile(each.name, digest, base64.b64encode(octo.download(digest)).decode())
                    for each in recording.contract.context.files
                    if (digest := each.digest)
                ]
                found[name] = b"".join(encode_recording(recording, contents))
        yield found


async def replay(data: bytes) -> ReplayReport:
    return await replay_recording(
        *decode_recording(data), clock=CLOCK, ids=Uuid7Generator(CLOCK), version="of the test"
    )


def show(report: ReplayReport, monkeypatch: pytest.MonkeyPatch) -> str:
    console = task_recordings.output()
    assert isinstance(console, Console)
    monkeypatch.setattr(task_recordings, "output", lambda: console)
    with console.capture() as shown:
        task_recordings._print_report(report)
    return shown.get()


async def test_the_same_code_decides_the_same(recorded: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    report = await replay(recorded["data"])
    recording, _ = decode_recording(recorded["data"])
    assert (report.differences, report.notes) == ((), ())
    assert report.answered == len(recording.model_calls) >= 3
    assert "Same" in show(report, monkeypatch)


async def test_a_changed_prompt_is_named_at_its_step(
    recorded: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "_SQL_PROMPT", data._SQL_PROMPT + " Be quick.")
    report = await replay(recorded["data"])
    assert [(each.kind, each.place) for each in report.differences] == [("model_request", "step s1, attempt 1")]
    assert "total" in report.differences[0].replayed
    # The texts of a recording are anybody's.
    marked = msgspec.structs.replace(report.differences[0], replayed="\x1b]0;title\x07\u202e")
    text = show(msgspec.structs.replace(report, differences=(marked,), notes=("\x1b[2J",)), monkeypatch)
    assert not {"\x1b", "\x07", "\u202e"} & set(text)
    assert "step s1, attempt 1" in text


async def test_a_changed_rule_of_the_judge_is_named_at_its_step(
    recorded: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_args: object) -> tuple[list[str], int]:
        return ["No total is good enough."], 1

    monkeypatch.setattr(acceptance, "check_data", refuse)
    report = await replay(recorded["data"])
    [found] = report.differences
    assert (found.kind, found.place, found.member) == ("verdict", "step s1, attempt 1", "accepted")
    assert (found.recorded, found.replayed) == ("true", "false")


async def test_an_error_of_the_model_stands_for_what_was_not_recorded(recorded: dict[str, bytes]) -> None:
    recording, _ = decode_recording(recorded["failed"])
    assert (recording.status, recording.error and recording.error.code) == ("failed", "model_failed")
    report = await replay(recorded["failed"])
    assert report.differences == ()
    assert "how the model failed is not recorded" in report.notes[0]


async def test_secrets_are_masked_and_what_is_incomplete_is_not_replayed(recorded: dict[str, bytes]) -> None:
    assert SECRET.encode() not in recorded["secret"]
    recording, files = decode_recording(recorded["secret"])
    assert "/contract/goal" in recording.masked
    with pytest.raises(OctoError, match="masked at"):
        await replay(recorded["secret"])
    whole: TaskRecording = msgspec.structs.replace(recording, masked=())
    for incomplete in (
        b"".join(encode_recording(whole, ())),
        b"".join(encode_recording(msgspec.structs.replace(whole, omitted=("a model answer",)), files)),
    ):
        with pytest.raises(OctoError, match="cannot be replayed") as caught:
            await replay(incomplete)
        assert caught.value.code == "recording_invalid"
    for credential in (b"local-user", b"Bearer", b'"cred"'):
        assert not any(credential in each for each in recorded.values())


def test_files_are_private_and_never_replaced_unasked(tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    task_recordings._write(path, [b"one\n", b"two\n"])
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"one\ntwo\n", 0o600)

    def broken() -> Iterator[bytes]:
        yield b"three"
        raise OctoError("It breaks off.")

    with pytest.raises(OctoError, match="breaks off"):
        task_recordings._write(path, broken())
    assert [each.name for each in tmp_path.iterdir()] == ["task.jsonl"]
    assert path.read_bytes() == b"one\ntwo\n"
