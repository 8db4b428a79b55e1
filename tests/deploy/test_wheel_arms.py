"""What an author of arms gets: the built wheel, without the checkout, makes a new arm and runs the examples."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(path.parent for path in (ROOT / "examples").glob("*/test_*.py"))


def ran(command: list[str], folder: Path, **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "OCTOLLM_"))}
    done = subprocess.run(
        command, cwd=folder, env={**inherited, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Build the wheel, and unpack it where nothing of the checkout is."""
    if importlib.util.find_spec("hatchling") is None:
        if os.environ.get("CI"):
            pytest.fail("hatchling is needed in CI: pip install hatchling")
        pytest.skip("hatchling is not installed")
    built, place = tmp_path_factory.mktemp("built"), tmp_path_factory.mktemp("installed")
    ran([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(built)], ROOT)
    [wheel] = built.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(place)]
    ran([*pip, "--disable-pip-version-check", str(wheel)], built)
    return place


def test_it_is_the_wheel_that_is_tested(installed, tmp_path):
    said = ran([sys.executable, "-c", "import octollm; print(octollm.__file__)"], tmp_path, PYTHONPATH=str(installed))
    assert said.strip() == str(installed / "octollm" / "__init__.py")


def test_a_new_arm_comes_out_of_it(installed, tmp_path):
    ran([sys.executable, "-m", "octollm", "new", "arm", "word-smith"], tmp_path, PYTHONPATH=str(installed))
    pytest_of = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    assert "1 passed" in ran(pytest_of, tmp_path / "word-smith", PYTHONPATH=str(installed))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda folder: folder.name)
def test_an_example_runs_with_it(installed, example, tmp_path):
    copied = tmp_path / example.name
    copied.mkdir()
    for file in example.glob("*.py"):
        (copied / file.name).write_text(file.read_text())
    pytest_of = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    assert " passed" in ran(pytest_of, copied, PYTHONPATH=str(installed))
