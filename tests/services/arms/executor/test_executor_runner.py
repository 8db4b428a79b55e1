"""Requests become jobs, limits are cut, and no more run at once than may."""

from __future__ import annotations

import asyncio
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octollm.contracts.operations import RunLimits, RunRequest
from octollm.contracts.task import FileRef
from octollm.errors import OctoError
from octollm.services.arms.executor.bubblewrap import Bubblewrap
from octollm.services.arms.executor.runner import Runner, resolve_limits
from octollm.services.arms.executor.sandbox import MAX_LIMITS, MIB, Job, Limits, OutputFile, Sandbox, SandboxResult
from octollm.testing import wait_until

HELLO = RunRequest("python", ("-c", "print('hello')"))


class BlockedSandbox:
    """A sandbox whose runs end when they are let go."""

    name = "gate"

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.inside = 0
        self.open = asyncio.Event()

    async def run(self, job: Job) -> SandboxResult:
        self.jobs.append(job)
        self.inside += 1
        try:
            await self.open.wait()
        finally:
            self.inside -= 1
        return SandboxResult(0, "out", "", (OutputFile("a", "b"),))


class TestLimits:
    def test_defaults(self) -> None:
        limits = resolve_limits(RunLimits(), Limits(), MAX_LIMITS)
        assert (limits.wall_seconds, limits.cpu_seconds, limits.memory_bytes) == (10, 20, 512 * MIB)
        assert resolve_limits(RunLimits(), Limits(), MAX_LIMITS, memory=MIB).memory_bytes == MIB

    @given(
        st.none() | st.floats(0.01, 1e9),
        st.none() | st.integers(1, 2**50),
        st.none() | st.integers(1, 2**50),
    )
    def test_never_past_the_maxima(self, wall: float | None, memory: int | None, output: int | None) -> None:
        limits = resolve_limits(RunLimits(wall, memory, output), Limits(), MAX_LIMITS)
        assert limits == limits.clamp(MAX_LIMITS)
        assert limits.cpu_seconds >= 1

    @pytest.mark.parametrize(
        "asked", [RunLimits(0), RunLimits(-1), RunLimits(float("nan")), RunLimits(None, 0), RunLimits(None, None, -1)]
    )
    def test_nonsense(self, asked: RunLimits) -> None:
        with pytest.raises(OctoError) as caught:
            resolve_limits(asked, Limits(), MAX_LIMITS)
        assert caught.value.code == "invalid_body"


@pytest.mark.parametrize(
    ("request_", "files", "code"),
    [
        (RunRequest("python", ()), {}, "invalid_body"),
        (RunRequest("python", ("x",) * 65), {}, "invalid_body"),
        (RunRequest("python", ("a\0b",)), {}, "invalid_body"),
        (RunRequest("python", ("x" * 70_000,)), {}, "invalid_body"),
        (RunRequest("sql", ()), {}, "invalid_body"),
        (RunRequest("sql", ("SELECT 1", "x")), {}, "invalid_body"),
        (RunRequest("python", ("main.py",)), {"../main.py": b""}, "file_invalid"),
        (RunRequest("sql", ("SELECT 1",)), {"/etc/a.csv": b""}, "file_invalid"),
    ],
)
async def test_refused_before_it_runs(request_: RunRequest, files: dict[str, bytes], code: str) -> None:
    gate = BlockedSandbox()
    with pytest.raises(OctoError) as caught:
        await Runner(gate).run(request_, files)
    assert caught.value.code == code
    assert gate.jobs == []


async def test_concurrency_and_queue() -> None:
    gate = BlockedSandbox()
    runner = Runner(gate, concurrency=2, max_waiting=1)
    runs = [asyncio.create_task(runner.run(HELLO, {})) for _ in range(3)]
    await wait_until(lambda: gate.inside == 2 and runner.active == 3, description="two run, one waits")
    with pytest.raises(OctoError) as caught:
        await runner.run(HELLO, {})
    assert caught.value.code == "overloaded"
    assert caught.value.retry_after
    gate.open.set()
    assert [run.stdout for run in await asyncio.gather(*runs)] == ["out"] * 3
    assert runner.active == 0


async def test_a_cancelled_wait_gives_its_place_back() -> None:
    gate = BlockedSandbox()
    runner = Runner(gate, concurrency=1, max_waiting=1)
    first, second = (asyncio.create_task(runner.run(HELLO, {})) for _ in range(2))
    await wait_until(lambda: runner.active == 2, description="one runs, one waits")
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert (runner.active, gate.inside) == (0, 0)


async def test_the_command_of_a_job() -> None:
    gate = BlockedSandbox()
    gate.open.set()
    runner = Runner(gate)
    result = await runner.run(
        RunRequest("python", ("main.py", "--x"), limits=RunLimits(wall_seconds=1000)), {"main.py": b"1"}
    )
    assert (result.sandbox, result.files) == ("gate", (FileRef("a", text="b"),))
    result = await runner.run(RunRequest("sql", ("SELECT 1",)), {"d.csv": b"x\n1\n", "notes.txt": b""})
    assert result.files == ()
    python, sql = gate.jobs
    assert (python.command, python.files, python.limits.wall_seconds) == (("main.py", "--x"), {"main.py": b"1"}, 60)
    assert sql.packages == ("duckdb",)
    assert {"runner_sql.py", "request.json", "data/0.csv", "octollm/documents/tables.py"} <= set(sql.files)
    assert not any("notes" in name for name in sql.files)


@pytest.mark.sandbox
async def test_python(sandbox: Sandbox) -> None:
    files = {"main.py": b"import sys\nopen('out.txt', 'w').write(sys.argv[1])\nprint('done')"}
    result = await Runner(sandbox).run(RunRequest("python", ("main.py", "word")), files)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "done\n", "")
    assert (result.files, result.sandbox) == ((FileRef("out.txt", text="word"),), sandbox.name)


@pytest.mark.sandbox
async def test_sql(bubblewrap: Bubblewrap) -> None:
    result = await Runner(bubblewrap).run(RunRequest("sql", ("SELECT sum(n) AS s FROM data",)), {"d.csv": b"n\n1\n2\n"})
    assert json.loads(result.stdout)["rows"] == [[3]]
    assert result.files == ()
