import asyncio
import sys

import pytest

from octollm.concurrency import LockTimeout, file_lock


async def test_one_holder_at_a_time(tmp_path):
    path = tmp_path / "lock"
    inside = 0
    most = 0

    async def hold():
        nonlocal inside, most
        async with file_lock(path, 10):
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(0)
            inside -= 1

    await asyncio.gather(*(hold() for _ in range(5)))
    assert most == 1


async def test_the_wait_is_bounded(tmp_path):
    async with file_lock(tmp_path / "lock", 1):
        with pytest.raises(LockTimeout):
            async with file_lock(tmp_path / "lock", 0.05):
                pass
    async with file_lock(tmp_path / "lock", 1):
        pass


async def test_it_ends_with_its_process(tmp_path):
    path = tmp_path / "lock"
    code = "import fcntl,sys; f=open(sys.argv[1],'ab'); fcntl.flock(f,fcntl.LOCK_EX); print('held',flush=True); input()"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code, str(path)), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    await process.stdout.readline()
    with pytest.raises(LockTimeout):
        async with file_lock(path, 0.05):
            pass
    process.kill()
    await process.communicate()
    async with file_lock(path, 5):
        pass


async def test_a_lock_is_given_back_after_a_failure_and_its_file_stays(tmp_path):
    path = tmp_path / "lock"
    with pytest.raises(ValueError, match="inside"):
        async with file_lock(path, 1):
            raise ValueError("inside")
    inode = path.stat().st_ino
    async with file_lock(path, 0):
        assert path.stat().st_ino == inode
