"""Selects the sandbox: candidates are probed in the background with a trial run; the first run waits for the result."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Literal

from octollm import OctoError
from octollm.clock import Clock
from octollm.limiter import OnQueued
from octollm.rpc.health import DependencyStatus
from octollm.services.arms.executor.bubblewrap import Bubblewrap
from octollm.services.arms.executor.runner import Runner
from octollm.services.arms.executor.sandbox import Job, Limits, Sandbox
from octollm.services.arms.executor.wasi import PYTHON_ALONE, Wasi
from octollm.telemetry import Logger

SandboxPreference = Literal["auto", "bubblewrap", "wasi"]

_PROBE_JOB = Job(
    command=("-c", "import json; print(json.dumps({'sum': 1 + 1}))"),
    limits=Limits(wall_seconds=20.0),
)
_PROBE_OUTPUT = '{"sum": 2}\n'


async def select_sandbox(
    preference: SandboxPreference = "auto",
    *,
    cache_dir: Path,
    fetch: bool = True,
    clock: Clock | None = None,
    on_refused: Callable[[str], None] | None = None,
) -> Sandbox:
    """Return the first sandbox that works: bubblewrap, then WASI; or the preferred one.

    ``on_refused`` is called with the reason for each that does not work. ``cache_dir`` stores the WASI interpreter,
    which is downloaded if it is missing and ``fetch`` allows it. Raises ``OctoError`` (``no_sandbox``) when none
    works, with the reasons and how to install one.
    """
    refusals: list[str] = []
    for kind in ("bubblewrap", "wasi") if preference == "auto" else (preference,):
        try:
            sandbox = (
                await asyncio.to_thread(Bubblewrap.open, clock=clock)
                if kind == "bubblewrap"
                else await Wasi.open(cache_dir, fetch=fetch, clock=clock)
            )
            await probe_sandbox(sandbox)
        except OctoError as error:
            refusals.append(f"{kind}: {error.detail}")
            if on_refused is not None:
                on_refused(refusals[-1])
        else:
            return sandbox
    raise OctoError(
        f"no sandbox works here ({'; '.join(refusals)}). Install bubblewrap with the system's package manager "
        "(apt-get install bubblewrap, dnf install bubblewrap, pacman -S bubblewrap), and in a container allow user "
        f"namespaces (a seccomp profile that permits unshare and mount); or put CPython for WASI into {cache_dir}",
        code="no_sandbox",
    )


async def probe_sandbox(sandbox: Sandbox) -> None:
    """Run a small program. Raises ``OctoError`` (``sandbox_failed``) unless it does what it should."""
    outcome = await sandbox.run(_PROBE_JOB)
    if outcome.exit_code != 0 or outcome.stdout != _PROBE_OUTPUT:
        last_line = (outcome.stderr.strip().splitlines() or [f"exit code {outcome.exit_code}"])[-1]
        raise OctoError(f"a trial run failed: {last_line[:300]}", code="sandbox_failed")


RETRY_SECONDS = 60.0
"""Seconds for which a failed selection is remembered, before a run tries again."""


class RunnerProvider:
    """Provides the runner once a sandbox is selected. ``select`` returns one or raises ``no_sandbox``.

    ``on_queued`` is as for :class:`Runner`.
    """

    def __init__(
        self,
        select: Callable[[], Awaitable[Sandbox]],
        *,
        clock: Clock,
        log: Logger,
        on_queued: OnQueued | None = None,
    ) -> None:
        self._select = select
        self._on_queued = on_queued
        self._clock = clock
        self._log = log
        self._selection: asyncio.Task[Runner] | None = None
        self._failure: OctoError | None = None
        self._failed_at = 0.0

    def start(self) -> asyncio.Task[Runner]:
        """Start the selection, unless it is running or done."""
        if self._selection is None:
            self._selection = asyncio.create_task(self._create_runner(), name="choose a sandbox")
            self._selection.add_done_callback(self._on_selected)
        return self._selection

    async def get(self) -> Runner:
        """Return the runner. Raises ``no_sandbox``, with instructions how to install one."""
        failure = self._failure
        if failure is not None and self._clock.monotonic() - self._failed_at < RETRY_SECONDS:
            raise OctoError(failure.detail, code=failure.code) from failure
        # Shielded, because all runs wait for the same selection, and a cancelled run must not cancel it.
        return await asyncio.shield(self.start())

    async def checkup(self) -> DependencyStatus:
        """Return the sandbox in use, for ``/ready``.

        It is not a required dependency: without a sandbox the executor still answers, with how to install one. The WASI
        sandbox counts as degraded, because files of most formats cannot be read in it.
        """
        if self._failure is not None:
            return DependencyStatus(ok=False, detail=self._failure.detail, required=False)
        choosing = self._selection
        if choosing is None or not choosing.done():
            return DependencyStatus(ok=True, detail="a sandbox is being chosen", required=False)
        sandbox = choosing.result().sandbox
        if sandbox == Wasi.name:
            return DependencyStatus(ok=False, detail=f"{sandbox}: {PYTHON_ALONE}", required=False)
        return DependencyStatus(ok=True, detail=sandbox, required=False)

    async def aclose(self) -> None:
        """Cancel the selection."""
        if self._selection is not None:
            self._selection.cancel()
            await asyncio.wait({self._selection})

    async def _create_runner(self) -> Runner:
        return Runner(await self._select(), on_queued=self._on_queued)

    def _on_selected(self, choosing: asyncio.Task[Runner]) -> None:
        if choosing.cancelled():
            return
        error = choosing.exception()
        if error is None:
            self._failure = None
            self._log.info("sandbox.chosen", sandbox=choosing.result().sandbox)
            return
        # Cleared, so that a run after RETRY_SECONDS starts another selection.
        self._selection = None
        self._failed_at = self._clock.monotonic()
        self._failure = error if isinstance(error, OctoError) else OctoError(f"No sandbox: {error}", code="no_sandbox")
        self._log.error("sandbox.missing", error=error)
