"""Choosing a sandbox by trying it: what cannot run a program is not used, and a bare subprocess never is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from octollm.clock import Clock
from octollm.errors import OctoError
from octollm.services.arms.executor.bubblewrap import Bubblewrap
from octollm.services.arms.executor.sandbox import Job, Limits, Sandbox
from octollm.services.arms.executor.wasi import Wasi

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
    """Return the first sandbox that runs a program: bubblewrap, else WASI; or the one that is preferred.

    ``on_refused`` is told why one that comes first does not work. ``cache_dir`` holds the WASI interpreter, which is
    downloaded into it if need be and allowed by ``fetch``. Raises ``OctoError`` (``no_sandbox``) when there is none,
    saying why not and how to get one.
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
        said = (outcome.stderr.strip().splitlines() or [f"exit code {outcome.exit_code}"])[-1]
        raise OctoError(f"a trial run failed: {said[:300]}", code="sandbox_failed")
