"""`octollm task export` and `replay`: a task as a file, and what the code of today decides differently."""

from __future__ import annotations

import asyncio
import base64
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from octollm import __version__
from octollm.cli.completion import complete_task
from octollm.cli.output import messages, output
from octollm.cli.runtime import EXIT_DONE, EXIT_FAILED, AsJson, async_command, command_settings, open_client, print_json
from octollm.client import APIError, AsyncClient
from octollm.clock import SystemClock, Uuid7Generator
from octollm.contracts.recording import (
    MAX_FILE_CONTENT,
    MAX_FILES_CONTENT,
    MAX_RECORDING,
    RecordedFile,
    TaskRecording,
    decode_recording,
    encode_recording,
)
from octollm.errors import FieldError, OctoError
from octollm.masking import mask_text

if TYPE_CHECKING:
    from octollm.installation.replay import ReplayReport

app = typer.Typer()


@app.command("export")
@async_command
async def export_task(
    task_id: Annotated[str, typer.Argument(help="The task's id.", autocompletion=complete_task)],
    to: Annotated[Path | None, typer.Option("--to", "-o", help="The file; by default TASK.jsonl.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if there is one.")] = False,
) -> int:
    """Write a task that has ended to a file, from which `octollm task replay` runs it again.

    The file has the goal, the input files, the plan, every attempt and the answers of the models, and no credentials.
    Recognised secrets in texts are masked; such a recording can be read, but not replayed.
    """
    path = to or Path(f"{task_id}.jsonl")
    if path.exists() and not overwrite:
        raise _file_error(f"{path} is there already: choose another with --to, or add --overwrite.")
    async with open_client(command_settings()) as client:
        recording = await client.task(task_id).recording()
        files = await _fetch_files(client, recording)
    lines = encode_recording(recording, files)
    await asyncio.to_thread(_write, path, lines)
    console = messages()
    for place in recording.masked:
        console.print(Text.assemble(("Masked ", "octo.warn"), f"a secret at {place}; the recording cannot be replayed"))
    for what in (*recording.omitted, *(f"{file.name}: {file.missing}" for file in files if file.missing)):
        console.print(Text.assemble(("Left out ", "octo.warn"), what))
    output().print(Text(f"{path}: {len(recording.attempts)} attempts, {len(recording.model_calls)} model answers"))
    return EXIT_DONE


@app.command("replay")
@async_command
async def replay_task(
    file: Annotated[Path, typer.Argument(help="A file that `octollm task export` wrote.")], as_json: AsJson = False
) -> int:
    """Run an exported task again in this process, and say where the code of today decides differently.

    The models' answers come from the file. Nothing is sent anywhere. Programs run in the sandbox again, and steps of
    your own arms keep their recorded results. The exit code is 0 if everything is the same and 1 if something differs.
    """
    recording, files = decode_recording(await asyncio.to_thread(_read, file))
    from octollm.installation.replay import replay_recording  # noqa: PLC0415  imports every service

    clock = SystemClock()
    report = await replay_recording(recording, files, clock=clock, ids=Uuid7Generator(clock), version=__version__)
    if as_json:
        print_json(report)
    else:
        _print_report(report)
    return EXIT_FAILED if report.differences else EXIT_DONE


async def _fetch_files(client: AsyncClient, recording: TaskRecording) -> list[RecordedFile]:
    found: list[RecordedFile] = []
    room = MAX_FILES_CONTENT
    for file in recording.contract.context.files:
        digest = file.digest or ""
        try:
            body = await client.download(digest)
        except APIError as error:
            found.append(RecordedFile(file.name, digest, missing=error.detail))
            continue
        room -= len(body)
        if len(body) > MAX_FILE_CONTENT or room < 0:
            found.append(RecordedFile(file.name, digest, missing=f"{len(body):,} bytes are past the bound"))
        elif mask_text(text := body.decode(errors="replace")) != text:
            found.append(RecordedFile(file.name, digest, missing="it contains a secret"))
        else:
            found.append(RecordedFile(file.name, digest, base64.b64encode(body).decode()))
    return found


def _write(path: Path, lines: Iterable[bytes]) -> None:
    """Write a file whole or not at all, readable for its owner alone: it has what the task was about."""
    try:
        handle, name = tempfile.mkstemp(prefix=".octollm-", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.writelines(lines)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise _file_error(f"{path} cannot be written: {error.strerror}.") from error


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_RECORDING + 1)
    except OSError as error:
        raise _file_error(f"{path} cannot be read: {error.strerror}.") from error
    if len(data) > MAX_RECORDING:
        raise _file_error(f"{path} has more than {MAX_RECORDING:,} bytes.")
    return data


def _file_error(detail: str) -> OctoError:
    return OctoError(detail, code="file_invalid", field_errors=(FieldError("", detail),))


def _print_report(report: ReplayReport) -> None:
    console = output()
    for note in report.notes:
        console.print(Text.assemble(("Note     ", "octo.warn"), note))
    for number, each in enumerate(report.differences, 1):
        console.print(Text.assemble((f"{number}. {each.place}: {each.member} ", "octo.bad"), f"({each.kind})"))
        console.print(Text.assemble(("   recorded ", "octo.quiet"), each.recorded))
        console.print(Text.assemble(("   today    ", "octo.quiet"), each.replayed))
    if not report.differences:
        console.print(Text(f"Same: {report.answered} model requests, and every decision.", "octo.good"))
