"""`octollm new arm`: a package with an arm and a test that passes."""

from __future__ import annotations

import keyword
import sys
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Annotated

import typer
from rich.text import Text

from octollm import __version__
from octollm.arm.validation import check_name
from octollm.cli.output import output
from octollm.cli.runtime import EXIT_DONE, async_command
from octollm.errors import ArmError, OctoError, map_file_errors

_TEMPLATES = {
    "pyproject.toml.in": "pyproject.toml",
    "README.md.in": "README.md",
    "package.py.in": "src/{module}/__init__.py",
    "arm.py.in": "src/{module}/arm.py",
    "test.py.in": "tests/test_{module}.py",
}
"""Each template and the path of its file in the package."""
_RESERVED_NAMES = frozenset({"octollm", "tests", "pytest"})

app = typer.Typer()
new_app = typer.Typer(name="new", help="Make a package to begin with.", no_args_is_help=True)
app.add_typer(new_app, rich_help_panel="Arms")


@new_app.callback()
def options() -> None:
    """Keep ``arm`` a subcommand: typer folds the only command of a group into the group."""


@new_app.command("arm")
@async_command
async def new_arm(
    name: Annotated[str, typer.Argument(help="The arm's name, e.g. translator.")],
    parent: Annotated[
        Path, typer.Option("--dir", help="The folder in which to create the package.", metavar="PATH", file_okay=False)
    ] = Path(),
) -> int:
    """Create a package with an arm and a passing test."""
    folder = write_arm_package(name, parent)
    console = output()
    console.print(Text.assemble(("Made ", "octo.title"), str(folder)))
    for command in (
        f"cd {folder}",
        "pip install -e '.[dev]'",
        "pytest",
        f"octollm up --arm {module_name(name)}.arm:arm",
    ):
        console.print(Text(f"  {command}", "octo.quiet"))
    return EXIT_DONE


def module_name(name: str) -> str:
    """Return the Python package of the arm called ``name``."""
    return name.replace("-", "_")


def write_arm_package(name: str, parent: Path) -> Path:
    """Write the package of an arm into a folder in ``parent`` and return that folder.

    Raises ``arm_invalid`` for a name that is invalid for an arm or a Python package, and ``invalid_parameter`` when the
    folder exists and is not empty or cannot be written.
    """
    check_name(name, built_in=False)
    module = module_name(name)
    if keyword.iskeyword(module) or module in sys.stdlib_module_names or module in _RESERVED_NAMES:
        raise ArmError(f"An arm with the name {name} would hide the Python module {module}; choose another name.")
    folder = parent / name
    rendered = {
        folder / place.format(module=module): _render(template, name=name, module=module)
        for template, place in _TEMPLATES.items()
    }
    with map_file_errors(folder, "written", code="invalid_parameter"):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise OctoError(
                f"{folder} already exists and is not empty; choose another folder with --dir.", code="invalid_parameter"
            )
        for path, text in rendered.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return folder


def _render(template: str, *, name: str, module: str) -> str:
    text = (files("octollm.cli") / "templates" / "arm" / template).read_text(encoding="utf-8")
    return Template(text).substitute(name=name, module=module, version=__version__)
