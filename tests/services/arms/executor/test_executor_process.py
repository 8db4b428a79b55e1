"""The parent's side alone, with the shell in the sandbox's place."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octollm.clock import SystemClock
from octollm.errors import OctoError
from octollm.services.arms.executor.process import (
    SandboxReport,
    create_anonymous_file,
    infer_limit_reason,
    parse_result,
    run_bounded,
)
from octollm.services.arms.executor.sandbox import MAX_LIMITS, LimitReason, Limits, OutputFile, SandboxResult
from octollm.testing import wait_until

LIMITS = Limits(wall_seconds=5, result_files=2, result_file_bytes=10, output_bytes=1000)


def report(*files: tuple[object, object], **changes: object) -> bytes:
    fields = {"exit_code": 0, "reason": "", "peak_bytes": 1, "cpu_seconds": 0.1, "files": files} | changes
    return json.dumps(fields).encode() + b"\n"


async def shell(script: str, limits: Limits = LIMITS) -> SandboxResult:
    with create_anonymous_file([b"input"]) as job:
        return await run_bounded(
            lambda result, life: ["/bin/sh", "-c", script, "sh", f"/dev/fd/{result}", f"/dev/fd/{life}"],
            job=job,
            limits=limits,
            clock=SystemClock(),
        )


def open_descriptors() -> int:
    return sum(1 for _ in Path("/dev/fd").iterdir())


class TestResult:
    def test_whole(self) -> None:
        parsed = parse_result(report(("a", 2), ("b", 1)) + b"xxy", LIMITS)
        assert parsed is not None
        assert parsed[1] == (OutputFile("a", "xx"), OutputFile("b", "y"))

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"{}\n",
            b"[1]",
            report(("a", 5)) + b"xx",
            report(("a", -1)),
            report(("a", 11)) + b"x" * 11,
            report(("a", 0), ("b", 0), ("c", 0)),
            report(exit_code="0"),
            report(reason="other"),
        ],
    )
    def test_broken(self, data: bytes) -> None:
        assert parse_result(data, LIMITS) is None

    def test_names_and_text_are_checked_again(self) -> None:
        parsed = parse_result(report(("../a", 1), ("b", 1)) + b"x\xff", LIMITS)
        assert parsed is not None
        assert parsed[1] == ()

    @given(st.binary(max_size=200))
    def test_never_raises(self, data: bytes) -> None:
        parse_result(data, LIMITS)


@pytest.mark.parametrize(
    ("code", "peak", "cpu", "stderr", "reason"),
    [
        (0, 0, 0.0, "MemoryError", ""),
        (1, 0, 0.0, "ValueError: x", ""),
        (1, 0, 0.0, "Traceback\nMemoryError\n", "memory"),
        (1, 0, 0.0, "duckdb.OutOfMemoryException: Out of Memory Error: no", "memory"),
        (-24, 0, 0.0, "", "timeout"),
        (-9, 0, 10.0, "", "timeout"),
        (-9, 0, 0.0, "", "memory"),
        (-11, 10**9, 0.0, "", "memory"),
        (-11, 0, 0.0, "", "killed"),
    ],
)
def test_reasons(code: int, peak: int, cpu: float, stderr: str, reason: LimitReason) -> None:
    assert infer_limit_reason(SandboxReport(code, "", peak, cpu, ()), stderr, Limits()) == reason


def test_limits_are_cut() -> None:
    assert Limits(wall_seconds=1000, memory_bytes=2**40).clamp(MAX_LIMITS).wall_seconds == 60
    assert Limits().clamp(MAX_LIMITS) == Limits()


class TestRun:
    async def test_report_and_output(self) -> None:
        line = report(("a.txt", 2)).decode().strip()
        outcome = await shell(f"cat; echo err >&2; echo '{line}' >$1; printf hi >$1")
        assert (outcome.exit_code, outcome.stdout, outcome.stderr) == (0, "input", "err\n")
        assert outcome.files == (OutputFile("a.txt", "hi"),)

    async def test_no_report_is_a_failure_of_the_sandbox(self) -> None:
        with pytest.raises(OctoError, match="no user namespace") as caught:
            await shell("echo 'no user namespace' >&2; exit 1")
        assert caught.value.code == "sandbox_failed"

    async def test_a_missing_program(self) -> None:
        with pytest.raises(OctoError) as caught, create_anonymous_file([]) as job:
            await run_bounded(lambda *_: ["/nowhere/bwrap"], job=job, limits=LIMITS, clock=SystemClock())
        assert caught.value.code == "sandbox_failed"

    async def test_output_is_bounded(self) -> None:
        outcome = await shell("while :; do echo xxxxxxxxxxxxxxxxxxxxxxx; done")
        assert outcome.reason == "output"
        assert len(outcome.stdout) == 1000

    async def test_output_bound_counts_both_channels(self) -> None:
        outcome = await shell("while :; do echo xxxxxxxxx; echo yyyyyyyyy >&2; done")
        assert outcome.reason == "output"
        assert len(outcome.stdout) + len(outcome.stderr) == 1000

    async def test_wall_time_is_bounded(self) -> None:
        outcome = await shell("echo begun; sleep 100", Limits(wall_seconds=0.3))
        assert (outcome.reason, outcome.exit_code) == ("timeout", -9)
        assert "begun\n".startswith(outcome.stdout)

    async def test_odd_output_is_replaced(self) -> None:
        outcome = await shell(f"printf '\\377'; echo '{report().decode().strip()}' >$1")
        assert outcome.stdout == "\ufffd"

    async def test_cancelling_kills_the_group(self, running: Callable[[str], bool], tmp_path: Path) -> None:
        word = f"/tmp/{uuid4().hex}"
        task = asyncio.create_task(shell(f"tail -f {word} & touch {tmp_path}/begun; tail -F {word}"))
        await wait_until((tmp_path / "begun").exists, description="the process runs")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await wait_until(lambda: not running(word), description="nothing of it is left")

    async def test_no_descriptor_is_left_open(self) -> None:
        before = open_descriptors()
        for _ in range(3):
            await shell(f"echo '{report().decode().strip()}' >$1")
        with pytest.raises(OctoError):
            await shell("exit 1")
        await wait_until(lambda: open_descriptors() <= before, description="descriptors closed")
