"""The file of a recorded task: whole or refused, with the line of the fault."""

from __future__ import annotations

import base64
import hashlib

import msgspec
import pytest

from octollm.contracts.recording import (
    RecordedFile,
    RecordedModelCall,
    RecordedStep,
    TaskRecording,
    decode_recording,
    encode_recording,
)
from octollm.contracts.task import ExecuteResult, Task
from octollm.errors import OctoError

BODY = b"\x00a file\n"
FILE = RecordedFile("a.bin", hashlib.sha256(BODY).hexdigest(), base64.b64encode(BODY).decode())
RECORDING = TaskRecording(
    "task-1",
    "completed",
    Task("Write \x1b[31mred"),
    "1.0",
    "2026-01-01T00:00:00Z",
    steps=(RecordedStep("s1", "coder", "completed", ExecuteResult("done")),),
    model_calls=(RecordedModelCall("k1", "s1", "m", '{"a":1}'), RecordedModelCall("k2", "s1", "m", '{"a":2}')),
)


def encode(*files: RecordedFile) -> bytes:
    return b"".join(encode_recording(RECORDING, files or (FILE,)))


def refused(data: bytes) -> OctoError:
    with pytest.raises(OctoError) as caught:
        decode_recording(data)
    assert caught.value.code == "recording_invalid"
    return caught.value


def test_a_recording_is_read_as_it_was_written_and_sends_no_control_sequence() -> None:
    data = encode()
    assert decode_recording(data) == (RECORDING, (FILE,))
    assert FILE.read() == BODY
    assert b"\x1b" not in data


def test_a_file_that_is_cut_off_anywhere_is_refused_with_the_line() -> None:
    data = encode()
    ends = [index for index, byte in enumerate(data) if byte == ord("\n")]
    for cut in (0, 1, ends[0] - 1, ends[0], ends[0] + 1, ends[2] + 5, ends[-2], len(data) - 2):
        error = refused(data[:cut])
        assert error.detail.startswith(f"Line {max(1, data[:cut].rstrip(chr(10).encode()).count(10) + 1)}: "), cut
    # The last line break is not part of the recording.
    assert decode_recording(data[:-1])[0] == RECORDING


def test_every_changed_line_is_named() -> None:
    lines = encode().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        changed = [*lines]
        changed[number - 1] = line.replace(b"1", b"2", 1) if number > 1 else line.replace(b"Write", b"Wrote", 1)
        assert changed != lines
        assert refused(b"".join(changed)).field_errors[0].pointer == f"/{number}"
        gone = [*lines[: number - 1], *lines[number:]]
        assert refused(b"".join(gone)).field_errors[0].pointer == f"/{min(number, len(gone))}"
    swapped = [*lines[:2], lines[3], lines[2], *lines[4:]]
    assert refused(b"".join(swapped)).field_errors[0].pointer == "/3"
    assert "nothing after" in refused(b"".join([*lines, _line(lines[-1], "end", {"lines": 7})])).detail


def _line(before: bytes, kind: str, data: object) -> bytes:
    """Return a line that goes on from another one, with the right digest."""
    previous = msgspec.json.decode(before)["sha256"] if before else ""
    body = msgspec.json.encode(data)
    digest = hashlib.sha256(f"{previous}\n{kind}\n".encode() + body).hexdigest()
    return msgspec.json.encode({"kind": kind, "data": data, "sha256": digest}) + b"\n"


def test_other_files_and_versions_are_refused() -> None:
    for data in (b"", b"\n", b"{}", b"\xff\xfe", b"[" * 10_000, b'{"kind":"task"}'):
        assert refused(data).field_errors[0].pointer == "/1"
    assert "version" in refused(_line(b"", "task", {"format": "octollm-task-recording", "version": 2})).detail
    assert "not a recording" in refused(_line(b"", "task", {"format": "x", "version": 1})).detail
    assert "first line" in refused(_line(b"", "end", {"lines": 1})).detail


def test_the_content_of_a_file_has_its_digest() -> None:
    for content in ("AAAA", "not base64"):
        assert "content" in refused(encode(msgspec.structs.replace(FILE, content=content))).detail
    missing = RecordedFile("b", FILE.digest, missing="it is too large")
    assert decode_recording(encode(missing))[1] == (missing,)
