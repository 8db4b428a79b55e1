"""The commands of the checkout: what they say, and that they need nothing when nothing changed."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True, check=False, timeout=60
    )


def test_help_is_the_default_and_names_every_target():
    text = (ROOT / "Makefile").read_text()
    told = set(re.findall(r"(?m)^([a-z-]+):.*## ", text))
    assert told >= {"help", "setup", "demo", "test", "lint", "clean"}
    for command in (["make"], ["make", "help"]):
        shown = run(*command).stdout
        assert all(re.search(rf"(?m)^  {target} ", shown) for target in told), shown


def test_a_goal_reaches_the_command_as_it_is():
    shown = run("make", "-n", "demo", GOAL='say "hi" to $USER; rm -rf x').stdout
    assert "rm -rf" not in shown
    assert '"$GOAL"' in shown


@pytest.mark.parametrize("script", ["scripts/setup", "scripts/test", ".ci/run"])
def test_scripts_are_strict_and_can_be_run(script):
    path = ROOT / script
    assert os.access(path, os.X_OK)
    assert "set -euo pipefail" in path.read_text()
    assert run("bash", "-n", script).returncode == 0


def test_setup_says_what_to_do_without_python(tmp_path):
    done = run("scripts/setup", PYTHON=str(tmp_path / "python3"), VENV=str(tmp_path / "venv"))
    assert done.returncode == 1
    assert "Install Python 3.11 or newer" in done.stderr


def test_setup_refuses_an_old_python(tmp_path):
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.2 && exit 0\nexit 1\n')
    old.chmod(0o755)
    done = run("scripts/setup", PYTHON=str(old), VENV=str(tmp_path / "venv"))
    assert done.returncode == 1
    assert "Python 3.9.2 is too old" in done.stderr
    assert not (tmp_path / "venv").exists()
