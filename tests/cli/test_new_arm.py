"""A new arm's package: what is in it, that its own test passes, and what is refused."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from octollm.cli.app import app
from octollm.cli.new import write_arm_package
from octollm.errors import OctoError

SOURCE = Path(__file__).parents[2] / "src"


def run(*arguments: str):
    return CliRunner().invoke(app, ["new", "arm", *arguments])


def test_its_own_test_passes_at_once(tmp_path):
    done = run("word-smith", "--dir", str(tmp_path))
    assert done.exit_code == 0, done.output
    folder = tmp_path / "word-smith"
    assert "pytest" in done.output
    assert tomllib.loads((folder / "pyproject.toml").read_text())["project"]["name"] == "word-smith"
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*") if path.is_file()) == [
        "README.md",
        "pyproject.toml",
        "src/word_smith/__init__.py",
        "src/word_smith/arm.py",
        "tests/test_word_smith.py",
    ]
    assert not [path for path in folder.rglob("*.*") if path.is_file() and "$" in path.read_text()]
    tested = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=folder,
        env={"PYTHONPATH": str(SOURCE), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert tested.returncode == 0, tested.stdout + tested.stderr
    assert "1 passed" in tested.stdout


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Translator", "begins with a letter"),
        ("../out", "begins with a letter"),
        ("planner", "reserved"),
        ("files", "reserved"),
        ("json", "would hide the Python module json"),
        ("class", "would hide"),
        ("octollm", "would hide"),
    ],
)
def test_a_name_that_cannot_be_is_refused(tmp_path, name, said):
    with pytest.raises(OctoError, match=said):
        write_arm_package(name, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert run(name, "--dir", str(tmp_path)).exit_code == 2


def test_what_is_there_is_left_alone(tmp_path):
    (tmp_path / "translator").mkdir()
    assert write_arm_package("translator", tmp_path).is_dir()
    with pytest.raises(OctoError, match="not empty"):
        write_arm_package("translator", tmp_path)
    (tmp_path / "weather").write_text("mine")
    with pytest.raises(OctoError, match="already exists"):
        write_arm_package("weather", tmp_path)
    assert (tmp_path / "weather").read_text() == "mine"


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OctoError, match="cannot be written"):
        write_arm_package("translator", tmp_path / "file")
