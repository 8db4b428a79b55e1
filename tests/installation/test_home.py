"""The home: private keys, one process at a time, and errors that say what to do."""

from __future__ import annotations

import asyncio
import os
import stat
import sys

import pytest

from octollm.clock import SystemClock, Uuid7Generator
from octollm.errors import OctoError, SettingError
from octollm.installation.home import (
    RunningInstallation,
    find_running,
    open_home,
    open_keys,
    read_local_key,
    write_private,
)
from octollm.installation.keys import load_home_keys

IDS = Uuid7Generator(SystemClock())


async def test_the_folders_are_the_owners_only(tmp_path):
    async with open_home(tmp_path / "home") as home:
        for folder in (home.root, home.data, home.keys, home.log_file.parent):
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700


async def test_a_second_process_is_refused_with_what_to_do(tmp_path):
    async with open_home(tmp_path) as home:
        home.running_file.write_bytes(b'{"pid": 4711, "url": "http://127.0.0.1:8000"}')
        with pytest.raises(OctoError) as caught:
            async with open_home(tmp_path):
                pass
    assert caught.value.code == "home_in_use"
    assert "4711" in caught.value.detail
    assert "http://127.0.0.1:8000" in caught.value.detail
    assert "OCTOLLM_HOME" in caught.value.detail


async def test_the_home_is_free_again_afterwards(tmp_path):
    for _ in range(2):
        async with open_home(tmp_path) as home:
            home.running_file.write_bytes(b"{}")
        assert not home.running_file.exists()


async def test_the_lock_ends_with_the_process_that_held_it(tmp_path):
    code = (
        "import asyncio, os, pathlib, sys\n"
        "from octollm.installation.home import open_home\n"
        "async def main():\n"
        "    async with open_home(pathlib.Path(sys.argv[1])):\n"
        "        print('held', flush=True)\n"
        "        sys.stdin.read()\n"
        "asyncio.run(main())\n"
    )
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, str(tmp_path), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert child.stdout is not None
    assert await child.stdout.readline() == b"held\n"
    with pytest.raises(OctoError):
        async with open_home(tmp_path):
            pass
    child.kill()
    await child.wait()
    async with open_home(tmp_path):
        pass


async def test_who_runs_is_known_only_while_it_runs(tmp_path):
    assert await find_running(tmp_path) is None
    async with open_home(tmp_path) as home:
        home.running_file.write_bytes(b'{"pid": 1, "url": "http://127.0.0.1:8000"}')
        assert await find_running(tmp_path) == RunningInstallation(1, "http://127.0.0.1:8000")
    home.running_file.write_bytes(b'{"pid": 1, "url": "http://127.0.0.1:8000"}')
    assert await find_running(tmp_path) is None


async def test_a_home_that_cannot_be_made_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OctoError, match="OCTOLLM_HOME") as caught:
        async with open_home(tmp_path / "file" / "home"):
            pass
    assert caught.value.code == "home_unusable"


async def test_keys_are_made_once_and_stay(tmp_path):
    async with open_home(tmp_path) as home:
        first = load_home_keys(home, IDS)
        again = load_home_keys(home, IDS)
    assert first.root.trusted_keys(0) == again.root.trusted_keys(0)
    assert first.local == again.local == read_local_key(tmp_path)
    assert {name: ring.trusted_keys(0) for name, ring in first.services.items()} == {
        name: ring.trusted_keys(0) for name, ring in again.services.items()
    }
    assert len({name for ring in (*first.services.values(), first.root) for name in ring.trusted_keys(0)}) == 11
    assert first.local.startswith("octo_local_")
    assert first.local not in repr(first)


async def test_every_key_file_is_private(tmp_path):
    async with open_home(tmp_path) as home:
        load_home_keys(home, IDS)
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in home.keys.iterdir()}
    assert set(modes.values()) == {0o600}
    assert not [name for name in modes if name.startswith(".")]


@pytest.mark.parametrize("name", ["root.jwk", "coder.jwk", "local.key"])
async def test_a_key_that_others_may_read_is_refused(tmp_path, name):
    async with open_home(tmp_path) as home:
        load_home_keys(home, IDS)
        (home.keys / name).chmod(0o644)
        with pytest.raises(SettingError, match="chmod"):
            load_home_keys(home, IDS)


async def test_a_key_folder_that_others_may_read_is_refused(tmp_path):
    async with open_home(tmp_path) as home:
        home.keys.chmod(0o755)
    with pytest.raises(SettingError, match="chmod"):
        async with open_home(tmp_path):
            pass


async def test_a_linked_key_is_refused(tmp_path):
    async with open_home(tmp_path) as home:
        load_home_keys(home, IDS)
        key = home.keys / "root.jwk"
        key.rename(tmp_path / "elsewhere.jwk")
        key.symlink_to(tmp_path / "elsewhere.jwk")
        with pytest.raises(SettingError):
            load_home_keys(home, IDS)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff\xfe", b'{"kty": "OKP"}'])
async def test_a_damaged_key_is_refused_by_name(tmp_path, content):
    async with open_home(tmp_path) as home:
        load_home_keys(home, IDS)
        (home.keys / "judge.jwk").write_bytes(content)
        with pytest.raises(SettingError, match=r"judge\.jwk is not a key"):
            load_home_keys(home, IDS)


async def test_what_a_dead_writer_left_is_cleared(tmp_path):
    async with open_home(tmp_path) as home:
        leftover = home.keys / ".root.jwk.0123"
        leftover.write_bytes(b"half")
    async with open_keys(tmp_path):
        assert not leftover.exists()


def test_a_write_is_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    write_private(path, b"old", IDS)
    if os.geteuid() == 0:
        with pytest.raises(OctoError):
            write_private(tmp_path / "no" / "folder", b"new", IDS)
    write_private(path, b"new", IDS)
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
