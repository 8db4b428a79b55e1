from __future__ import annotations

import dataclasses
import hashlib
import io
from pathlib import Path

import pytest
from rich.console import Console

from octollm.cli.models import fetch_with_progress
from octollm.cli.output import THEME
from octollm.errors import OctoError
from octollm.llm.cache import ModelCache
from octollm.llm.catalogue import SMALLEST_MODEL
from octollm.llm.sources import FetchOptions

GOOD = b"weights"
ENTRY = dataclasses.replace(SMALLEST_MODEL, digest=hashlib.sha256(GOOD).hexdigest(), size=len(GOOD))
NOWHERE = FetchOptions(hub=False, wheels=False)


def console() -> tuple[Console, io.StringIO]:
    written = io.StringIO()
    return Console(file=written, theme=THEME, width=400), written


async def test_a_good_file_is_used_without_a_word(tmp_path: Path) -> None:
    cache = ModelCache(tmp_path)
    cache.path_of(ENTRY).write_bytes(GOOD)
    screen, written = console()
    await fetch_with_progress(ENTRY, cache, screen, NOWHERE)
    assert written.getvalue() == ""


async def test_a_damaged_file_is_told_and_fetched_again(tmp_path: Path) -> None:
    cache = ModelCache(tmp_path)
    cache.path_of(ENTRY).write_bytes(b"w3ights")
    screen, written = console()
    with pytest.raises(OctoError) as caught:
        await fetch_with_progress(ENTRY, cache, screen, NOWHERE)
    assert caught.value.code == "model_download_failed"
    assert "is damaged: its SHA-256 is" in written.getvalue()
    assert "It is fetched again." in written.getvalue()
