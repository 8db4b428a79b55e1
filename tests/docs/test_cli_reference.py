"""docs/cli.md is what the program says of itself."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_reference_is_up_to_date():
    made = runpy.run_path(str(ROOT / "scripts" / "cli-reference"))["page"]()
    told = (ROOT / "docs" / "cli.md").read_text()
    assert told == made, "run: .venv/bin/python scripts/cli-reference > docs/cli.md"
