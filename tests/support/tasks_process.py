"""A process of a run of faults on tasks: `python tasks_process.py OPTIONS`, with :class:`Options` as JSON.

It serves services with a wall clock that may be wrong, until SIGTERM. Two arms have effects outside: ``stamp`` at most
once, ``mark`` with a key by which the outside can tell a repeat.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncGenerator
from pathlib import Path

import msgspec

from octollm import Arm, Context, Task
from octollm.clock import SystemClock, Uuid7Generator
from octollm.config import Settings, read_settings
from octollm.contracts.services import SERVICES, OperationKind
from octollm.installation.arm_host import serve_arm
from octollm.installation.network import transport_from_settings
from octollm.installation.service_host import ServiceHost, supervise_hosts
from octollm.installation.services import serve_builtin_service
from octollm.rpc.http_client import HttpClient

KINDS: dict[str, OperationKind] = {"stamp": "at_most_once", "mark": "idempotent"}
CALLS = ("models:chat", "tasks:create", "tasks:read", "mark:execute")
EFFECT_SECONDS = 60.0
JSON = {"Content-Type": "application/json"}


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What a process serves: the settings of each service, and what is wrong with its clock, in seconds."""

    services: dict[str, dict[str, str]]
    outside: str
    offset: float = 0.0


class WrongClock(SystemClock):
    """A wall clock that is wrong; the monotonic clock is the system's."""

    def __init__(self, offset: float) -> None:
        self._offset = offset

    def now(self) -> float:
        return super().now() + self._offset


def effect_arm(name: str, outside: str, http: HttpClient) -> Arm:
    """Return an arm whose steps leave one effect outside each.

    ``ask`` in a step's goal asks the model before it, ``endless`` for a text without an end, ``submit`` has a
    sub-task, and ``nest`` one with such a text.
    """
    arm = Arm(name, f"Leaves a {name} outside", calls=CALLS)

    @arm.operation(kind=KINDS[name])
    async def execute(task: Task, ctx: Context) -> str:
        """Leave an effect."""
        if "ask" in task.goal:
            await ctx.model.complete(f"{ctx.task_id} {task.goal}", max_tokens=200)
        if "endless" in task.goal:
            async for piece in ctx.model.stream(f"{ctx.task_id} {task.goal}", max_tokens=4000):
                await ctx.emit(piece)
        if "submit" in task.goal:
            await (await ctx.submit("Have an effect below.", arm="mark")).result()
        if "nest" in task.goal:
            await (await ctx.submit("An endless text below.", arm="mark")).result()
        info = ctx.info
        effect = {
            "task": ctx.task_id,
            "step": info.step,
            "attempt": info.attempt,
            "run": info.run,
            "arm": name,
            "key": ctx.effect_key("effect", task.goal),
        }
        body = msgspec.json.encode(effect)
        answer = await http.send("POST", f"{outside}/effects", JSON, body, seconds=EFFECT_SECONDS)
        assert answer.status == 200
        return f"{name} {info.step}"

    del execute
    return arm


@contextlib.asynccontextmanager
async def serve(name: str, settings: Settings, options: Options) -> AsyncGenerator[ServiceHost]:
    """Serve one service or arm."""
    clock = WrongClock(options.offset)
    ids = Uuid7Generator(clock)

    def report(missing: str) -> None:
        print(f"{name} waits for {missing}", file=sys.stderr, flush=True)

    if name not in KINDS:
        async with serve_builtin_service(name, settings, clock=clock, ids=ids, on_wait=report) as host:
            yield host
        return
    async with transport_from_settings(settings).create_client() as http:
        arm = effect_arm(name, options.outside, http)
        async with serve_arm(arm, settings, http, clock=clock, ids=ids, on_wait=report) as host:
            yield host


async def main(options: Options, ready: Path) -> None:
    """Serve all of them, and create ``ready`` once they are there."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with contextlib.AsyncExitStack() as stack:
        hosts = [
            await stack.enter_async_context(serve(name, read_settings(environment, tuple(SERVICES)), options))
            for name, environment in options.services.items()
        ]
        await stack.enter_async_context(supervise_hosts(hosts))
        ready.touch()
        await stop.wait()


if __name__ == "__main__":
    asyncio.run(main(msgspec.json.decode(sys.argv[1], type=Options), Path(sys.argv[2])))
