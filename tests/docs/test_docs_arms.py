"""docs/arms.md is a story: its shell blocks run in order in one folder, its files are written, its programs run.

`<!-- test: story -->` runs a block in the folder where the one before left off, `<!-- test: file PATH -->` writes one
there, `<!-- test: run -->` runs a program by itself. `<!-- test: up -->` is what stays in one terminal while
`<!-- test: beside -->` is typed in another; there alone a scripted model answers.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import CommandLine
from scripts import default_reply

from octollm.testing import wait_until
from octollm.testing.fake_model import ScriptedReply, ScriptedRequest, scripted_model

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "arms.md"
_BLOCK = re.compile(r"(?ms)^<!-- test: (?P<mark>[^>]+) -->\n```(?P<language>shell|python)\n(?P<code>.*?)^```")
BLOCKS = [(match["mark"], match["language"], match["code"]) for match in _BLOCK.finditer(PAGE.read_text())]
PROGRAMS = [code for mark, _, code in BLOCKS if mark == "run"]


def done(command: list[str], folder: Path) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OCTOLLM_", "PYTEST_"))}
    ran = subprocess.run(
        command,
        cwd=folder,
        env={**environment, "PATH": path, "PYTHONPATH": str(ROOT / "src"), "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_every_block_says_how_it_is_tested():
    assert len(re.findall(r"(?m)^```(?:shell|python)$", PAGE.read_text())) == len(BLOCKS)
    for mark, _, _ in BLOCKS:
        assert re.fullmatch(r"story|run|up|beside|file \S+", mark), mark


def written(tmp_path: Path) -> tuple[Path, str]:
    """Carry the story out; return the folder where it ends, and what was printed."""
    folder, told = tmp_path, ""
    octollm = f'octollm() {{ {sys.executable} -m octollm "$@"; }}; pytest() {{ {sys.executable} -m pytest "$@"; }}\n'
    for mark, language, code in BLOCKS:
        if mark.startswith("file "):
            command_line = folder / mark.removeprefix("file ")
            assert command_line.exists(), "a file of the story takes the place of one that was made"
            command_line.write_text(code)
        elif mark == "story":
            assert language == "shell"
            told += done(["bash", "-euo", "pipefail", "-c", f"{octollm}{code}\npwd > '{tmp_path}/where'"], folder)
            folder = Path((tmp_path / "where").read_text().strip())
    return folder, told


def test_the_story_runs_from_its_beginning_to_its_end(tmp_path):
    folder, told = written(tmp_path)
    assert folder.name == "translator"
    assert told.count("1 passed") == 2


def reply(asked: ScriptedRequest) -> str | ScriptedReply:
    return "Der Arm winkt" if asked.last.startswith("Translate with") else default_reply(asked)


@pytest.mark.sandbox
@pytest.mark.timeout(120)
async def test_what_was_written_joins_and_is_chosen_for_a_goal(tmp_path):
    command_line = CommandLine(tmp_path, {"OCTOLLM_MODEL": "openai:scripted"})
    story, _ = written(command_line.work)
    terminals = {mark: shlex.split(line) for mark, _, code in BLOCKS for line in code.splitlines() if mark == "up"}
    beside = [shlex.split(line)[1:] for mark, _, code in BLOCKS for line in code.splitlines() if mark == "beside"]
    async with scripted_model(reply) as model:
        command_line.settings["OCTOLLM_MODEL_URL"] = model.url
        command_line.work = story
        up = await command_line.up(*terminals["up"][2:])

        async def served() -> bool:
            return (await command_line.run("arms", "translator")).code == 0

        try:
            await wait_until(served, description="the arm is registered", timeout=30, interval=0.2)
            listed, ran = [await command_line.run(*command) for command in beside]
        finally:
            stopped = await command_line.interrupt(up)
        assert "healthy" in listed.out
        assert ran.code == 0, ran.err
        assert "Der Arm winkt" in ran.out
        assert "Arm   translator on 127.0.0.1:" in stopped.out
        assert stopped.code == 130, stopped.err


@pytest.mark.parametrize(
    "code", PROGRAMS, ids=lambda code: re.search(r'Arm(?:\.from_agent)?\((?:agent, name=)?"(\w+)"', code)[1]
)
def test_a_program_runs(code, tmp_path):
    done([sys.executable, "-W", "error", "-c", code], tmp_path)
