"""The types of the API of arms, as pyright sees them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.timeout(300)  # a type checker reads all that it imports, on a busy machine
def test_a_type_checker_knows_calls_and_state():
    command = [sys.executable, "-m", "pyright", "--outputjson", str(HERE / "typed_calls.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=HERE.parents[1])
    report = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] == 1
    assert [f"{each['range']['start']['line'] + 1}: {each['message']}" for each in report["generalDiagnostics"]] == []
