"""What a task made, saved to a folder of its own."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path, PurePosixPath

import msgspec

from octollm.client import AsyncTaskHandle
from octollm.contracts.api import TaskFailure, TaskView
from octollm.contracts.task import TaskStatus, Usage
from octollm.errors import OctoError

RESULTS_FOLDER = "octollm-results"
_UNSAFE_CHARACTERS = re.compile(r'[\x00-\x1f<>:"|?*\\]')


class SavedArtifact(msgspec.Struct, frozen=True):
    """An artifact and where it was saved."""

    name: str
    digest: str
    size: int
    media_type: str
    path: str


class TaskOutcome(msgspec.Struct, frozen=True):
    """What `octollm run --json` prints last."""

    task_id: str
    status: TaskStatus
    output: str
    artifacts: tuple[SavedArtifact, ...]
    usage: Usage
    error: TaskFailure | None = None


def results_folder(task_id: str, root: Path) -> Path:
    """Return the folder of a task's results under ``root``."""
    return root / RESULTS_FOLDER / sanitize_path(task_id).as_posix()


def sanitize_path(name: str) -> PurePosixPath:
    """Return ``name`` as a relative path that stays inside its folder, with no character that a system forbids."""
    parts = [_UNSAFE_CHARACTERS.sub("_", part) for part in name.replace("\\", "/").split("/")]
    kept = [part[:120] for part in parts if part.strip(". ")]
    return PurePosixPath(*kept) if kept else PurePosixPath("unnamed")


async def save_outcome(handle: AsyncTaskHandle, task: TaskView, folder: Path) -> TaskOutcome:
    """Fetch the artifacts of a finished task, check their digests, and save them with ``result.json`` in ``folder``.

    Raises what the door answers, ``file_invalid`` for bytes that are not what their digest says, and
    ``home_unusable`` when the folder cannot be written.
    """
    saved: list[SavedArtifact] = []
    taken: set[PurePosixPath] = {PurePosixPath("result.json")}
    for artifact in task.artifacts:
        name = _unique_name(sanitize_path(artifact.name), taken)
        content = await handle.artifact(artifact)
        await asyncio.to_thread(_write, folder / name, content)
        saved.append(
            SavedArtifact(artifact.name, artifact.digest, artifact.size, artifact.media_type, str(folder / name))
        )
    outcome = TaskOutcome(task.task_id, task.status, task.output, tuple(saved), task.usage, task.error)
    await asyncio.to_thread(_write, folder / "result.json", msgspec.json.format(msgspec.json.encode(outcome)) + b"\n")
    return outcome


def _unique_name(name: PurePosixPath, taken: set[PurePosixPath]) -> PurePosixPath:
    number, free = 1, name
    while free in taken:
        number += 1
        free = name.with_name(f"{name.stem}-{number}{name.suffix}")
    taken.add(free)
    return free


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise OctoError(f"{path} cannot be written: {error.strerror}.", code="home_unusable") from error
