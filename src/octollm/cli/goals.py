"""A goal from input to result: check it and its files, submit it, and save the artifacts of its task."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import msgspec
from rich.console import Console
from rich.text import Text

from octollm.cli.following import follow_task
from octollm.cli.runtime import EXIT_DONE, EXIT_FAILED, EXIT_NOT_FOUND, print_json
from octollm.client import AsyncClient, AsyncTaskHandle
from octollm.client.files import name_paths
from octollm.contracts.api import TaskFailure, TaskView
from octollm.contracts.approvals import ApprovalPolicy
from octollm.contracts.media_types import file_kind, media_type_of
from octollm.contracts.task import MAX_FILE_BYTES, MAX_FILES, MAX_GOAL, Budget, TaskStatus, Usage
from octollm.documents.detection import detect_kind
from octollm.documents.model import DocumentError
from octollm.errors import OctoError, map_file_errors

SUBMIT_SECONDS = 1.2
"""How long an interrupted command waits for the id of the task that it is submitting."""
CANCEL_SECONDS = 1.0
"""How long an interrupted command waits for the cancellation of its task."""
RESULTS_FOLDER = "octollm-results"
_UNSAFE_CHARACTERS = re.compile(r'[\x00-\x1f<>:"|?*\\]')


@dataclass(frozen=True, slots=True)
class GoalFile:
    """A file that passed the checks for sending."""

    name: str
    content: bytes
    media_type: str


def validate_goal(goal: str) -> str:
    """Return the goal without surrounding white space. Raises ``goal_invalid`` when it is empty or too long."""
    text = goal.strip()
    if not text:
        raise OctoError('The goal is empty. Describe the goal: octollm run "GOAL".', code="goal_invalid")
    if len(text) > MAX_GOAL:
        raise OctoError(
            f"The goal has {len(text):,} characters; at most {MAX_GOAL:,} are allowed. Put the rest into a file and"
            " give it with --file.",
            code="goal_invalid",
        )
    return text


def read_goal_files(paths: Sequence[Path]) -> list[GoalFile]:
    """Read the files. Raises ``file_invalid`` naming the first that cannot be sent, with the reason.

    Two versions of a file in different folders are told apart by these: ``v1-offer.txt`` and ``v2-offer.txt``.
    """
    if len(paths) > MAX_FILES:
        raise _file_error(f"{len(paths)} files are too many: a goal may have {MAX_FILES}.")
    files = [replace(_read_file(path), name=name) for path, name in zip(paths, name_paths(paths), strict=True)]
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
        # Reading one byte past the limit detects a file that grew since stat(), and a pipe, which has no size.
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError as error:
        raise _file_error(f"There is no file {path}.") from error
    except OSError as error:
        raise _file_error(f"{path} cannot be read: {error.strerror}.") from error
    if len(content) > MAX_FILE_BYTES:
        raise _file_error(f"{path} has more than {MAX_FILE_BYTES // 2**20} MiB.")
    try:
        # What cannot be read in any case is refused before it is sent. Media are left to the installation, which knows
        # whether an arm of its own accepts them.
        detect_kind(path.name, content)
    except DocumentError as error:
        if file_kind(path.name) != "binary":
            raise _file_error(f"{path}: {error.detail}") from error
    return GoalFile(path.name, content, media_type_of(path.name))


def _file_error(detail: str) -> OctoError:
    return OctoError(detail, code="file_invalid")


class SavedArtifact(msgspec.Struct, frozen=True):
    """An artifact and the path of its copy."""

    name: str
    digest: str
    size: int
    media_type: str
    path: str


class TaskOutcome(msgspec.Struct, frozen=True):
    """The JSON document of `octollm run --json` and of ``result.json``."""

    task_id: str
    status: TaskStatus
    output: str
    artifacts: tuple[SavedArtifact, ...]
    usage: Usage
    error: TaskFailure | None = None
    notes: tuple[str, ...] = ()
    """What was assumed when the files were read, what the result does not cover, and what nobody checked."""
    found: bool = True
    """Whether the files have what the goal asks for. A task without it is completed, too."""


def results_folder(task_id: str, root: Path) -> Path:
    """Return the folder of a task's results under ``root``."""
    return root / RESULTS_FOLDER / sanitize_path(task_id).as_posix()


def sanitize_path(name: str) -> PurePosixPath:
    """Return ``name`` as a relative path inside its folder, without characters that a file system forbids."""
    parts = [_UNSAFE_CHARACTERS.sub("_", part) for part in name.replace("\\", "/").split("/")]
    # Parts of dots and spaces alone go: `..` would leave the folder.
    safe = [part[:120] for part in parts if part.strip(". ")]
    return PurePosixPath(*safe) if safe else PurePosixPath("unnamed")


