import asyncio
import os
import threading

import pytest
from llm_support import CONTENT, small_entry

import octollm.llm.cache as cache_module
from octollm.errors import OctoError
from octollm.llm.cache import ModelCache, run_in_thread
from octollm.testing import wait_until


def put(cache, entry, content=CONTENT):
    cache.root.mkdir(parents=True, exist_ok=True)
    path = cache.path_of(entry)
    path.write_bytes(content)
    return path


@pytest.fixture
def hashed(monkeypatch):
    """The paths that were hashed."""
    seen = []
    real = cache_module.sha256_of

    async def counting(path):
        seen.append(path)
        return await real(path)

    monkeypatch.setattr(cache_module, "sha256_of", counting)
    return seen


def test_the_default_folder_is_the_users():
    assert ModelCache().root.parts[-3:] == (".cache", "octollm", "models")


def test_largest_is_of_those_present(cache):
    small, large = small_entry("small"), small_entry("large", CONTENT * 2)
    assert cache.largest((small, large)) is None
    put(cache, small)
    assert cache.largest((small, large)) is small
    put(cache, large, CONTENT * 2)
    assert cache.largest((small, large)) is large
    assert cache.available((small, large)) == (small, large)


async def test_a_good_file_is_hashed_once(cache, hashed):
    entry = small_entry()
    path = put(cache, entry)
    assert await cache.verify(entry) == path
    assert await cache.verify(entry) == path
    assert await ModelCache(cache.root).verify(entry) == path
    assert len(hashed) == 1


async def test_a_touched_file_is_hashed_again(cache, hashed):
    entry = small_entry()
    path = put(cache, entry)
    await cache.verify(entry)
    os.utime(path, ns=(1, 1))
    await cache.verify(entry)
    assert len(hashed) == 2


async def test_a_broken_stamp_is_no_proof(cache, hashed):
    entry = small_entry()
    put(cache, entry)
    await cache.verify(entry)
    (stamp,) = cache.root.glob("*.verified")
    stamp.write_bytes(b"{")
    await cache.verify(entry)
    assert len(hashed) == 2


@pytest.mark.parametrize("content", [CONTENT[:-1] + b"X", CONTENT[:-1], b""])
async def test_a_damaged_file_is_named_with_what_to_do(cache, content):
    entry = small_entry()
    path = put(cache, entry, content)
    with pytest.raises(OctoError) as failed:
        await cache.verify(entry)
    assert failed.value.code == "model_damaged"
    assert str(path) in failed.value.detail
    assert "octollm models pull small" in failed.value.detail


async def test_damage_after_the_stamp_is_found(cache):
    entry = small_entry()
    path = put(cache, entry)
    await cache.verify(entry)
    path.write_bytes(CONTENT[:-1] + b"X")
    with pytest.raises(OctoError, match="damaged"):
        await cache.verify(entry)


async def test_an_absent_file_is_no_model(cache):
    with pytest.raises(OctoError, match="octollm models pull small") as failed:
        await cache.verify(small_entry())
    assert failed.value.code == "no_model"


async def test_a_folder_that_cannot_be_written_only_costs_time(cache, monkeypatch):
    entry = small_entry()
    path = put(cache, entry)

    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr("pathlib.Path.write_bytes", refuse)
    assert await cache.verify(entry) == path


async def test_cancelling_work_in_a_thread_waits_until_it_stopped():
    began, left = threading.Event(), threading.Event()

    def work(stop):
        began.set()
        stop.wait(10)
        left.set()

    task = asyncio.create_task(run_in_thread(work))
    await wait_until(began.is_set, description="the work began")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert left.is_set()
