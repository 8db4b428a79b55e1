"""docs/cli.md is what the program says of itself."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_reference_is_up_to_date():
    made = runpy.run_path(str(ROOT / "scripts" / "cli-reference"))["page"]()
    told = (ROOT / "docs" / "cli.md").read_text()
    assert told == made, "run: .venv/bin/python scripts/cli-reference > docs/cli.md"


def test_the_placeholders_of_usage_lines_have_one_style():
    usages = re.findall(r"(?m)^`octollm ([a-z -]+)((?: \S+)*)`$", (ROOT / "docs" / "cli.md").read_text())
    assert len(usages) > 50
    for command, rest in usages:
        for placeholder in rest.split():
            # Optional ones have brackets, and an id says of what.
            assert re.fullmatch(r"\[?[A-Z]+(_[A-Z]+)*(\.\.\.)?\]?", placeholder), (command, placeholder)
            assert placeholder.strip("[]") not in ("ID", "TASK"), (command, placeholder)
