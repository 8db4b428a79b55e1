"""Renewing the leases of the tasks in hand, from a thread and over a connection of its own.

A busy event loop or a full connection pool is no false death: the thread goes on beside it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress

from octollm.clock import Clock
from octollm.errors import OctoError
from octollm.storage import Database
from octollm.tasks.claims import TaskLeases

RENEW_SECONDS = 0.5
RENEW_DEADLINE_SECONDS = 1.5
"""A holder that could not renew for so long stops its calls by itself, before another takes the task over."""
THREAD_JOIN_SECONDS = 5.0

Connect = Callable[[], AbstractAsyncContextManager[Database]]


class LeaseRenewer:
    """The leases of one holder. ``on_lost`` is called in the event loop with the id of each task that was lost."""

    def __init__(self, connect: Connect, holder: str, clock: Clock, on_lost: Callable[[str], None]) -> None:
        self._connect = connect
        self._holder = holder
        self._clock = clock
        self._on_lost = on_lost
        self._lock = threading.Lock()
        # Task to its run and the time on the monotonic clock when it was last known to be ours.
        self._held: dict[str, tuple[int, float]] = {}
        self.failure = ""
        """Why leases are not renewed just now; empty when they are."""

    def add(self, task_id: str, epoch: int) -> None:
        """Renew the lease of a task that was claimed just now."""
        with self._lock:
            self._held[task_id] = (epoch, self._clock.monotonic())

    def remove(self, task_id: str, epoch: int) -> None:
        """Renew it no more."""
        with self._lock:
            if self._held.get(task_id, (epoch, 0.0))[0] == epoch:
                self._held.pop(task_id, None)

    @asynccontextmanager
    async def run(self, on_failure: Callable[[BaseException], None]) -> AsyncGenerator[None]:
        """Renew for as long as the context is open; ``on_failure`` is given what the thread died of, in the loop."""
        loop = asyncio.get_running_loop()
        stopped = threading.Event()
        ended = asyncio.Event()

        def report(callback: Callable[[], None]) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody is left to be told
                loop.call_soon_threadsafe(callback)

        def run() -> None:
            try:
                asyncio.run(self._renew_until(stopped, report))
            except BaseException as error:
                report(lambda error=error: on_failure(error))
            finally:
                report(ended.set)

        thread = threading.Thread(target=run, name="leases", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stopped.set()
            with suppress(TimeoutError):  # it is a daemon: it holds nothing that outlives the process
                async with asyncio.timeout(THREAD_JOIN_SECONDS):
                    await ended.wait()

    async def _renew_until(self, stopped: threading.Event, report: Callable[[Callable[[], None]], None]) -> None:
        """Renew twice a second, over one connection for as long as that is good."""
        while not stopped.is_set():
            try:
                async with self._connect() as db:
                    claims = TaskLeases(db, self._holder)
                    while not stopped.is_set():
                        await self._renew(claims, report)
                        await asyncio.sleep(RENEW_SECONDS)
            except OctoError as error:
                self._record_failure(error.detail, report)
                await asyncio.sleep(RENEW_SECONDS)

    async def _renew(self, leases: TaskLeases, report: Callable[[Callable[[], None]], None]) -> None:
        with self._lock:
            held = {task_id: run for task_id, (run, _since) in self._held.items()}
        if not held:
            self.failure = ""
            return
        began = self._clock.monotonic()
        try:
            async with asyncio.timeout(RENEW_DEADLINE_SECONDS - RENEW_SECONDS):
                kept = await leases.renew(held)
        except TimeoutError:
            self._record_failure("The database did not answer in time.", report)
            return
        except OctoError as error:
            self._record_failure(error.detail, report)
            return
        self.failure = ""
        with self._lock:
            for task_id in kept:
                if task_id in self._held and self._held[task_id][0] == held[task_id]:
                    self._held[task_id] = (held[task_id], began)
        for task_id in held.keys() - kept:
            self._report_lost(task_id, held[task_id], report)

    def _record_failure(self, why: str, report: Callable[[Callable[[], None]], None]) -> None:
        """Stop the work on every task that has not been known to be ours for too long."""
        self.failure = why
        now = self._clock.monotonic()
        with self._lock:
            late = [(task_id, run) for task_id, (run, at) in self._held.items() if now - at >= RENEW_DEADLINE_SECONDS]
        for task_id, run in late:
            self._report_lost(task_id, run, report)

    def _report_lost(self, task_id: str, epoch: int, report: Callable[[Callable[[], None]], None]) -> None:
        with self._lock:
            ours = self._held.get(task_id, (None, 0.0))[0] == epoch
            if ours:
                del self._held[task_id]
        if ours:
            report(lambda: self._on_lost(task_id))
