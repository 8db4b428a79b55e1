"""`octollm config`: every setting, its value with secrets masked, and where it comes from."""

from __future__ import annotations

import os

import msgspec
import typer
from rich.text import Text

from octollm.cli.output import output
from octollm.cli.runtime import EXIT_DONE, AsJson, async_command, command_settings, print_json
from octollm.config import PREFIX, SETTING_SPECS
from octollm.contracts.services import SERVICES
from octollm.masking import MASK, mask_text

app = typer.Typer()


@app.command(rich_help_panel="Installation")
@async_command
async def config(as_json: AsJson = False) -> int:
    """Show every setting: its value (secrets masked) and where it comes from."""
    # Reading them refuses wrong values, as every start does.
    command_settings()
    rows = list_settings()
    if as_json:
        print_json(rows)
        return EXIT_DONE
    console = output()
    for row in rows:
        source = ("", "") if row.source == "default" else (f"  from the {row.source}", "octo.good")
        console.print(Text.assemble((row.name, "octo.title"), f" = {row.value}", source))
        console.print(Text(f"    {row.meaning.replace('`', '')}", "octo.quiet"))
    return EXIT_DONE


class SettingRow(msgspec.Struct, frozen=True):
    """One setting. ``source`` is ``environment`` or ``default``."""

    name: str
    value: str
    source: str
    meaning: str


def list_settings() -> list[SettingRow]:
    """Return every setting with its value, secrets masked."""
    rows: list[SettingRow] = []
    for spec in SETTING_SPECS.values():
        name = spec.variable
        variable = os.environ.get(name, "")
        # The default of a secret is empty, and of a URL only the password is secret: mask_text covers both.
        is_opaque = spec.secret and variable and "://" not in variable
        value = (MASK if is_opaque else mask_text(variable or spec.default)) or "(none)"
        rows.append(SettingRow(name, value, "environment" if variable else "default", spec.meaning))
    for service in SERVICES:
        name = f"{PREFIX}{service.upper()}_URL"
        variable = os.environ.get(name, "")
        if variable:
            rows.append(SettingRow(name, mask_text(variable), "environment", f"Where {service} answers."))
    return rows
