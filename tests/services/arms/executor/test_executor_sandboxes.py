"""What both sandboxes do for an honest program, and how they end one."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable
from uuid import uuid4

import pytest

from octollm.errors import OctoError
from octollm.services.arms.executor.bubblewrap import Bubblewrap
from octollm.services.arms.executor.sandbox import MIB, Job, Limits, OutputFile, Sandbox
from octollm.services.arms.executor.wasi import Wasi
from octollm.testing import wait_until

pytestmark = pytest.mark.sandbox


def script(text: str, **limits: float) -> Job:
    return Job(("main.py",), {"main.py": text.encode()}, Limits(**limits))  # pyright: ignore[reportArgumentType]


async def test_hello(sandbox: Sandbox) -> None:
    outcome = await sandbox.run(Job(("-c", "import sys; print('grüße'); print('note', file=sys.stderr)")))
    assert (outcome.exit_code, outcome.stdout, outcome.stderr) == (0, "grüße\n", "note\n")
    assert (outcome.reason, outcome.files) == ("", ())
    assert outcome.duration_ms > 0


@pytest.mark.parametrize(
    ("end", "code"), [("exit(3)", 3), ("raise ValueError('no')", 1), ("import os; os._exit(7)", 7)]
)
async def test_exit_codes(sandbox: Sandbox, end: str, code: int) -> None:
    outcome = await sandbox.run(Job(("-c", end)))
    assert (outcome.exit_code, outcome.reason) == (code, "")


async def test_files_in_and_out(sandbox: Sandbox) -> None:
    text = """
from pathlib import Path
from pkg.helper import double
Path("kept.txt").write_text("same")
Path("changed.txt").write_text("after")
Path("out/deep").mkdir(parents=True)
Path("out/deep/new.txt").write_text(str(double(21)))
Path("out/large.txt").write_text("x" * 70_000)
Path("out/binary").write_bytes(bytes(range(256)))
"""
    files = {
        "main.py": text.encode(),
        "pkg/__init__.py": b"",
        "pkg/helper.py": b"def double(x):\n    return 2 * x\n",
        "kept.txt": b"same",
        "changed.txt": b"before",
    }
    outcome = await sandbox.run(Job(("main.py",), files))
    assert outcome.stderr == ""
    assert set(outcome.files) == {OutputFile("changed.txt", "after"), OutputFile("out/deep/new.txt", "42")}


async def test_unittest(sandbox: Sandbox) -> None:
    test = b"""
import unittest
from solution import double

class TestDouble(unittest.TestCase):
    def test_right(self):
        self.assertEqual(double(2), 4)
    def test_wrong(self):
        self.assertEqual(double(2), 5)
"""
    files = {"solution.py": b"def double(x):\n    return 2 * x\n", "test_solution.py": test}
    outcome = await sandbox.run(Job(("-m", "unittest"), files))
    assert outcome.exit_code == 1
    assert "Ran 2 tests" in outcome.stderr
    assert "AssertionError: 4 != 5" in outcome.stderr
    assert outcome.files == ()


async def test_the_standard_library_alone(sandbox: Sandbox) -> None:
    text = """
import collections, csv, dataclasses, datetime, decimal, hashlib, json, random, re, statistics, tempfile, uuid, zlib
print(hashlib.sha256(b"x").hexdigest()[:8], json.loads("[1]"), uuid.uuid4().version)
with tempfile.TemporaryFile() as file:
    file.write(b"x")
for name in ("msgspec", "duckdb", "octollm", "pip"):
    try:
        __import__(name)
        print("found", name)
    except ImportError:
        pass
"""
    outcome = await sandbox.run(script(text))
    assert (outcome.stdout, outcome.stderr) == ("2d711642 [1] 4\n", "")


async def test_standard_input_is_empty(sandbox: Sandbox) -> None:
    outcome = await sandbox.run(Job(("-c", "import sys; print(repr(sys.stdin.read()))")))
    assert outcome.stdout == "''\n"


async def test_many_megabytes_go_in(sandbox: Sandbox) -> None:
    job = Job(("-c", "print(len(open('data.bin', 'rb').read()))"), {"data.bin": bytes(20 * MIB)})
    outcome = await sandbox.run(job)
    assert outcome.stdout == f"{20 * MIB}\n"


async def test_unsafe_names_are_refused(sandbox: Sandbox) -> None:
    with pytest.raises(OctoError) as caught:
        await sandbox.run(Job(("main.py",), {"../main.py": b""}))
    assert caught.value.code == "file_invalid"


async def test_runs_share_nothing(sandbox: Sandbox) -> None:
    text = """
import os
print(sorted(name for name in os.listdir(".") if name.endswith(".txt")))
open("left.txt", "w").close()
open("/tmp/left.txt", "x").close()
"""
    for outcome in await asyncio.gather(*(sandbox.run(Job(("-c", text))) for _ in range(4))):
        assert (outcome.stdout, outcome.stderr) == ("[]\n", "")
    assert (await sandbox.run(Job(("-c", text)))).stdout == "[]\n"


async def test_cancelling_kills(sandbox: Sandbox, running: Callable[[str], bool]) -> None:
    word = uuid4().hex
    # The word stands in the command line of what runs the program; under WASI that is the worker, told by its files.
    job = Job(("-c", f"while '{word}': pass"), limits=Limits(wall_seconds=50, cpu_seconds=50))
    seen = (lambda: running(word)) if sandbox.name == "bubblewrap" else (lambda: running("wasi_worker"))
    task = asyncio.create_task(sandbox.run(job))
    await wait_until(seen, description="the program runs")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await wait_until(lambda: not seen(), description="nothing of it is left")


async def test_the_death_of_the_service_ends_its_runs(bubblewrap: Bubblewrap, running: Callable[[str], bool]) -> None:
    word = uuid4().hex
    service = f"""
import asyncio
from octollm.services.arms.executor.bubblewrap import Bubblewrap
from octollm.services.arms.executor.sandbox import Job, Limits
job = Job(("-c", "while '{word}'[:-1] + '!': pass"), limits=Limits(wall_seconds=50, cpu_seconds=50))
asyncio.run(Bubblewrap.open().run(job))
"""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-", stdin=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    assert process.stdin is not None
    process.stdin.write(service.encode())
    process.stdin.close()
    await wait_until(lambda: running(word), description="the program runs", timeout=20)
    process.send_signal(signal.SIGKILL)
    await process.wait()
    await wait_until(lambda: not running(word), description="nothing of it is left")


async def test_sql_is_not_for_wasi(wasi: Wasi) -> None:
    with pytest.raises(OctoError) as caught:
        await wasi.run(Job(("-c", ""), packages=("duckdb",)))
    assert caught.value.code == "no_sandbox"


async def test_asyncio_and_threads_work(bubblewrap: Bubblewrap) -> None:
    text = """
import asyncio
from concurrent.futures import ThreadPoolExecutor
async def main():
    await asyncio.sleep(0)
    return await asyncio.to_thread(sum, [1, 2])
print(asyncio.run(main()))
with ThreadPoolExecutor(4) as pool:
    print(sum(pool.map(abs, range(10))))
"""
    outcome = await bubblewrap.run(script(text))
    assert (outcome.stdout, outcome.stderr) == ("3\n45\n", "")


async def test_without_setpriv(bubblewrap: Bubblewrap, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    outcome = await bubblewrap.run(Job(("-c", "import os; print(os.getuid())")))
    assert outcome.stdout == "1000\n"
