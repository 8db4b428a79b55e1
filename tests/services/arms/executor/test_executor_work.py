import asyncio
from dataclasses import dataclass, field

import pytest

from octollm.contracts.operations import RunRequest, RunResult
from octollm.contracts.task import FileRef
from octollm.errors import OctoError
from octollm.services.arms.executor.sandbox import Job, SandboxResult
from octollm.services.arms.executor.selection import RETRY_SECONDS, RunnerProvider
from octollm.services.arms.executor.service import build_run_request, find_sql_file, summarise_run
from octollm.testing import ManualClock, wait_until


def files(*names: str) -> tuple[FileRef, ...]:
    return tuple(FileRef(name, text="x") for name in names)


def test_main_is_run_before_others() -> None:
    assert build_run_request(files("a.py", "main.py", "d.csv"), None).command == ("main.py",)
    assert build_run_request(files("a.py", "d.csv"), None).command == ("a.py",)


def test_a_query_is_run_over_the_other_files() -> None:
    given = files("q.sql", "d.csv")
    assert find_sql_file(given) == given[0]
    assert build_run_request(given, " SELECT 1 ") == RunRequest("sql", ("SELECT 1",), files("d.csv"))


@pytest.mark.parametrize("names", [("a.sql", "b.sql"), ("a.sql", "a.py"), ()])
def test_a_query_is_not_guessed(names: tuple[str, ...]) -> None:
    assert find_sql_file(files(*names)) is None


@pytest.mark.parametrize("names", [(), ("a.py", "b.py"), ("notes.txt",)])
def test_a_program_is_not_guessed(names: tuple[str, ...]) -> None:
    with pytest.raises(OctoError) as caught:
        build_run_request(files(*names), None)
    assert caught.value.code == "file_invalid"


def test_a_run_that_failed_says_why() -> None:
    request = RunRequest("python", ("main.py",))
    for result, why in (
        (RunResult(1, "", "Traceback\nValueError: no\n"), "ValueError: no"),
        (RunResult(-9, "", "", reason="timeout"), "stopped by a limit (timeout)"),
        (RunResult(3, "", ""), "ended with 3"),
    ):
        with pytest.raises(OctoError, match="The run failed") as caught:
            summarise_run(request, result)
        assert caught.value.code == "not_accepted"
        assert why in caught.value.detail


def test_rows_are_shown_with_their_query() -> None:
    request = RunRequest("sql", ("SELECT 1",))
    one = '{"columns": ["a"], "types": ["INTEGER"], "rows": [[1]], "row_count": 1, "truncated": false}'
    output, evidence = summarise_run(request, RunResult(0, one, ""))
    assert output.startswith("a: 1\n")
    assert (evidence.kind, evidence.rows, evidence.query) == ("data", 1, "SELECT 1")
    two = one.replace("[[1]]", "[[1], [null]]").replace('"row_count": 1', '"row_count": 2')
    assert summarise_run(request, RunResult(0, two, ""))[0].startswith("a\n---\n1\nNULL\n")


@dataclass
class RecordingLog:
    lines: list[str] = field(default_factory=list)

    def info(self, event: str, **_: object) -> None:
        self.lines.append(event)

    debug = warning = error = info


class EmptySandbox:
    name = "empty"

    async def run(self, job: Job) -> SandboxResult:
        return SandboxResult(0, "", "")


async def test_a_missing_sandbox_is_looked_for_again_after_a_while() -> None:
    clock, log, tried = ManualClock(), RecordingLog(), [0]

    async def choose() -> EmptySandbox:
        tried[0] += 1
        if tried[0] == 1:
            raise OctoError("No sandbox here.", code="no_sandbox")
        return EmptySandbox()

    holder = RunnerProvider(choose, clock=clock, log=log)  # pyright: ignore[reportArgumentType]
    for _ in range(3):
        with pytest.raises(OctoError, match="No sandbox here"):
            await holder.get()
    assert tried == [1]
    assert not (await holder.checkup()).ok
    clock.time += RETRY_SECONDS
    assert (await holder.get()).sandbox == "empty"
    assert (await holder.checkup()).detail == "empty"
    assert log.lines == ["sandbox.missing", "sandbox.chosen"]
    await holder.aclose()


async def test_a_caller_that_leaves_does_not_stop_the_choosing() -> None:
    gate = asyncio.Event()

    async def choose() -> EmptySandbox:
        await gate.wait()
        return EmptySandbox()

    holder = RunnerProvider(choose, clock=ManualClock(), log=RecordingLog())  # pyright: ignore[reportArgumentType]
    holder.start()
    assert (await holder.checkup()).detail == "a sandbox is being chosen"
    leaving = asyncio.create_task(holder.get())
    staying = asyncio.create_task(holder.get())
    await asyncio.wait({leaving, staying}, timeout=0.05)
    leaving.cancel()
    gate.set()
    assert (await staying).sandbox == "empty"
    await wait_until(leaving.done, description="the caller has left")
    await holder.aclose()


async def test_a_sandbox_that_reads_no_files_is_degraded_and_says_what_is_missing() -> None:
    class PythonSandbox(EmptySandbox):
        name = "wasi"

    async def choose() -> PythonSandbox:
        return PythonSandbox()

    holder = RunnerProvider(choose, clock=ManualClock(), log=RecordingLog())  # pyright: ignore[reportArgumentType]
    await holder.get()
    status = await holder.checkup()
    assert (status.ok, status.required) == (False, False)
    for word in ("wasi:", "PDF", "tables", "apt-get install bubblewrap"):
        assert word in status.detail
    await holder.aclose()
