"""`octollm models`: list and fetch the embedded models, with a progress bar."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from octollm.cli.output import output
from octollm.cli.runtime import EXIT_DONE, command_settings, run_command
from octollm.config import Settings
from octollm.errors import OctoError
from octollm.llm.cache import ModelCache
from octollm.llm.catalogue import MODEL_CATALOGUE, SMALLEST_MODEL, ModelEntry, find_entry
from octollm.llm.fetch import fetch_model
from octollm.llm.sources import FetchOptions

_PROGRESS_STEP = 20
"""Without a terminal, a line for every so many percent."""


def select_model_entry(settings: Settings, cache: ModelCache) -> ModelEntry | None:
    """Return the embedded model that the settings ask for; ``None`` when they ask for a provider's."""
    kind, _, name = settings.model.partition(":")
    if kind != "embedded":
        return None
    return find_entry(name) if name else cache.largest() or SMALLEST_MODEL


async def ensure_model(settings: Settings, console: Console) -> ModelEntry | None:
    """See to it that the model of the settings is on this machine.

    Raises ``no_model`` when the part that runs it is not installed, and ``model_download_failed``.
    """
    cache = ModelCache(settings.model_cache)
    entry = select_model_entry(settings, cache)
    if entry is None:
        return None
    if importlib.util.find_spec("xllamacpp") is None:
        raise OctoError(
            "The embedded model needs a part that is not installed: `pip install 'octollm[local]'`. Or use a"
            " provider: OCTOLLM_MODEL=openai:NAME, with OCTOLLM_MODEL_URL and OCTOLLM_MODEL_API_KEY.",
            code="no_model",
        )
    await fetch_with_progress(entry, cache, console, FetchOptions())
    return entry


async def fetch_with_progress(entry: ModelEntry, cache: ModelCache, console: Console, options: FetchOptions) -> None:
    """Fetch a model unless it is there, showing how far it is. One that is damaged is told and fetched again."""
    if cache.has(entry) and options.path is None:
        try:
            await cache.verify(entry)
        except OctoError as error:
            if error.code != "model_damaged":
                raise
            console.print(Text(f"      {error.detail.partition(' Delete it')[0]} It is fetched again.", "octo.warn"))
        else:
            return
    console.print(
        Text.assemble(("Model ", "octo.title"), f"{entry.title}, {entry.size / 1e6:,.0f} MB, once, into {cache.root}")
    )
    if not console.is_terminal:
        await fetch_model(entry, cache, _LineProgress(console), options)
    else:
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        ) as progress:
            bar = progress.add_task("looking for it", total=entry.size)

            def show(done: int, total: int, source: str) -> None:
                progress.update(bar, completed=done, total=total, description=source)

            await fetch_model(entry, cache, show, options)
    console.print(Text("      its SHA-256 is right", "octo.quiet"))


class _LineProgress:
    """Progress where there is no terminal: a line now and then."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._next = 0

    def __call__(self, done: int, total: int, source: str) -> None:
        """Print a line at every 20 percent."""
        percent = 100 * done // max(total, 1)
        if percent >= self._next:
            self._next = percent - percent % _PROGRESS_STEP + _PROGRESS_STEP
            self._console.print(Text(f"      {percent:3d} % from {source}"))


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
