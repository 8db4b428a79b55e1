"""`octollm models …`."""

from __future__ import annotations

from pathlib import Path

import msgspec
from rich.table import Table
from rich.text import Text

from octollm.cli.environment import command_settings
from octollm.cli.exits import EXIT_DONE
from octollm.cli.model_file import fetch_with_bar, wanted_entry
from octollm.cli.running import run_command
from octollm.cli.terminal import output
from octollm.llm.cache import ModelCache
from octollm.llm.catalogue import CATALOGUE, SMALLEST, entry_named
from octollm.llm.fetch_options import FetchOptions


def pull_command(name: str | None, source: Path | None) -> int:
    """Fetch a model into the cache."""

    async def work() -> int:
        settings, console = command_settings(), output()
        cache = ModelCache(settings.model_cache)
        entry = entry_named(name) if name else SMALLEST
        await fetch_with_bar(entry, cache, console, FetchOptions(path=source))
        console.print(Text(f"{entry.name} is at {cache.path_of(entry)}"))
        return EXIT_DONE

    return run_command(work)


def list_command(*, as_json: bool) -> int:
    """List the catalogue."""

    async def work() -> int:
        settings = command_settings()
        cache = ModelCache(settings.model_cache)
        wanted = wanted_entry(settings, cache)
        rows = [
            {
                "name": entry.name,
                "title": entry.title,
                "bytes": entry.size,
                "licence": entry.licence,
                "here": cache.has(entry),
                "used": entry == wanted,
            }
            for entry in CATALOGUE
        ]
        if as_json:
            print(msgspec.json.encode(rows).decode())
            return EXIT_DONE
        table = Table("Name", "Model", "Size", "Licence", "Here", "Used", box=None)
        for row in rows:
            table.add_row(
                str(row["name"]),
                str(row["title"]),
                f"{entry_named(str(row['name'])).size / 1e6:,.0f} MB",
                str(row["licence"]),
                "yes" if row["here"] else "no",
                "yes" if row["used"] else "",
            )
        output().print(table)
        return EXIT_DONE

    return run_command(work)
