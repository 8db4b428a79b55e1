"""The shape of the source: one name means one thing, one file holds one concept, and nothing is too long to read."""

from __future__ import annotations

import ast
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

SHARED_CLASSES: dict[str, str] = {
    "Tool": "an arm's author declares one by a type; in `llm` it is the message of OpenAI's chat format",
    "ToolCall": "an arm's author reads one; in `llm` it is the message of OpenAI's chat format",
}
"""Public class names that two modules may define, each with the reason."""

SMALL_FILES = {
    "octollm.__main__": "the program of `python -m octollm`",
    "octollm.cli.config": "one noun of the command line a file, loaded when it is used",
    "octollm.cli.entry": "the program of the command, which imports nothing before Ctrl-C is handled",
    "octollm.lazy_exports": "for packages, whose imports count as exports",
    "octollm.services.arms.coder.probe_program": "a program that is run in the sandbox",
    "octollm.services.arms.executor.runner_read": "a program that is run in the sandbox",
    "octollm.testing.system": "for tests of a whole installation, which an arm's author does not load",
    "octollm.testing.timing": "for tests",
}
"""Files under 80 lines with fewer than three importers, each with the reason."""


def structure() -> Any:
    loader = SourceFileLoader("structure", str(ROOT / "scripts/structure"))
    spec = spec_from_loader("structure", loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


SCRIPT = structure()
MODULES: dict[str, Path] = SCRIPT.read_modules(ROOT / "src")
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def test_no_two_public_classes_share_a_name() -> None:
    shared = SCRIPT.find_shared_classes(TREES)
    assert set(shared) == set(SHARED_CLASSES), shared


def test_no_file_is_too_long_to_read_in_one_sitting() -> None:
    lengths = {name: path.read_text(encoding="utf-8").count("\n") for name, path in MODULES.items()}
    assert {name: length for name, length in lengths.items() if length > SCRIPT.LARGE} == {}


def test_a_small_file_has_several_importers_or_a_reason() -> None:
    importers = SCRIPT.count_importers(TREES)
    small = {
        name
        for name, path in MODULES.items()
        if path.name != "__init__.py"
        and "migrations" not in name
        and path.read_text(encoding="utf-8").count("\n") < SCRIPT.SMALL
        and len(importers[name]) < 3
    }
    assert small == set(SMALL_FILES)
