"""`octollm config`: every setting, its value with secrets masked, and where it comes from."""

from __future__ import annotations

import os

import msgspec
from rich.text import Text

from octollm.cli.output import output
from octollm.cli.runtime import EXIT_DONE, command_settings, run_command
from octollm.config import PREFIX, SETTING_SPECS
from octollm.contracts.services import SERVICES
from octollm.telemetry.masking import MASK, mask_text


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
        given = os.environ.get(name, "")
        value = given or spec.default
        # A secret's default is none: it may be shown.
        shown = (MASK if spec.secret and given and "://" not in given else mask_text(value)) or "(none)"
        rows.append(SettingRow(name, shown, "environment" if given else "default", spec.meaning))
    for service in SERVICES:
        name = f"{PREFIX}{service.upper()}_URL"
        given = os.environ.get(name, "")
        if given:
            rows.append(SettingRow(name, mask_text(given), "environment", f"Where {service} answers."))
    return rows


def config_command(*, as_json: bool) -> int:
    """Print every setting. A wrong one is refused, as at a start."""

    async def work() -> int:
        command_settings()
        rows = list_settings()
        if as_json:
            print(msgspec.json.encode(rows).decode())
            return EXIT_DONE
        console = output()
        for row in rows:
            source = ("", "") if row.source == "default" else (f"  from the {row.source}", "octo.good")
            console.print(Text.assemble((row.name, "octo.title"), f" = {row.value}", source))
            console.print(Text(f"    {row.meaning.replace('`', '')}", "octo.quiet"))
        return EXIT_DONE

    return run_command(work)
