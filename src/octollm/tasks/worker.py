"""The worker: acquires task leases, runs tasks concurrently, and stops those that were cancelled or lost.

Cancellations at other replicas arrive by Pub/Sub, or at the latest with the next lease renewal (0.5 s).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable

from octollm.concurrency import BackgroundLoop, LoopLogger
from octollm.context import RequestContext, parse_traceparent, set_context
from octollm.errors import OctoError
from octollm.events.pubsub import PubSubListener
from octollm.storage import RedisClient, RedisKeys
from octollm.storage.redis_protocol import PubSubMessage
from octollm.tasks.clock_guard import ClockGuard
from octollm.tasks.leases import LeaseRenewer, TaskLeases
from octollm.tasks.records import TaskRecord
from octollm.tasks.runner import RunnerDependencies, TaskRunner
from octollm.tasks.scheduling import places_of
from octollm.telemetry import Logger

SWEEP_SECONDS = 0.5
"""The interval at which the database is checked for claimable tasks, for lost wake-ups and expired leases."""
MAX_TASKS = 16
"""Tasks of one worker at a time. They mostly wait for arms; the bound limits what a crash delays."""
MAX_SUBTASKS = 24
"""Sub-tasks of each generation that a worker runs beyond that; :func:`places_of` says why."""


class Worker:
    """Claims and runs tasks. The database is the queue; :meth:`wake` only saves waiting for the next sweep."""

    def __init__(
        self,
        deps: RunnerDependencies,
        task_leases: TaskLeases,
        create_renewer: Callable[[Callable[[str], None]], LeaseRenewer],
        *,
        service: str,
        max_tasks: int = MAX_TASKS,
        max_subtasks: int = MAX_SUBTASKS,
        announce: Callable[[], Awaitable[None]] | None = None,
        clock_guard: ClockGuard | None = None,
    ) -> None:
        """``announce`` tells the workers of other replicas that a task waits.

        While the clock is wrong by ``clock_guard`` it claims nothing.
        """
        self._deps = deps
        self._task_leases = task_leases
        self._renewer = create_renewer(self._on_lease_lost)
        self._service = service
        self._places = places_of(max_tasks, max_subtasks)
        self._running: dict[str, asyncio.Task[None]] = {}
        self._generations: dict[str, int] = {}
        self._claim_loop = BackgroundLoop("worker", self._claim_all, interval=SWEEP_SECONDS, restart=True, log=deps.log)
        self._is_draining = False
        self._announce = announce
        self._clock_guard = clock_guard
        self._announce_wakeup = asyncio.Event()
        # Hints only: without them the sweeps of the others find the task.
        self._announce_loop = BackgroundLoop("queue hints", self._announce_round, restart=True, log=deps.log)

    @property
    def failure(self) -> str:
        """Return why the worker cannot claim or renew at present; empty when it can."""
        return self._claim_loop.failure or self._renewer.failure

    @property
    def _log(self) -> Logger:
        return self._deps.log

    def wake(self) -> None:
        """Look for tasks now. A worker that is full, be it for tasks of one generation, tells the others."""
        self._claim_loop.wake()
        if self._is_draining or min(self._room()) <= 0:
            self._announce_wakeup.set()

    def wake_if_free(self) -> None:
        """Look for tasks now, since a worker of another replica has no room."""
        if max(self._room()) > 0:
            self._claim_loop.wake()

    def _room(self) -> list[int]:
        """Return how many more tasks of each generation may run."""
        taken = Counter(self._generations.values())
        return [places - taken[generation] for generation, places in enumerate(self._places)]

    async def _announce_round(self) -> None:
        await self._announce_wakeup.wait()
        # Cleared before the hint, so that a task that is stored during it is announced by another one.
        self._announce_wakeup.clear()
        if self._announce is not None:
            with contextlib.suppress(OctoError):
                await self._announce()

    async def stop(self, task_id: str) -> None:
        """Stop running a cancelled task, if this worker runs it, and wait up to 5 s until its calls are closed."""
        if (task := self.cancel(task_id)) is not None:
            # Bounded: the task has ended in the database already, so a call that hangs must not delay the response to
            # the cancellation.
            await asyncio.wait({task}, timeout=5)

    def cancel(self, task_id: str) -> asyncio.Task[None] | None:
        """Cancel a task that this worker runs and return what runs it; ``None`` when it runs elsewhere."""
        task = self._running.get(task_id)
        # A second cancellation, such as the hint of the first one, would cut off what closes its calls.
        if task is not None and not task.cancelling():
            task.cancel()
        return task

    async def drain(self) -> None:
        """Stop claiming, and release the running tasks unfinished, so that another worker continues them."""
        # Set before the cancellations: each task that ends wakes the claim loop, which would claim it again.
        self._is_draining = True
        tasks = tuple(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if tasks and self._announce is not None:
            # The others claim them now, not with their next sweep.
            with contextlib.suppress(OctoError):
                await self._announce()

    def _on_lease_lost(self, task_id: str) -> None:
        """Stop running a task whose lease is lost, or could not be renewed in time."""
        task = self._running.get(task_id)
        if task is not None:
            self._log.warning("task.lost", task_id=task_id)
            task.cancel()

    @contextlib.asynccontextmanager
    async def run(self) -> AsyncGenerator[None]:
        """Claim and run tasks while the context is open; on exit, release the running tasks unfinished."""
        # The renewer stops last, so that tasks keep their leases until they are released.
        async with self._renewer.run(lambda error: self._log.error("leases.crashed", error=error)):
            try:
                async with self._claim_loop, self._announce_loop:
                    yield
            finally:
                await self.drain()

    async def _claim_all(self) -> None:
        # No limiter: nobody waits for a slot here, the database holds the queue. A task that ends wakes the loop.
        room = self._room()
        if self._is_draining or max(room) <= 0:
            return
        if self._clock_guard is not None:
            await self._clock_guard.check()
        for task, generation in await self._task_leases.claim(room, exclude=frozenset(self._running)):
            task_id, epoch = task.task_id, task.epoch
            self._renewer.add(task_id, epoch)
            work = asyncio.create_task(self._run_task(task), name=f"task {task_id}")
            self._running[task_id] = work
            self._generations[task_id] = generation
            work.add_done_callback(lambda _done, task_id=task_id, epoch=epoch: self._on_task_done(task_id, epoch))

    def _on_task_done(self, task_id: str, epoch: int) -> None:
        self._running.pop(task_id, None)
        self._generations.pop(task_id, None)
        self._renewer.remove(task_id, epoch)
        self._claim_loop.wake()

    async def _run_task(self, task: TaskRecord) -> None:
        # The trace of the submission, also after a takeover, so that a task has one trace over all of its epochs.
        trace = parse_traceparent(task.traceparent)
        set_context(RequestContext(self._service, "", task.correlation_id, trace, task.task_id, tenant=task.tenant))
        gauge = self._deps.metrics.tasks_running
        gauge.inc()
        try:
            await TaskRunner(self._deps, task).run()
        except asyncio.CancelledError:
            with contextlib.suppress(OctoError):
                # Shielded from a second cancellation. Without the release, others would wait for the lease to expire.
                await asyncio.shield(self._task_leases.release(task.task_id, task.epoch))
            raise
        except OctoError as error:
            # Another worker holds the task now, or its end could not be written. Then the lease expires, and the sweep
            # of some worker continues it.
            self._log.warning("task.let_go", error=error)
        except Exception as error:
            self._log.error("task.crashed", error=error)
            # Fail the task: left open, it would be claimed again and crash one worker after another.
            await self._fail_crashed(task, error)
        finally:
            gauge.dec()

    async def _fail_crashed(self, task: TaskRecord, error: Exception) -> None:
        detail = f"The orchestrator failed on this task ({type(error).__name__}); its log has the reason."
        with contextlib.suppress(OctoError):
            await TaskRunner(self._deps, task).fail(OctoError(detail))


def hint_listener(redis: RedisClient, keys: RedisKeys, worker: Worker, log: LoopLogger | None = None) -> PubSubListener:
    """Return what hears what other replicas announce: cancelled tasks, which it stops, and waiting ones.

    While Redis is away the next lease renewal finds cancellations, and the next sweep waiting tasks.
    """

    def on_message(message: PubSubMessage) -> None:
        if message.subscribed:
            return
        if message.name == keys.queue:
            worker.wake_if_free()
        else:
            worker.cancel(message.data.decode("ascii", errors="replace"))

    return PubSubListener(
        "task hints",
        redis,
        on_message,
        channels=(keys.cancel, keys.queue),
        # What was announced before is lost.
        on_connected=worker.wake_if_free,
        log=log,
    )
