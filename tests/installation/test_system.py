"""Every service in one process: up together, down together, and a death that is not overlooked."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import stat

import httpx
import pytest

from octollm.clock import SystemClock, Uuid7Generator
from octollm.config import read_settings
from octollm.contracts.services import SERVICES
from octollm.errors import OctoError
from octollm.installation.embedded import START_STAGES, STOP_STAGES, embedded_installation
from octollm.installation.home import find_running
from octollm.rpc.service import build_service
from octollm.testing import wait_until
from octollm.testing.fake_model import scripted_model
from octollm.testing.system import installation

CLOCK = SystemClock()
IDS = Uuid7Generator(CLOCK)
FREE = dict.fromkeys(SERVICES, 0)


@pytest.fixture
async def model():
    async with scripted_model([]) as found:
        yield {"OCTOLLM_MODEL": "openai:scripted", "OCTOLLM_MODEL_URL": found.url}


def settings(home, model):
    return read_settings({**model, "OCTOLLM_HOME": str(home)}, tuple(SERVICES))


def test_every_service_starts_once_and_stops_once():
    for stages in (START_STAGES, STOP_STAGES):
        assert sorted(name for stage in stages for name in stage) == sorted(SERVICES)


async def test_every_service_answers_health_readiness_metrics_and_its_api(tmp_path, model):
    async with installation(tmp_path, environment=model) as system, httpx.AsyncClient() as client:
        assert set(system.urls) == set(SERVICES)
        for name, url in system.urls.items():
            assert (await client.get(url + "/health")).json()["service"] == name
            assert (await client.get(url + "/ready")).status_code == 200
            assert (await client.get(url + "/openapi.json")).json()["openapi"].startswith("3.")
            assert "octollm_" in (await client.get(url + "/metrics")).text


async def test_every_service_tells_the_log_that_it_started(tmp_path, model):
    def started() -> set[str]:
        with contextlib.closing(sqlite3.connect(f"file:{tmp_path}/data/orchestrator.db?mode=ro", uri=True)) as db:
            rows = db.execute("SELECT event_type, source FROM events WHERE event_type LIKE 'system.%'").fetchall()
        return {source for event_type, source in rows if event_type == "system.started"}

    async with installation(tmp_path, environment=model):
        await wait_until(lambda: started() == set(SERVICES), description="an event of each service")


async def test_nothing_inside_is_open_without_a_token(tmp_path, model):
    inside = {"orchestrator": "/tasks", "memory": "/search", "models": "/v1/chat/completions", "coder": "/execute"}
    async with installation(tmp_path, environment=model) as system, httpx.AsyncClient() as client:
        for name, path in inside.items():
            answer = await client.post(system.urls[name] + path, json={})
            assert answer.status_code == 401, name
            assert answer.headers["content-type"] == "application/problem+json"


async def test_the_home_says_who_runs_until_it_ends(tmp_path, model):
    async with installation(tmp_path, environment=model) as system:
        running = await find_running(tmp_path)
        assert running is not None
        assert running.url == system.gateway_url
    assert await find_running(tmp_path) is None
    assert not (tmp_path / "running.json").exists()


async def test_keys_stay_over_a_restart_and_files_are_private(tmp_path, model):
    async with installation(tmp_path, environment=model) as system:
        first = system.local_key
    async with installation(tmp_path, environment=model) as system:
        assert system.local_key == first
    for path in tmp_path.rglob("*"):
        if path.parent.name in ("keys", "data") and path.is_file():
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


async def test_no_key_is_in_the_log(tmp_path, model):
    async with installation(tmp_path, environment={**model, "OCTOLLM_LOG_LEVEL": "debug"}) as system:
        async with httpx.AsyncClient() as client:
            await client.get(system.gateway_url + "/tasks", headers={"Authorization": f"Bearer {system.local_key}"})
        key = system.local_key
        log = system.home.log_file
    text = log.read_text()
    assert '"event":"call.served"' in text
    assert key not in text
    assert "eyJ" not in text


async def test_nothing_runs_on_after_the_end(tmp_path, model):
    before = asyncio.all_tasks()
    async with installation(tmp_path, environment=model) as system:
        urls = list(system.urls.values())
    async with httpx.AsyncClient() as client:
        for url in urls:
            with pytest.raises(httpx.ConnectError):
                await client.get(url + "/health")
    assert asyncio.all_tasks() <= before


async def test_a_service_that_cannot_start_stops_the_others(tmp_path, model):
    @contextlib.asynccontextmanager
    async def broken(base, settings):
        raise OctoError("no luck", code="unavailable")
        yield

    with pytest.raises(OctoError, match="no luck"):
        async with embedded_installation(
            settings(tmp_path, model), clock=CLOCK, ids=IDS, ports=FREE, overrides={"coder": broken}
        ):
            pytest.fail("it started")
    async with installation(tmp_path, environment=model):
        pass


async def test_a_service_that_dies_ends_the_system_by_name(tmp_path, model):
    die = asyncio.Event()

    @contextlib.asynccontextmanager
    async def failing_service(base, settings):
        me = asyncio.current_task()
        assert me is not None
        watch = asyncio.create_task(die.wait())
        watch.add_done_callback(lambda _: me.cancel())
        try:
            yield build_service(base, [])
        finally:
            watch.cancel()

    with pytest.raises(OctoError, match="memory stopped"):
        async with embedded_installation(
            settings(tmp_path, model), clock=CLOCK, ids=IDS, ports=FREE, overrides={"memory": failing_service}
        ):
            die.set()
            await asyncio.Event().wait()


async def test_an_error_of_the_body_is_raised_as_it_is(tmp_path, model):
    with pytest.raises(KeyError, match="mine"):
        async with installation(tmp_path, environment=model):
            raise KeyError("mine")


async def test_cancelling_a_start_leaves_nothing(tmp_path, model):
    begun = asyncio.Event()

    @contextlib.asynccontextmanager
    async def slow(base, settings):
        begun.set()
        await asyncio.Event().wait()
        yield build_service(base, [])

    async def start():
        async with embedded_installation(
            settings(tmp_path, model), clock=CLOCK, ids=IDS, ports=FREE, overrides={"models": slow}
        ):
            pytest.fail("it started")

    starting = asyncio.create_task(start())
    await begun.wait()
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    async with installation(tmp_path, environment=model):
        pass


async def test_what_is_not_ready_is_named(tmp_path, model):
    async with installation(tmp_path, environment=model) as system:
        urls = {**system.urls, "judge": "http://127.0.0.1:9"}
        broken = type(system)(system.home, system.settings, urls, system.local_key, system.http)
        with pytest.raises(OctoError, match="judge: 127") as caught:
            await broken.wait_ready(timeout=0.2)
        assert caught.value.code == "unavailable"
