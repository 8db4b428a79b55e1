"""A sandbox is chosen by trying it; a broken one gives way, and nothing gives way to a bare process."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from octollm.errors import OctoError
from octollm.services.arms.executor.bubblewrap import Bubblewrap
from octollm.services.arms.executor.sandbox import Job, SandboxResult
from octollm.services.arms.executor.selection import probe_sandbox, select_sandbox
from octollm.services.arms.executor.wasi import Wasi


class Broken:
    name = "broken"

    async def run(self, job: Job) -> SandboxResult:
        return SandboxResult(0, "not the sum", "")


async def test_a_wrong_answer_is_refused() -> None:
    with pytest.raises(OctoError) as caught:
        await probe_sandbox(Broken())
    assert caught.value.code == "sandbox_failed"


@pytest.mark.sandbox
async def test_bubblewrap_first(bubblewrap: Bubblewrap, tmp_path: Path) -> None:
    assert (await select_sandbox(cache_dir=tmp_path, fetch=False)).name == "bubblewrap"


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine whose kernel refuses bubblewrap."""
    folder = Path(tempfile.mkdtemp())  # a test's own folder is closed to the sandbox's user
    folder.chmod(0o755)
    program = folder / "bwrap"
    program.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    yield
    shutil.rmtree(folder)


@pytest.mark.usefixtures("refused")
class TestRefused:
    async def test_the_reason_and_the_remedy(self, tmp_path: Path) -> None:
        with pytest.raises(OctoError) as caught:
            await select_sandbox(cache_dir=tmp_path / "cache", fetch=False)
        assert caught.value.code == "no_sandbox"
        assert "No permissions to create new namespace" in caught.value.detail
        assert "apt-get install bubblewrap" in caught.value.detail
        assert str(tmp_path / "cache") in caught.value.detail

    async def test_a_preference_has_no_fallback(self, tmp_path: Path) -> None:
        with pytest.raises(OctoError, match="bubblewrap:") as caught:
            await select_sandbox("bubblewrap", cache_dir=tmp_path / "cache", fetch=False)
        assert "wasi:" not in caught.value.detail

    @pytest.mark.sandbox
    async def test_wasi_second(self, wasi: Wasi, tool_cache: Path) -> None:
        assert (await select_sandbox(cache_dir=tool_cache, fetch=False)).name == wasi.name


async def test_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OctoError, match=r"bwrap\) is not installed"):
        await select_sandbox(cache_dir=tmp_path, fetch=False)


@pytest.mark.sandbox
async def test_wasi_preferred(wasi: Wasi) -> None:
    await probe_sandbox(wasi)
