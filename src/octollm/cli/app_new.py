"""The commands that make something to begin with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

new_app = typer.Typer(name="new", help="Make a package to begin with.", no_args_is_help=True)


@new_app.callback()
def kinds() -> None:
    """Keep the kind a word of its own: there may be others."""


@new_app.command("arm")
def new_arm(
    name: Annotated[str, typer.Argument(help="The arm's name, e.g. translator.")],
    parent: Annotated[
        Path, typer.Option("--dir", help="Make its folder in this one.", metavar="PATH", file_okay=False)
    ] = Path(),
) -> None:
    """Make a package with an arm and a test that passes."""
    from octollm.cli.new_arm import new_arm_command  # noqa: PLC0415

    raise typer.Exit(new_arm_command(name, parent))
