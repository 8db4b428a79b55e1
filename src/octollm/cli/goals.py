"""A goal from input to result: check it and its files, submit, follow the task, save its artifacts."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import msgspec
from rich.console import Console
from rich.text import Text

from octollm.cli.progress import create_view
from octollm.cli.runtime import EXIT_DONE, EXIT_FAILED
from octollm.client import AsyncClient, AsyncTaskHandle
from octollm.contracts.api import TaskFailure, TaskView
from octollm.contracts.media_types import file_kind, media_type_of, suffix_of
from octollm.contracts.task import MAX_FILE_BYTES, MAX_FILES, MAX_GOAL, Budget, TaskStatus, Usage
from octollm.errors import OctoError

_PARQUET = b"PAR1"


@dataclass(frozen=True, slots=True)
class GoalFile:
    """A file that may be sent."""

    name: str
    content: bytes
    media_type: str


def validate_goal(goal: str) -> str:
    """Return the goal without the space around it. Raises ``goal_invalid``."""
    text = goal.strip()
    if not text:
        raise OctoError('The goal is empty. Say what is to be done: octollm run "GOAL".', code="goal_invalid")
    if len(text) > MAX_GOAL:
        raise OctoError(
            f"The goal has {len(text):,} characters; at most {MAX_GOAL:,} are allowed. Put the rest into a file and"
            " give it with --file.",
            code="goal_invalid",
        )
    return text


def read_goal_files(paths: Sequence[Path]) -> list[GoalFile]:
    """Read every file. Raises ``file_invalid`` naming the first that cannot be sent, and why."""
    if len(paths) > MAX_FILES:
        raise _file_error(f"{len(paths)} files are too many: a goal may have {MAX_FILES}.")
    files = [_read_file(path) for path in paths]
    names: set[str] = set()
    for file in files:
        if file.name in names:
            raise _file_error(f"Two files are called {file.name}. Rename one: the names tell them apart.")
        names.add(file.name)
    return files


def _read_file(path: Path) -> GoalFile:
    try:
        if path.is_dir():
            raise _file_error(f"{path} is a folder. Give its files one by one: --file A --file B.")
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise _file_error(f"{path} has {size / 2**20:,.1f} MiB; a file may have {MAX_FILE_BYTES // 2**20} MiB.")
        # One byte more than is allowed tells of a file that grew, or that has no size (a pipe).
        with path.open("rb") as opened:
            content = opened.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError as error:
        raise _file_error(f"There is no file {path}.") from error
    except OSError as error:
        raise _file_error(f"{path} cannot be read: {error.strerror}.") from error
    if len(content) > MAX_FILE_BYTES:
        raise _file_error(f"{path} has more than {MAX_FILE_BYTES // 2**20} MiB.")
    _validate_content(path, content)
    return GoalFile(path.name, content, media_type_of(path.name))


def _validate_content(path: Path, content: bytes) -> None:
    if suffix_of(path.name) == ".parquet":
        if not (content.startswith(_PARQUET) and content.endswith(_PARQUET)):
            raise _file_error(f"{path} is called .parquet and is no Parquet file.")
        return
    # Whether an arm reads what is neither text nor table, the installation knows.
    if file_kind(path.name, content) != "binary" and not _is_utf8(content):
        raise _file_error(
            f"{path} is called a text, and has other bytes than text in UTF-8. Convert it, or give it the suffix that"
            " it should have."
        )


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return b"\x00" not in content


def _file_error(detail: str) -> OctoError:
    return OctoError(detail, code="file_invalid")


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


CANCEL_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class GoalRequest:
    """What is asked for."""

    goal: str
    files: Sequence[GoalFile] = ()
    budget: Budget = field(default_factory=Budget)
    criteria: Sequence[str] = ()


async def submit_goal(octo: AsyncClient, request: GoalRequest) -> AsyncTaskHandle:
    """Send the files, then the goal; return the accepted task."""
    files = [(file.name, file.content) for file in request.files]
    return await octo.submit(request.goal, files=files, budget=request.budget, criteria=request.criteria)


async def follow_task(task: AsyncTaskHandle, console: Console) -> TaskView:
    """Show a task until it ends; return it as it ended."""
    with create_view(console) as view:
        async with contextlib.aclosing(task.updates()) as updates:
            async for update in updates:
                view.show(update)
    return await task.wait()


async def print_updates(task: AsyncTaskHandle) -> TaskView:
    """Print a task's updates until it ends, one line of JSON each; return it as it ended."""
    async with contextlib.aclosing(task.updates()) as updates:
        async for update in updates:
            print(msgspec.json.encode(update).decode(), flush=True)
    return await task.wait()


async def run_goal(
    octo: AsyncClient, request: GoalRequest, console: Console, *, root: Path, as_json: bool = False, page_url: str = ""
) -> int:
    """Submit a goal, follow it, save its results under ``root`` and print them; return the exit code.

    ``console`` gets what a person reads; with ``as_json`` standard output gets one JSON object, last. Cancelling
    cancels the task.
    """
    task = await submit_goal(octo, request)
    console.print(Text.assemble(("Task ", "octo.title"), task.id))
    console.print(Text.assemble(("Goal ", "octo.title"), request.goal))
    try:
        ended = await follow_task(task, console)
    except asyncio.CancelledError:
        console.print(Text(f"Stopping; {task.id} is cancelled.", "octo.warn"))
        await _cancel(task)
        raise
    folder = results_folder(task.id, root)
    outcome = await save_outcome(task, ended, folder)
    print_outcome(outcome, console, folder, page_url=page_url or f"{octo.transport.url}/")
    if as_json:
        print(msgspec.json.encode(outcome).decode(), flush=True)
    return EXIT_DONE if outcome.status == "completed" else EXIT_FAILED


def print_outcome(outcome: TaskOutcome, console: Console, folder: Path, *, page_url: str) -> None:
    """Print how a task ended and where to find what it made; ``page`` is where to look at it."""
    console.print()
    if outcome.status == "completed":
        # Why it did not complete was told as its last update.
        console.print(Text("Result", "octo.title"))
        console.print(Text(outcome.output.rstrip()))
        console.print()
    for artifact in outcome.artifacts:
        size = (f"  {artifact.size:,} bytes", "octo.quiet")
        console.print(Text.assemble(("Saved ", "octo.title"), _relative_path(Path(artifact.path)), size))
    console.print(Text.assemble(("All   ", "octo.title"), f"{_relative_path(folder)}/"))
    used = outcome.usage
    console.print(
        Text.assemble(
            ("Used  ", "octo.title"),
            f"{used.total_tokens:,} tokens ({used.prompt_tokens:,} read, {used.completion_tokens:,} written)",
        )
    )
    console.print(Text.assemble(("Page  ", "octo.title"), page_url))


def _relative_path(path: Path) -> str:
    """Return a path as it is shortest from here."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


async def _cancel(task: AsyncTaskHandle) -> None:
    """Cancel the task of an interrupted command, if the door still answers; the command ends either way."""
    with contextlib.suppress(OctoError, TimeoutError):
        async with asyncio.timeout(CANCEL_SECONDS):
            await task.cancel()
