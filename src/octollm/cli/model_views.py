"""`octollm models …`."""

from __future__ import annotations

from pathlib import Path

import msgspec
from rich.table import Table
from rich.text import Text

from octollm.cli.environment import command_settings
from octollm.cli.exits import EXIT_DONE
from octollm.cli.model_file import fetch_with_progress, select_model_entry
from octollm.cli.running import run_command
from octollm.cli.terminal import output
from octollm.llm.cache import ModelCache
from octollm.llm.catalogue import MODEL_CATALOGUE, SMALLEST_MODEL, find_entry
from octollm.llm.fetch_options import FetchOptions


def pull_model_command(name: str | None, source: Path | None) -> int:
    """Fetch a model into the cache."""

    async def work() -> int:
        settings, console = command_settings(), output()
        cache = ModelCache(settings.model_cache)
        entry = find_entry(name) if name else SMALLEST_MODEL
        await fetch_with_progress(entry, cache, console, FetchOptions(path=source))
        console.print(Text(f"{entry.name} is at {cache.path_of(entry)}"))
        return EXIT_DONE

    return run_command(work)


def list_models_command(*, as_json: bool) -> int:
    """List the catalogue."""

    async def work() -> int:
        settings = command_settings()
        cache = ModelCache(settings.model_cache)
        wanted = select_model_entry(settings, cache)
        rows = [
            {
                "name": entry.name,
                "title": entry.title,
                "bytes": entry.size,
                "licence": entry.licence,
                "here": cache.has(entry),
                "used": entry == wanted,
            }
            for entry in MODEL_CATALOGUE
        ]
        if as_json:
            print(msgspec.json.encode(rows).decode())
            return EXIT_DONE
        table = Table("Name", "Model", "Size", "Licence", "Here", "Used", box=None)
        for row in rows:
            table.add_row(
                str(row["name"]),
                str(row["title"]),
                f"{find_entry(str(row['name'])).size / 1e6:,.0f} MB",
                str(row["licence"]),
                "yes" if row["here"] else "no",
                "yes" if row["used"] else "",
            )
        output().print(table)
        return EXIT_DONE

    return run_command(work)
