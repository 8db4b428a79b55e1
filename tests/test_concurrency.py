from __future__ import annotations

import ast
import asyncio
import sys
from contextlib import closing, suppress
from pathlib import Path

import pytest

import octollm
from octollm.concurrency import BackgroundLoop, LockTimeout, Retries, TaskDeadline, file_lock, retry, retry_outage
from octollm.errors import OctoError
from octollm.resilience import Backoff
from octollm.testing import wait_until

FAST = Backoff(0.001, 0.001)


class RecordingLog:
    """A logger that keeps the names of its events."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def info(self, event: str, **_: object) -> None:
        self.events.append(event)

    warning = error = info


class ScriptedRounds:
    """Work of a loop: each round raises the next of ``outcomes``; from the end of the list on, all succeed."""

    def __init__(self, *outcomes: Exception | None) -> None:
        self._outcomes = list(outcomes)
        self.count = 0

    async def __call__(self) -> None:
        self.count += 1
        outcome = self._outcomes.pop(0) if self._outcomes else None
        if outcome is not None:
            raise outcome


def unavailable() -> OctoError:
    return OctoError("The database is away.", code="unavailable")


async def test_a_loop_repeats_its_work_until_it_is_closed():
    work = ScriptedRounds()
    async with BackgroundLoop("test", work, interval=0.001) as loop:
        await wait_until(lambda: work.count >= 3, description="three rounds")
        assert (await loop.check_health()).ok
    rounds = work.count
    await asyncio.sleep(0)
    assert work.count == rounds


async def test_wake_starts_the_next_round_at_once():
    work = ScriptedRounds()
    async with BackgroundLoop("test", work, interval=3600) as loop:
        await wait_until(lambda: work.count == 1, description="the first round")
        loop.wake()
        await wait_until(lambda: work.count == 2, description="the round after wake()")


async def test_the_first_round_may_be_delayed():
    work = ScriptedRounds()
    async with BackgroundLoop("test", work, initial_delay=3600):
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert work.count == 0


async def test_an_outage_shows_until_a_round_succeeds_and_has_one_line_in_the_log():
    lines = RecordingLog()
    gate = asyncio.Event()
    errors = [unavailable(), unavailable(), unavailable()]

    async def work() -> None:
        if errors:
            raise errors.pop()
        await gate.wait()

    async with BackgroundLoop("test", work, backoff=FAST, log=lines) as loop:
        await wait_until(lambda: not errors, description="three failed rounds")
        assert loop.failure == "The database is away."
        assert not (await loop.check_health()).ok
        gate.set()
        await wait_until(lambda: not loop.failure, description="recovery")
    assert lines.events == ["loop.failing", "loop.recovered"]


async def test_a_short_outage_is_not_logged():
    lines = RecordingLog()
    work = ScriptedRounds(unavailable(), unavailable())
    async with BackgroundLoop("test", work, interval=0.001, backoff=FAST, log=lines, log_after=3600):
        await wait_until(lambda: work.count >= 3, description="recovery")
    assert lines.events == []


async def test_work_that_does_not_return_reports_its_success_itself():
    lines = RecordingLog()
    work = ScriptedRounds(unavailable())

    async def follow() -> None:
        await work()
        loop.report_success()
        await asyncio.Event().wait()

    loop = BackgroundLoop("test", follow, backoff=FAST, log=lines)
    async with loop:
        await wait_until(lambda: lines.events == ["loop.failing", "loop.recovered"], description="recovery")
        assert loop.failure == ""


async def test_a_crash_ends_the_loop_and_surfaces_everywhere():
    lines = RecordingLog()
    crashes: list[BaseException] = []
    work = ScriptedRounds(None, ValueError("a defect"))
    async with BackgroundLoop("test", work, interval=0.001, log=lines, on_crash=crashes.append) as loop:
        await wait_until(lambda: loop.crash, description="the crash")
        with pytest.raises(ValueError, match="a defect"):
            loop.raise_if_crashed()
        assert "stopped: ValueError" in (await loop.check_health()).detail
    assert [str(error) for error in crashes] == ["a defect"]
    assert lines.events == ["loop.crashed"]
    assert work.count == 2


async def test_a_loop_that_restarts_survives_a_defect():
    lines = RecordingLog()
    work = ScriptedRounds(ValueError("a defect"))
    async with BackgroundLoop("test", work, interval=0.001, backoff=FAST, restart=True, log=lines) as loop:
        await wait_until(lambda: work.count >= 2 and not loop.failure, description="recovery")
    assert lines.events == ["loop.failing", "loop.recovered"]
    assert loop.crash is None


async def test_closing_does_not_wait_for_ever():
    lines = RecordingLog()
    released = asyncio.Event()

    async def ignore_cancellation() -> None:
        while not released.is_set():
            with suppress(asyncio.CancelledError):
                await released.wait()

    loop = BackgroundLoop("test", ignore_cancellation, interval=3600, log=lines, close_timeout=0.01)
    async with loop:
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert lines.events == ["loop.not_closed"]
    released.set()
    loop.start()
    await loop.aclose()


async def test_a_call_is_retried_while_the_policy_gives_a_delay():
    errors = [unavailable(), unavailable()]
    asked: list[int] = []

    def policy(_error: OctoError, attempt: int) -> float | None:
        asked.append(attempt)
        return 0.0

    async def work() -> str:
        if errors:
            raise errors.pop()
        return "done"

    assert await retry(work, policy) == "done"
    assert asked == [1, 2]


async def test_the_last_error_is_raised_when_the_policy_gives_up():
    with pytest.raises(OctoError, match="away"):
        await retry(ScriptedRounds(*[unavailable()] * 9), lambda _error, attempt: 0.0 if attempt < 3 else None)


@pytest.mark.parametrize("error", [ValueError("a defect"), asyncio.CancelledError()])
async def test_only_our_own_errors_are_retried(error: BaseException):
    async def work() -> None:
        raise error

    def policy(_error: OctoError, _attempt: int) -> float | None:
        raise AssertionError("not to be asked")

    with pytest.raises(type(error)):
        await retry(work, policy)


async def test_a_server_that_is_away_is_waited_for_and_the_log_says_so_once():
    log, work = RecordingLog(), ScriptedRounds(unavailable(), OctoError("It is busy.", code="overloaded"))
    await retry_outage(work, FAST, name="opening", log=log)
    assert (work.count, log.events) == (3, ["loop.failing"])


async def test_what_waiting_cannot_mend_is_raised_at_once():
    log, work = RecordingLog(), ScriptedRounds(OctoError("Too many.", code="quota_exhausted"))
    with pytest.raises(OctoError, match="Too many"):
        await retry_outage(work, FAST, name="opening", log=log)
    assert (work.count, log.events) == (1, [])


async def test_attempts_end_after_the_first_success():
    numbers: list[int] = []
    async for attempt in Retries(lambda _error, _attempt: 0.0):
        with attempt:
            numbers.append(attempt.number)
            if attempt.number < 3:
                raise unavailable()
    assert numbers == [1, 2, 3]


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


SELF_MADE_LOOPS = {
    "arm/subtasks.py:result": "waits for a task of another service, and ends with the arm's call",
    "cli/following.py:_show_usage": "polls a task that is shown, and ends with its updates",
    "cli/top.py:keep_reading": "polls what is shown, and says in it when there is no answer",
    "installation/replay.py:_wait": "polls a task of this process, and decides its approvals, until it has ended",
    "installation/embedded.py:wait_ready": "polls /ready of services in this process, a few milliseconds each",
    "rpc/transport.py:serve_app": "uvicorn sets a flag when it has started, and no event",
    "rpc/transport.py:_abort_connections": "uvicorn lists connections, and has no event for their end",
    "rpc/transport.py:shutdown": "uvicorn lists connections and tasks, and has no event for their end",
    "tasks/leases.py:_watch_connection_attempt": "ends with the attempt, in the thread of the renewal",
    "tasks/leases.py:_renew_until": "runs in its own thread, with an event loop that ends with it",
    "tasks/runner.py:_expire": "sleeps until the task's deadline, which may be put off, and ends with the run",
    "tasks/step.py:_run_attempts": "each attempt of a step is an event in SQL, and a restart goes on with its number",
    "testing/timing.py:wait_until": "polls a predicate of a test",
}
"""Loops that repeat and pause outside the supervisor and the retry loop, each with its reason."""


def _find_loops() -> set[str]:
    """Return the functions in which a ``while`` loop sleeps."""
    root = Path(octollm.__file__).parent
    found: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        if path.name == "concurrency.py" and path.parent == root:
            continue
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.AsyncFunctionDef):
                continue
            for loop in ast.walk(function):
                if isinstance(loop, ast.While) and any(_is_sleep(node) for node in ast.walk(loop)):
                    found.add(f"{path.relative_to(root).as_posix()}:{function.name}")
    return found


def _is_sleep(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) in ("asyncio.sleep", "sleep", "anyio.sleep")


def test_loops_that_repeat_and_pause_use_the_supervisor_or_the_retry_loop():
    assert _find_loops() == set(SELF_MADE_LOOPS)


async def test_a_deadline_of_a_task_ends_each_piece_that_is_late_and_no_other() -> None:
    ends: list[str] = []

    async def work() -> None:
        with closing(TaskDeadline(0.01)) as deadline:
            for number in range(3):
                try:
                    with deadline:
                        if number != 1:
                            await asyncio.Event().wait()
                except TimeoutError:
                    ends.append("late")
                else:
                    ends.append("done")
            assert asyncio.current_task().cancelling() == 0  # type: ignore[union-attr]

    await asyncio.wait_for(work(), 10)
    assert ends == ["late", "done", "late"]


async def test_a_deadline_of_a_task_lets_a_cancellation_through() -> None:
    began = asyncio.Event()

    async def work() -> None:
        with closing(TaskDeadline(60)) as deadline, deadline:
            began.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
