"""The worker: claims tasks, runs so many side by side, and stops those that were cancelled or taken over."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace

from octollm.context import Scene, parse_traceparent, set_scene
from octollm.errors import OctoError
from octollm.tasks.claims import Claims
from octollm.tasks.leases import Leases
from octollm.tasks.records import TaskRecord
from octollm.tasks.runner import RunnerTools, TaskRunner
from octollm.telemetry import Log

SWEEP_SECONDS = 1.0
MAX_TASKS = 8


class Worker:
    """Runs the tasks that it claims. The database says which; :meth:`wake` only makes it look sooner."""

    def __init__(
        self,
        tools: RunnerTools,
        claims: Claims,
        leases: Callable[[Callable[[str], None]], Leases],
        *,
        service: str,
        max_tasks: int = MAX_TASKS,
    ) -> None:
        self._tools = tools
        self._claims = claims
        self._leases = leases(self._lost)
        self._service = service
        self._max = max_tasks
        self._running: dict[str, asyncio.Task[None]] = {}
        self._news = asyncio.Event()
        self._drained = False
        self._failure = ""

    @property
    def failure(self) -> str:
        """Return why the worker cannot do its work just now; empty when it can."""
        return self._failure or self._leases.failure

    @property
    def _log(self) -> Log:
        return self._tools.log

    def wake(self) -> None:
        """Look for tasks now."""
        self._news.set()

    async def stop(self, task_id: str) -> None:
        """Stop working on a task that was cancelled, if this worker does, and wait until its calls are closed."""
        task = self._running.get(task_id)
        if task is not None:
            task.cancel()
            await asyncio.wait({task}, timeout=5)

    async def drain(self) -> None:
        """Claim nothing more, and give what is in hand back unfinished, so that another worker goes on with it."""
        self._drained = True
        tasks = tuple(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _lost(self, task_id: str) -> None:
        """Stop the work on a task that is not ours any more, or may not be."""
        task = self._running.get(task_id)
        if task is not None:
            self._log.warning("task.lost", task_id=task_id)
            task.cancel()

    @contextlib.asynccontextmanager
    async def running(self, on_failure: Callable[[BaseException], None]) -> AsyncGenerator[None]:
        """Work for as long as the context is open; on leaving, tasks in hand are given back unfinished.

        ``on_failure`` is given what ends the work by itself.
        """

        def failed(error: BaseException) -> None:
            self._failure = f"The worker stopped: {type(error).__name__}."
            on_failure(error)

        async with self._leases.renewing(failed):
            looking = asyncio.create_task(self._look(), name="worker")
            looking.add_done_callback(lambda done: _surface(done, failed))
            try:
                yield
            finally:
                looking.cancel()
                await self.drain()
                await asyncio.gather(looking, return_exceptions=True)

    async def _look(self) -> None:
        while True:
            try:
                await self._claim_all()
                self._failure = ""
            except OctoError as error:
                # The database cannot be used just now: said in /ready, and tried again.
                self._failure = error.detail
                self._log.error("worker.no_database", error=error)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SWEEP_SECONDS):
                    await self._news.wait()
            self._news.clear()

    async def _claim_all(self) -> None:
        while len(self._running) < self._max and not self._drained:
            claimed = await self._claims.next(besides=frozenset(self._running))
            if claimed is None:
                return
            task_id, run = claimed
            record = replace(await self._tools.store.get(task_id), run=run)
            self._leases.hold(task_id, run)
            work = asyncio.create_task(self._work(record), name=f"task {task_id}")
            self._running[task_id] = work
            work.add_done_callback(lambda _done, task_id=task_id, run=run: self._ended(task_id, run))

    def _ended(self, task_id: str, run: int) -> None:
        self._running.pop(task_id, None)
        self._leases.drop(task_id, run)
        self._news.set()

    async def _work(self, task: TaskRecord) -> None:
        # A run that takes over goes on in the trace that the task was submitted in.
        trace = parse_traceparent(task.traceparent)
        set_scene(Scene(self._service, "", task.correlation_id, trace, task.task_id, tenant=task.tenant))
        gauge = self._tools.metrics.tasks_running
        gauge.inc()
        try:
            await TaskRunner(self._tools, task).run()
        except asyncio.CancelledError:
            with contextlib.suppress(OctoError):
                await asyncio.shield(self._claims.release(task.task_id, task.run))
            raise
        except OctoError as error:
            # Another run holds the task now, or its end could not be written: the sweep goes on with it.
            self._log.warning("task.let_go", error=error)
        except Exception as error:
            self._log.error("task.crashed", error=error)
            await self._give_up(task, error)
        finally:
            gauge.dec()

    async def _give_up(self, task: TaskRecord, error: Exception) -> None:
        detail = f"The orchestrator failed on this task ({type(error).__name__}); its log has the reason."
        with contextlib.suppress(OctoError):
            await TaskRunner(self._tools, task).fail(OctoError(detail))


def _surface(done: asyncio.Task[None], on_failure: Callable[[BaseException], None]) -> None:
    if not done.cancelled() and (error := done.exception()) is not None:
        on_failure(error)
