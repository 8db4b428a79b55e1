"""docs/operations.md has the tables that the declarations make."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "operation-tables"


def test_the_tables_are_up_to_date():
    page = (ROOT / "docs" / "operations.md").read_text()
    assert page == runpy.run_path(str(SCRIPT))["updated"](page), "run: .venv/bin/python scripts/operation-tables"


def test_a_page_without_the_markers_is_refused():
    with pytest.raises(ValueError, match="needs the lines"):
        runpy.run_path(str(SCRIPT))["updated"]("# Operations\n")
