"""`octollm models`: list and fetch the embedded models, with a progress bar."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from octollm.cli.completion import complete_model
from octollm.cli.output import output
from octollm.cli.runtime import EXIT_DONE, AsJson, async_command, command_settings, print_json
from octollm.config import Settings
from octollm.errors import OctoError
from octollm.llm.cache import ModelCache
from octollm.llm.catalogue import MODEL_CATALOGUE, SMALLEST_MODEL, ModelEntry, find_entry
from octollm.llm.fetch import fetch_model
from octollm.llm.sources import FetchOptions

_PROGRESS_STEP = 20
"""Percent between two lines of progress where output is no terminal."""

app = typer.Typer()
models_app = typer.Typer(name="models", help="Fetch and list the embedded models.", no_args_is_help=True)
app.add_typer(models_app, rich_help_panel="Installation")


@models_app.command("pull")
@async_command
async def pull_model(
    name: Annotated[
        str | None,
        typer.Argument(
            help="A name from `octollm models list`; by default the smallest.", autocompletion=complete_model
        ),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option("--from", help="Import the model from this file instead of downloading it.", metavar="PATH"),
    ] = None,
) -> int:
    """Download an embedded model into the cache; an interrupted download is resumed."""
    settings, console = command_settings(), output()
    cache = ModelCache(settings.model_cache)
    entry = find_entry(name) if name else SMALLEST_MODEL
    await fetch_with_progress(entry, cache, console, FetchOptions(path=source))
    console.print(Text(f"{entry.name} is at {cache.path_of(entry)}"))
    return EXIT_DONE


@models_app.command("list")
@async_command
async def list_models(as_json: AsJson = False) -> int:
    """List the embedded models: which are in the cache, and which one is used."""
    settings = command_settings()
    cache = ModelCache(settings.model_cache)
    selected = select_model_entry(settings, cache)
    if as_json:
        print_json(
            [
                {
                    "name": entry.name,
                    "title": entry.title,
                    "bytes": entry.size,
                    "licence": entry.licence,
                    "here": cache.has(entry),
                    "used": entry == selected,
                }
                for entry in MODEL_CATALOGUE
            ]
        )
        return EXIT_DONE
    table = Table("Name", "Model", "Size", "Licence", "Here", "Used", box=None)
    for entry in MODEL_CATALOGUE:
        table.add_row(
            entry.name,
            entry.title,
            f"{entry.size / 1e6:,.0f} MB",
            entry.licence,
            "yes" if cache.has(entry) else "no",
            "yes" if entry == selected else "",
        )
    output().print(table)
    return EXIT_DONE


def select_model_entry(settings: Settings, cache: ModelCache) -> ModelEntry | None:
    """Return the embedded model of the settings; ``None`` when they name a provider's model."""
    kind, _, name = settings.model.partition(":")
    if kind != "embedded":
        return None
    return find_entry(name) if name else cache.largest() or SMALLEST_MODEL


async def ensure_model(settings: Settings, console: Console) -> ModelEntry | None:
    """Fetch the embedded model of the settings unless it is in the cache; ``None`` for a provider's model.

    Raises ``no_model`` when its runtime is not installed, and ``model_download_failed``.
    """
    cache = ModelCache(settings.model_cache)
    entry = select_model_entry(settings, cache)
    if entry is None:
        return None
    if importlib.util.find_spec("xllamacpp") is None:
        raise OctoError(
            "The embedded model needs a package that is not installed: `pip install 'octollm[local]'`. Or use a"
            " provider: OCTOLLM_MODEL=openai:NAME, with OCTOLLM_MODEL_URL and OCTOLLM_MODEL_API_KEY.",
            code="no_model",
        )
    await fetch_with_progress(entry, cache, console, FetchOptions())
    return entry


async def fetch_with_progress(entry: ModelEntry, cache: ModelCache, console: Console, options: FetchOptions) -> None:
    """Fetch a model unless it is in the cache, with a progress bar. A damaged one is reported and fetched again."""
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
            bar = progress.add_task("connecting", total=entry.size)

            def show(done: int, total: int, source: str) -> None:
                progress.update(bar, completed=done, total=total, description=source)

            await fetch_model(entry, cache, show, options)
    console.print(Text("      its SHA-256 is right", "octo.quiet"))


class _LineProgress:
    """Download progress as plain lines, for output that is no terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._next = 0

    def __call__(self, done: int, total: int, source: str) -> None:
        """Print a line every ``_PROGRESS_STEP`` percent."""
        percent = 100 * done // max(total, 1)
        if percent >= self._next:
            self._next = percent - percent % _PROGRESS_STEP + _PROGRESS_STEP
            self._console.print(Text(f"      {percent:3d} % from {source}"))
