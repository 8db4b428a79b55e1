"""docs/arms.md is a story: its shell blocks run in order in one folder, its files are written, its programs run.

`<!-- test: story -->` runs a block in the folder where the one before left off, `<!-- test: file PATH -->` writes one
there, `<!-- test: run -->` runs a program by itself, and `<!-- test: skip, WHY -->` leaves one out. No installation and
no model is needed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
        assert re.fullmatch(r"story|run|file \S+|skip, .{12,}", mark), mark


def test_the_story_runs_from_its_beginning_to_its_end(tmp_path):
    folder, told = tmp_path, ""
    octollm = f'octollm() {{ {sys.executable} -m octollm "$@"; }}; pytest() {{ {sys.executable} -m pytest "$@"; }}\n'
    for mark, language, code in BLOCKS:
        if mark.startswith("file "):
            place = folder / mark.removeprefix("file ")
            assert place.exists(), "a file of the story takes the place of one that was made"
            place.write_text(code)
        elif mark == "story":
            assert language == "shell"
            told += done(["bash", "-euo", "pipefail", "-c", f"{octollm}{code}\npwd > '{tmp_path}/where'"], folder)
            folder = Path((tmp_path / "where").read_text().strip())
    assert folder.name == "translator"
    assert told.count("1 passed") == 2


@pytest.mark.parametrize(
    "code", PROGRAMS, ids=lambda code: re.search(r'Arm(?:\.from_agent)?\((?:agent, name=)?"(\w+)"', code)[1]
)
def test_a_program_runs(code, tmp_path):
    done([sys.executable, "-W", "error", "-c", code], tmp_path)
