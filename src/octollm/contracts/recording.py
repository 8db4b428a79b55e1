"""Recordings of tasks: what a task was given and what its models answered, in a file from which it is replayed.

The file is JSON Lines. Each line is ``{"kind", "data", "sha256"}``; ``sha256`` is over the line before and this one, so
that a change is found at its line. The first line is the task, the last one is of the kind ``end``.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeVar

import msgspec

from octollm.contracts.api import TaskFailure
from octollm.contracts.approvals import ApprovalView
from octollm.contracts.attempts import AttemptView, TextExcerpt
from octollm.contracts.steering import Instruction
from octollm.contracts.task import ArmInfo, Artifact, ExecuteResult, Plan, StepStatus, Task, TaskStatus
from octollm.errors import FieldError, OctoError

FORMAT = "octollm-task-recording"
VERSION = 1
MAX_RECORDED_BYTES = 16 * 1024 * 1024
"""Bytes of model answers, and of step results, in one recording."""
MAX_FILE_CONTENT = 20 * 1024 * 1024
"""Bytes of one input file whose content is recorded."""
MAX_FILES_CONTENT = 64 * 1024 * 1024
"""Bytes of the contents of all input files."""
MAX_RECORDING = 256 * 1024 * 1024
"""Bytes of a recording's file."""

Kind = Literal["task", "step", "attempt", "model_call", "file", "end"]
T = TypeVar("T")


class RecordedStep(msgspec.Struct, frozen=True, omit_defaults=True):
    """A step, and its result once it completed."""

    step: str
    arm: str
    status: StepStatus
    result: ExecuteResult | None = None


class RecordedModelCall(msgspec.Struct, frozen=True, omit_defaults=True):
    """A model call that was answered whole.

    ``key`` is derived from the request and from the calls that led to it, so another request has another key.
    ``answer`` is the JSON of the completion.
    """

    key: str
    step: str
    model: str
    answer: str


class RecordedFile(msgspec.Struct, frozen=True, omit_defaults=True):
    """An input file. ``content`` is base64; without it ``missing`` says why it is not recorded."""

    name: str
    digest: str
    content: str = ""
    missing: str = ""

    def read(self) -> bytes:
        """Return the content."""
        return base64.b64decode(self.content, validate=True)


class TaskRecording(msgspec.Struct, frozen=True, omit_defaults=True):
    """A task with everything that its code decided by.

    ``model`` is the installation's setting, by which arms choose how to ask. ``scopes`` are those that the task had,
    ``arms`` those that the planner could choose from when the task was recorded. ``masked`` names the places where a
    secret was replaced, ``omitted`` what is not in the recording, and why.
    """

    task_id: str
    status: TaskStatus
    contract: Task
    octollm_version: str
    recorded_at: str
    model: str = ""
    scopes: str = ""
    plan: Plan | None = None
    replanned: bool = False
    output: TextExcerpt | None = None
    artifacts: tuple[Artifact, ...] = ()
    error: TaskFailure | None = None
    approvals: tuple[ApprovalView, ...] = ()
    instructions: tuple[Instruction, ...] = ()
    arms: tuple[ArmInfo, ...] = ()
    masked: tuple[str, ...] = ()
    omitted: tuple[str, ...] = ()
    steps: tuple[RecordedStep, ...] = ()
    attempts: tuple[AttemptView, ...] = ()
    model_calls: tuple[RecordedModelCall, ...] = ()


class _Header(msgspec.Struct, frozen=True):
    format: str
    version: int
    task: TaskRecording


class _End(msgspec.Struct, frozen=True):
    lines: int


class _Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    kind: Kind
    data: msgspec.Raw
    sha256: str


_TYPES: dict[Kind, Any] = {
    "task": _Header,
    "step": RecordedStep,
    "attempt": AttemptView,
    "model_call": RecordedModelCall,
    "file": RecordedFile,
    "end": _End,
}


def encode_recording(recording: TaskRecording, files: Sequence[RecordedFile]) -> Iterator[bytes]:
    """Yield the lines of a recording's file."""
    bare = msgspec.structs.replace(recording, steps=(), attempts=(), model_calls=())
    parts: tuple[tuple[Kind, Sequence[object]], ...] = (
        ("task", (_Header(FORMAT, VERSION, bare),)),
        ("step", recording.steps),
        ("attempt", recording.attempts),
        ("model_call", recording.model_calls),
        ("file", files),
        ("end", (_End(2 + len(recording.steps) + len(recording.attempts) + len(recording.model_calls) + len(files)),)),
    )
    before = ""
    for kind, values in parts:
        for value in values:
            data = msgspec.json.encode(value)
            before = _chain(before, kind, data)
            yield msgspec.json.encode(_Line(kind, msgspec.Raw(data), before)) + b"\n"


def decode_recording(data: bytes) -> tuple[TaskRecording, tuple[RecordedFile, ...]]:
    """Return the task and its input files. Raises ``recording_invalid`` with the line of the fault."""
    lines = data.split(b"\n")
    if not lines[-1]:
        lines.pop()
    entries: dict[Kind, list[Any]] = {kind: [] for kind in _TYPES}
    before = ""
    for number, text in enumerate(lines, 1):
        line = _decode(number, text, _Line)
        body = bytes(line.data)
        before = _chain(before, line.kind, body)
        if number == 1:
            # Before the digest: another version may make it in another way.
            _check_header(line, body)
        if before != line.sha256:
            raise _invalid(number, "The line or the one before it was changed: its digest does not match.")
        if entries["end"] or (line.kind == "task") != (number == 1):
            raise _invalid(number, "A recording has its task on the first line, and nothing after its last.")
        entries[line.kind].append(_decode(number, body, _TYPES[line.kind]))
        if line.kind == "file":
            _check_content(number, entries["file"][-1])
    if not entries["end"]:
        raise _invalid(max(1, len(lines)), "The recording is cut off: its last line is missing.")
    if entries["end"][0].lines != len(lines):
        raise _invalid(len(lines), "Lines are missing before the end of the recording.")
    steps, attempts, calls = (tuple(entries[kind]) for kind in ("step", "attempt", "model_call"))
    task: TaskRecording = entries["task"][0].task
    whole = msgspec.structs.replace(task, steps=steps, attempts=attempts, model_calls=calls)
    return whole, tuple(entries["file"])


def _chain(before: str, kind: str, data: bytes) -> str:
    return hashlib.sha256(f"{before}\n{kind}\n".encode() + data).hexdigest()


def _decode(number: int, data: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _invalid(number, f"The line is not that of a recording: {error}") from error


def _check_header(line: _Line, body: bytes) -> None:
    if line.kind != "task":
        raise _invalid(1, "The first line is not the task.")
    declared = _decode(1, body, dict[str, msgspec.Raw])
    if bytes(declared.get("format", b"")) != msgspec.json.encode(FORMAT):
        raise _invalid(1, "The file is not a recording of a task.")
    if bytes(declared.get("version", b"")) != msgspec.json.encode(VERSION):
        raise _invalid(1, f"The recording has another version; this one reads version {VERSION}.")


def _check_content(number: int, file: RecordedFile) -> None:
    try:
        body = file.read()
    except (ValueError, binascii.Error) as error:
        raise _invalid(number, "The content is not base64.") from error
    if not file.missing and hashlib.sha256(body).hexdigest() != file.digest:
        raise _invalid(number, "The content does not match the digest of the file.")


def _invalid(number: int, detail: str) -> OctoError:
    return OctoError(
        f"Line {number}: {detail}"[:600],
        code="recording_invalid",
        field_errors=(FieldError(f"/{number}", detail[:600]),),
    )