async def save_outcome(handle: AsyncTaskHandle, task: TaskView, folder: Path) -> TaskOutcome:
    """Fetch the artifacts of a finished task, verify their digests, and save them with ``result.json`` in ``folder``.

    Raises the client's errors, ``file_invalid`` for content that does not match its digest, and ``home_unusable`` when
    the folder cannot be written.
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
    outcome = TaskOutcome(
        task.task_id, task.status, task.output, tuple(saved), task.usage, task.error, _collect_notes(task), task.found
    )
    await asyncio.to_thread(_write, folder / "result.json", msgspec.json.format(msgspec.json.encode(outcome)) + b"\n")
    return outcome


def _collect_notes(task: TaskView) -> tuple[str, ...]:
    notes = [f"{file.name}: {note}" for file in task.files for note in file.notes]
    notes += [note for step in task.steps if step.evidence is not None for note in step.evidence.notes]
    checks = [check for step in task.steps if step.evidence is not None for check in step.evidence.checks]
    notes += [f"not checked: {check.detail}" for check in checks if check.checked_by == "nobody"]
    return tuple(dict.fromkeys(notes))


def _unique_name(name: PurePosixPath, taken: set[PurePosixPath]) -> PurePosixPath:
    number, unique = 1, name
    while unique in taken:
        number += 1
        unique = name.with_name(f"{name.stem}-{number}{name.suffix}")
    taken.add(unique)
    return unique


def _write(path: Path, content: bytes) -> None:
    with map_file_errors(path, "written", code="home_unusable"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


@dataclass(frozen=True, slots=True)
class GoalRequest:
    """A goal with its files, budget and acceptance criteria."""

    goal: str
    files: Sequence[GoalFile] = ()
    budget: Budget = field(default_factory=Budget)
    criteria: Sequence[str] = ()
    approval: ApprovalPolicy = field(default_factory=ApprovalPolicy)


async def run_goal(
    client: AsyncClient,
    request: GoalRequest,
    console: Console,
    *,
    root: Path,
    as_json: bool = False,
    page_url: str = "",
) -> int:
    """Submit a goal, follow it, save its results under ``root`` and print them; return the exit code.

    ``console`` shows progress and outcome; with ``as_json`` the last line of standard output is one JSON object.
    Cancelling this call cancels the task.
    """
    # Uploaded before, and not by submit(): a cancelled upload leaves no task.
    files = [await client.upload((file.name, file.content)) for file in request.files]
    submission = asyncio.create_task(
        client.submit(
            request.goal, files=files, budget=request.budget, criteria=request.criteria, approval=request.approval
        )
    )
    try:
        # The shield keeps the response, which alone has the id to cancel by: the task may be stored already.
        task = await asyncio.shield(submission)
        console.print(Text.assemble(("Task ", "octo.title"), task.id))
        console.print(Text.assemble(("Goal ", "octo.title"), request.goal))
        final = await follow_task(client, task, console)
    except asyncio.CancelledError:
        await _cancel_submitted(submission, console)
        raise
    folder = results_folder(task.id, root)
    outcome = await save_outcome(task, final, folder)
    print_outcome(outcome, console, folder, page_url=page_url or f"{client.url}/")
    if as_json:
        print_json(outcome)
    if outcome.status != "completed":
        return EXIT_FAILED
    return EXIT_DONE if outcome.found else EXIT_NOT_FOUND


def print_outcome(outcome: TaskOutcome, console: Console, folder: Path, *, page_url: str) -> None:
    """Print a task's result, its saved artifacts and its usage; ``page_url`` is the address of the dashboard."""
    console.print()
    if outcome.status == "completed":
        # Otherwise the last update has shown the reason.
        console.print(Text("Result", "octo.title"))
        if not outcome.found:
            console.print(Text("The files do not have what the goal asks for.", "octo.warn"))
        console.print(Text(outcome.output.rstrip()))
        for note in outcome.notes:
            console.print(Text.assemble(("Note  ", "octo.title"), note))
        console.print()
    for artifact in outcome.artifacts:
        size = (f"  {artifact.size:,} bytes", "octo.quiet")
        console.print(Text.assemble(("Saved ", "octo.title"), _relative_path(Path(artifact.path)), size))
    console.print(Text.assemble(("All   ", "octo.title"), f"{_relative_path(folder)}/"))
    usage = outcome.usage
    console.print(
        Text.assemble(
            ("Used  ", "octo.title"),
            f"{usage.total_tokens:,} tokens ({usage.prompt_tokens:,} read, {usage.completion_tokens:,} written)",
        )
    )
    console.print(Text.assemble(("Page  ", "octo.title"), page_url))


def _relative_path(path: Path) -> str:
    """Return the path relative to the current folder if it is inside, else absolute."""
    cwd = Path.cwd()
    return str(path.relative_to(cwd) if path.is_relative_to(cwd) else path)


async def _cancel_submitted(submission: asyncio.Task[AsyncTaskHandle], console: Console) -> None:
    """Cancel the task of an interrupted command if the gateway still answers; the command ends either way."""
    try:
        async with asyncio.timeout(SUBMIT_SECONDS):
            task = await submission
        async with asyncio.timeout(CANCEL_SECONDS):
            await task.cancel()
    except (OctoError, TimeoutError):
        console.print(Text("Stopping; the task may still run: octollm task list shows it.", "octo.warn"))
    else:
        console.print(Text(f"Stopping; {task.id} is cancelled.", "octo.warn"))
