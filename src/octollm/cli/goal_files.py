"""The files given with a goal, looked at before anything is sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from octollm.contracts.kinds import file_kind, media_type_of, suffix_of
from octollm.contracts.task import MAX_FILE_BYTES, MAX_FILES, MAX_GOAL
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
